"""fp8 index keys as 32-bit words, for `gpu_ids`: arrays of 2 to 4 GiB of single bytes would get signed offsets."""

import jax
import jax.numpy as jnp
from jax import lax


def words(x: jax.Array) -> jax.Array:
    """[..., I] fp8 → [..., I // 4] uint32. XLA makes no copy."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // 4, 4), jnp.uint32)


def factors(x: jax.Array) -> list[jax.Array]:
    """What the tensor cores multiply: x itself, or for words of four fp8 values [..., c] each of the four as float16.

    The float16 are 2 ** -8 times the values: but for its place, the bit pattern of e4m3 means just that in float16,
    for subnormal values too. (Ampere has no instruction for it.)
    """
    if x.dtype != jnp.uint32:
        return [x]
    rows, columns = x.shape
    # The order in which a product sums is free. In this one a thread's 16 loaded bytes are its own operands: the
    # compiler finds nothing to exchange between threads.
    x = x.reshape(rows, columns // 16, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(rows, columns)
    sign, rest = jnp.uint32(0x80008000), jnp.uint32(0x3F803F80)
    even = ((x << 8) & sign) | ((x << 7) & rest)
    odd = (x & sign) | ((x >> 1) & rest)
    halves = (even, even >> 16, odd, odd >> 16)
    return [lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16) for half in halves]
