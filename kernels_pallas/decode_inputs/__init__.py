"""From a decode step's residual stream to what its attention reads: projections, norms, rotary embedding, the indexer's
transform and quantisation, and the new token's rows of the caches."""

from functools import partial

import jax

from kernels_pallas.decode_inputs import gpu, reference
from kernels_pallas.decode_inputs.types import Caches, DecodeInputs, Tables, Weights, check_caches
from kernels_pallas.dispatch import dispatch

__all__ = ["Caches", "DecodeInputs", "Tables", "Weights", "decode_inputs"]


def decode_inputs(
    h: jax.Array, weights: Weights, tables: Tables, caches: Caches, layer: jax.Array, slots: jax.Array, eps: float
) -> DecodeInputs:
    """Queries and index queries of one token a row; its keys, values and index keys go into the caches.

    The input is normed (root mean square) and projected six ways. Attention heads: root-mean-square norm, then rotary
    embedding. Indexer: norm (queries root mean square, keys layer norm with bias), rotary embedding, Hadamard
    transform, then quantisation where the index cache is float8_e4m3fn (a power-of-two scale a vector) and a cast
    otherwise. Every step rounds to the model's dtype; sums and norms are float32.

    Args:
        h: [B, D] the residual stream.
        weights: of all layers.
        tables: rotary tables of the rows' positions.
        caches: of all layers; donate them, they are written in place.
        layer: int32 scalar.
        slots: [B] int32, where each row's token goes; a slot at or beyond the capacity is not written.
        eps: of the norms.

    Returns:
        Queries, index queries and weights, and the caches.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(h, weights, caches, slots)
    cuda = partial(gpu.decode_inputs, eps=eps) if gpu.supports(h, weights, caches) else None
    return dispatch(partial(reference.decode_inputs, eps=eps), h, weights, tables, caches, layer, slots, cuda=cuda)


def _check(h: jax.Array, weights: Weights, caches: Caches, slots: jax.Array) -> None:
    B, D = h.shape
    L = caches.kv.shape[0]
    if weights.norm.shape != (L, D) or any(w.shape[:2] != (L, D) for w in weights.projections) or slots.shape != (B,):
        raise ValueError(f"h {h.shape}, slots {slots.shape} and weights {[w.shape for w in weights]} do not fit")
    check_caches(weights, caches, B)
