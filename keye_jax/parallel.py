"""The mesh axis that a model is spread over, as the model's code sees it from inside `shard_map`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Axis:
    """Devices in a row. On one device every method returns what it is given, and nothing is communicated.

    Attributes:
        name: of the mesh axis.
        size: devices on it.
    """

    name: str = ""
    size: int = 1

    def over(self, extent: int) -> "Axis":
        """This axis where `extent` divides evenly over it; else one device, for what each of them keeps whole."""
        return self if extent % self.size == 0 else ALONE

    def index(self) -> jax.Array:
        """int32 scalar: which device this is."""
        return lax.axis_index(self.name).astype(jnp.int32) if self.size > 1 else jnp.int32(0)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums over the devices."""
        return lax.psum(x, self.name) if self.size > 1 else x

    def stack(self, x: jax.Array) -> jax.Array:
        """[...] → [size, ...]: every device's x."""
        return lax.all_gather(x, self.name) if self.size > 1 else x[None]

    def gather(self, x: jax.Array, dimension: int) -> jax.Array:
        """Joins the devices' pieces of an array, in the order of the devices."""
        return lax.all_gather(x, self.name, axis=dimension, tiled=True) if self.size > 1 else x

    def exchange(self, x: jax.Array, split: int, join: int) -> jax.Array:
        """Cuts x into `size` pieces along `split`, piece d for device d, and joins what arrives along `join`."""
        return lax.all_to_all(x, self.name, split, join, tiled=True) if self.size > 1 else x

    def own(self, x: jax.Array, dimension: int) -> jax.Array:
        """This device's piece of an array that every device holds whole: the inverse of `gather`."""
        if self.size == 1:
            return x
        length = x.shape[dimension] // self.size
        return lax.dynamic_slice_in_dim(x, self.index() * length, length, axis=dimension)


ALONE = Axis()
"""One device."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread; see `keye_jax.sharding`.

    Attributes:
        experts: what experts and the vocabulary are spread over.
        context: what attention heads and the cache's slots are spread over.
        frames: what images and video frames are spread over.
    """

    experts: Axis = ALONE
    context: Axis = ALONE
    frames: Axis = ALONE


UNDIVIDED = Layout()
"""One device."""
