"""What goes in and out of `decode_inputs`.

Letters: B rows of one token each, D hidden; H query heads, G key/value heads, K head width; J index heads, I index head
width; L layers, S cache capacity.
"""

from typing import NamedTuple

import jax

from kernels_pallas import quantized


class Weights(NamedTuple):
    """What an attention block needs before attention; arrays of all layers, passed whole so that none is copied.

    Stored with 8 bits, q, k and v have scales [L, H, K] and [L, G, K].
    """

    norm: jax.Array  # [L, D], of the block's input
    q: quantized.Weights  # [L, D, H, K]
    k: quantized.Weights  # [L, D, G, K]
    v: quantized.Weights  # [L, D, G, K]
    idx_q: jax.Array  # [L, D, J, I]
    idx_k: jax.Array  # [L, D, I]
    gate: jax.Array  # [L, D, J]
    q_norm: jax.Array  # [L, K]
    k_norm: jax.Array  # [L, K]
    idx_q_norm: jax.Array  # [L, I]
    idx_k_norm: jax.Array  # [L, I], of a layer norm, with the bias below
    idx_k_norm_bias: jax.Array  # [L, I]

    @property
    def projections(self) -> tuple[quantized.Weights, ...]:
        """The six matrices that multiply the normed input."""
        return self[1:7]


class Tables(NamedTuple):
    """Rotary tables of the attention heads and of the indexer; of chunks [B, C, ...]."""

    cos: jax.Array  # [B, K // 2]
    sin: jax.Array  # [B, K // 2]
    idx_cos: jax.Array  # [B, I // 2]
    idx_sin: jax.Array  # [B, I // 2]


class Caches(NamedTuple):
    """Caches of all layers."""

    kv: jax.Array  # [L, B, S, 2, G, K], the model's dtype
    idx_k: jax.Array  # [L, B, S, I]; float8_e4m3fn, bfloat16 or float32
    idx_scale: jax.Array | None  # [L, B, S] float32; None unless idx_k is float8_e4m3fn


class DecodeInputs(NamedTuple):
    """What a step's attention reads."""

    q: jax.Array  # [B, H, K], the model's dtype
    idx_q: jax.Array  # [B, J, I], dtype of the index cache
    idx_weights: jax.Array  # [B, J] float32: gate * query scale * I ** -0.5
    caches: Caches


def check_caches(weights: Weights, caches: Caches, batch: int) -> None:
    """Raises ValueError for caches of other shapes than a batch of rows and these weights need, and for 8-bit weights
    with a scale that does not fit."""
    L, _, S = caches.kv.shape[:3]
    G, K = weights.k.shape[2:]
    I = weights.idx_k.shape[2]  # noqa: E741
    for w in weights.projections:
        quantized.check_scale(w, 1)
    if caches.kv.shape != (L, batch, S, 2, G, K) or caches.idx_k.shape != (L, batch, S, I):
        raise ValueError(f"caches {caches.kv.shape} and {caches.idx_k.shape} do not fit {weights.k.shape} and I={I}")
    if caches.idx_scale is not None and caches.idx_scale.shape != (L, batch, S):
        raise ValueError(f"idx_scale {caches.idx_scale.shape} must be {(L, batch, S)}")
