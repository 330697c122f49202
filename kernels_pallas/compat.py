"""One spelling for names of Pallas that differ between the JAX versions that we run on."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

_NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()


def load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of a whole reference, element by element where there is no wider way."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)
