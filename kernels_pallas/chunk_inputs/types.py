"""What comes out of `chunk_inputs`; what goes in are the types of `decode_inputs`."""

from typing import NamedTuple

import jax

from kernels_pallas.decode_inputs.types import Caches


class ChunkInputs(NamedTuple):
    """What a chunk's attention reads. Letters as in `decode_inputs.types`, C tokens a row."""

    q: jax.Array  # [B, C, H, K], the model's dtype
    idx_q: jax.Array  # [B, C, J, I], dtype of the index cache
    idx_weights: jax.Array  # [B, C, J] float32: gate * query scale * I ** -0.5
    caches: Caches
