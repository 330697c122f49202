"""`decode_inputs` for a chunk of tokens: from the residual stream to what attention reads: projections, norms, rotary
embedding, the indexer's transform and quantisation, and the chunk's rows of the caches."""

from functools import partial

import jax

from kernels_pallas.chunk_inputs import gpu, reference
from kernels_pallas.chunk_inputs.reference import index_inputs
from kernels_pallas.chunk_inputs.types import ChunkInputs
from kernels_pallas.decode_inputs.reference import IndexInputs
from kernels_pallas.decode_inputs.types import Caches, Tables, Weights, check_caches
from kernels_pallas.dispatch import dispatch

__all__ = ["ChunkInputs", "IndexInputs", "chunk_inputs", "index_inputs"]


def chunk_inputs(
    h: jax.Array,
    weights: Weights,
    tables: Tables,
    caches: Caches,
    layer: jax.Array,
    start: jax.Array,
    valid: jax.Array,
    eps: float,
) -> ChunkInputs:
    """Queries and index queries of a chunk of every row; its keys, values and index keys go into the caches.

    The input is normed (root mean square) and projected six ways. Attention heads: root-mean-square norm, then rotary
    embedding. Indexer: norm (queries root mean square, keys layer norm with bias), rotary embedding, Hadamard
    transform, then quantisation where the index cache is float8_e4m3fn (a power-of-two scale a vector) and a cast
    otherwise. Every step rounds to the model's dtype; sums and norms are float32.

    Args:
        h: [B, C, D] the residual stream.
        weights: of all layers.
        tables: rotary tables of the tokens' positions, [B, C, half the width].
        caches: of all layers; donate them, they are written in place.
        layer: int32 scalar.
        start: [B] int32, the slot of each row's first token; below zero or beyond the capacity where the caches hold
            another part of the sequence: only slots that there are are written.
        valid: [B] int32, how many of the C tokens are written.
        eps: of the norms.

    Returns:
        Queries, index queries and weights, and the caches.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(h, weights, tables, caches, start, valid)
    cuda = partial(gpu.chunk_inputs, eps=eps) if gpu.supports(h, weights, caches) else None
    arguments = (h, weights, tables, caches, layer, start, valid)
    return dispatch(partial(reference.chunk_inputs, eps=eps), *arguments, cuda=cuda)


def _check(h: jax.Array, weights: Weights, tables: Tables, caches: Caches, start: jax.Array, valid: jax.Array) -> None:
    B, C, D = h.shape
    L, K, I = caches.kv.shape[0], weights.k.shape[3], weights.idx_k.shape[2]  # noqa: E741
    matrices = any(w.shape[:2] != (L, D) for w in weights.projections)
    if weights.norm.shape != (L, D) or matrices or start.shape != (B,) or valid.shape != (B,):
        shapes = [w.shape for w in weights]
        raise ValueError(f"h {h.shape}, start {start.shape}, valid {valid.shape} and weights {shapes} do not fit")
    halves = (K // 2, K // 2, I // 2, I // 2)
    if tuple(table.shape for table in tables) != tuple((B, C, half) for half in halves):
        raise ValueError(f"tables {[table.shape for table in tables]} must be {[(B, C, half) for half in halves]}")
    check_caches(weights, caches, B)
