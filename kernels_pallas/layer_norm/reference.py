"""layer_norm in plain jnp: the specification and the fallback."""

from kernels_pallas.numerics import layer_norm as layer_norm
