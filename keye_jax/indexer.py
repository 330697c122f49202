"""The lightning indexer's projections: what is scored and cached (DeepSeek-V3.2; Keye-VL-2.0's variant).

Order matters: norm, rotary embedding, Hadamard transform, quantisation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from keye_jax.config import KeyeConfig
from keye_jax.layers import layer_norm, project, rms_norm
from keye_jax.ops import einsum_f32
from keye_jax.rope import rotate

E4M3_MAX = 448.0


class IndexInputs(NamedTuple):
    """What `select_bits` and `select_ids` score with, and what the cache keeps of this chunk's keys."""

    q: jax.Array  # [B, C, J, I] in the indexer's dtype
    weights: jax.Array  # [B, C, J] float32: gate * query scale * I ** -0.5
    k: jax.Array  # [B, C, I] in the indexer's dtype
    k_scale: jax.Array | None  # [B, C] float32; None unless quantised


def index_inputs(
    params: dict[str, Any], a: jax.Array, cos: jax.Array, sin: jax.Array, config: KeyeConfig
) -> IndexInputs:
    """Index queries, weights and keys of a chunk.

    Args:
        params: one layer's "indexer" parameters.
        a: [B, C, D] the normed input of the attention block.
        cos, sin: [B, C, I // 2] tables of the indexer's own rotary sections.
    """
    eps = config.text.rms_norm_eps
    q = rms_norm(project("bcd,dji->bcji", a, params["q_proj"]), params["q_norm"], eps)
    k = layer_norm(project("bcd,di->bci", a, params["k_proj"]), params["k_norm"], params["k_norm_bias"], eps)
    gate = project("bcd,dj->bcj", a, params["gate_proj"])
    q = hadamard(rotate(q, cos, sin))
    k = hadamard(rotate(k[..., None, :], cos, sin))[..., 0, :]
    weights = gate.astype(jnp.float32) * config.sparse.indexer_head_dim**-0.5
    match config.sparse.indexer_dtype:
        case "fp8":
            q, q_scale = quantise(q)
            k, k_scale = quantise(k)
            return IndexInputs(q, weights * q_scale, k, k_scale)
        case "bf16":
            return IndexInputs(q.astype(jnp.bfloat16), weights, k.astype(jnp.bfloat16), None)
        case "float32":
            return IndexInputs(q.astype(jnp.float32), weights, k.astype(jnp.float32), None)


def hadamard(x: jax.Array) -> jax.Array:
    """x times the orthonormal Sylvester matrix H[i, j] = (-1) ** popcount(i & j) / sqrt(I); dtype of x."""
    width = x.shape[-1]
    index = np.arange(width)
    signs = 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)
    y = einsum_f32("...i,ij->...j", x.astype(jnp.float32), jnp.asarray(signs, jnp.float32))
    return (y * width**-0.5).astype(x.dtype)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises vectors to float8_e4m3fn with a power-of-two scale each ("ue8m0").

    Args:
        x: [..., I]; the last axis is one block.

    Returns:
        float8_e4m3fn [..., I] and float32 scales [...]: 2 ** ceil(log2(max(amax, 1e-4) / 448)).
    """
    x = x.astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-4)
    # 448 = 1.75 * 2**8, so the exponent follows from amax's own bits: exact, where log2 would round.
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)
    scale = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    return round_e4m3(x * inverse[..., None]).astype(jnp.float8_e4m3fn), scale


def round_e4m3(x: jax.Array) -> jax.Array:
    """Nearest e4m3 value of each float32, ties to even, saturating at 448; stays float32.

    Written out because platforms convert to float8 through different intermediate types and then round twice.
    """
    x = jnp.clip(x, -E4M3_MAX, E4M3_MAX)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    kept_odd = (bits >> 20) & 1
    normal = lax.bitcast_convert_type((bits + 0x7FFFF + kept_odd) & jnp.uint32(0xFFF00000), jnp.float32)
    # Below 2**-6 e4m3 is subnormal: multiples of 2**-9.
    subnormal = jnp.round(x * 512.0) / 512.0
    return jnp.where(jnp.abs(x) < 2.0**-6, subnormal, normal)
