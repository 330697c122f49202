"""Kernels: one folder each, with the plain `jnp` reference that specifies it. Call them through `keye_jax.ops`."""
