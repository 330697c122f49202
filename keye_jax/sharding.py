"""How a model lies on several devices: presets, which array axis goes to the mesh axis, and programs over a mesh.

    single   one device
    expert   experts and vocabulary are spread; every device has all of attention and the whole cache. One sum a layer:
             for contexts that fit beside the weights
    context  attention heads and the cache's slots are spread as well: a device holds its share of the sequence

Images and video frames are spread in both: a device encodes whole ones, with all of the vision tower's weights.

One mesh axis serves all of them, over the devices of one host or of several. Nothing else names a mesh axis.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from keye_jax.config import KeyeConfig
from keye_jax.parallel import ALONE, Axis, Layout
from keye_jax.params import ParamSpec, WeightFormat, map_specs

MODEL_AXIS = "model"


@dataclass(frozen=True)
class Preset:
    """Logical axes of parameters that are spread, and whether the cache's slots are."""

    spread: frozenset[str]
    context: bool


PRESETS: Mapping[str, Preset] = {
    "single": Preset(frozenset(), False),
    "expert": Preset(frozenset({"vocab", "expert"}), False),
    "context": Preset(frozenset({"vocab", "expert", "heads"}), True),
}


WHOLE = PartitionSpec()
"""On every device."""


def abstract_mesh(devices: int, kind: AbstractDevice | None = None) -> AbstractMesh:
    """A mesh of that many devices in a row; needs none to exist."""
    return AbstractMesh((devices,), (MODEL_AXIS,), axis_types=(AxisType.Auto,), abstract_device=kind)


def layout(preset: str, devices: int) -> Layout:
    """What the model's code must know of a preset."""
    axis = Axis(MODEL_AXIS, devices) if devices > 1 else ALONE
    return Layout(experts=axis, context=axis if PRESETS[preset].context else ALONE, frames=axis)


def param_partition(spec: ParamSpec, preset: str, devices: int) -> PartitionSpec:
    """The first axis that the preset spreads and that divides evenly; replicated where there is none."""
    for position, (axis, extent) in enumerate(zip(spec.axes, spec.shape, strict=True)):
        if axis in PRESETS[preset].spread and extent % devices == 0:
            return PartitionSpec(*[None] * position, MODEL_AXIS)
    return WHOLE


def param_partitions(config: KeyeConfig, preset: str, devices: int, weights: WeightFormat = "none") -> dict[str, Any]:
    """The tree of partitions of all parameters."""
    return map_specs(lambda spec: param_partition(spec, preset, devices), config, weights)


def cache_partitions(cache: Mapping[str, Any], preset: str) -> dict[str, PartitionSpec]:
    """Of a cache as `keye_jax.cache` describes it."""
    spread = PartitionSpec(None, None, MODEL_AXIS) if PRESETS[preset].context else WHOLE
    return {name: WHOLE if name == "length" else spread for name in cache}


FRAMES = PartitionSpec(MODEL_AXIS)
"""Of patches and of their grids: each device has a share of whole frames. See `keye_jax.graphs.vision`."""


def shardings(partitions: Any, mesh: Any) -> Any:
    """A tree of partitions → a tree of shardings."""
    return jax.tree.map(lambda p: NamedSharding(mesh, p), partitions, is_leaf=lambda x: isinstance(x, PartitionSpec))


def spread(function: Callable[..., Any], mesh: AbstractMesh, partitions: tuple[Any, ...], results: Any) -> Any:
    """`function` on every device of a mesh, each with its part of the arguments.

    Args:
        partitions: of the arguments, trees as deep as theirs or shallower.
        results: of the results.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=partitions, out_specs=results, check_vma=False)
