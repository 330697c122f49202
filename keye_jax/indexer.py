"""The lightning indexer's projections: what is scored and cached (DeepSeek-V3.2; Keye-VL-2.0's variant)."""

from typing import Any

import jax

from keye_jax import ops
from keye_jax.cache import INDEX_DTYPES
from keye_jax.config import KeyeConfig


def index_inputs(
    params: dict[str, Any], a: jax.Array, cos: jax.Array, sin: jax.Array, config: KeyeConfig
) -> ops.IndexInputs:
    """Index queries, weights and keys of a chunk.

    Args:
        params: one layer's "indexer" parameters.
        a: [B, C, D] the normed input of the attention block.
        cos, sin: [B, C, I // 2] tables of the indexer's own rotary sections.
    """
    return ops.index_inputs(
        a,
        params["q_proj"],
        params["k_proj"],
        params["gate_proj"],
        (params["q_norm"], params["k_norm"], params["k_norm_bias"]),
        (cos, sin),
        INDEX_DTYPES[config.sparse.indexer_dtype],
        config.text.rms_norm_eps,
    )
