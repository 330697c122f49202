"""The lightning indexer's projections: what is scored and cached (DeepSeek-V3.2; Keye-VL-2.0's variant).

Order matters: norm, rotary embedding, Hadamard transform, quantisation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig
from keye_jax.layers import project
from keye_jax.ops import hadamard, quantise, rms_norm, rotate
from keye_jax.ops import plain_layer_norm as layer_norm


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
