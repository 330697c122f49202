"""Which parameter axis lies on which mesh axis. Nothing else names a mesh axis."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from keye_jax.config import KeyeConfig
from keye_jax.params import ParamSpec, map_specs

MODEL_AXIS = "model"

# Logical axis → mesh axis. Everything not named is replicated.
TENSOR_PARALLEL: Mapping[str, str] = {
    "vocab": MODEL_AXIS,
    "heads": MODEL_AXIS,
    "mlp": MODEL_AXIS,
    # The output side of both expert products: sharding what is summed over would put an all-reduce into the loop
    # over row tiles.
    "expert_out": MODEL_AXIS,
}


def abstract_mesh(devices: int) -> AbstractMesh:
    """A mesh of that many devices in a row; needs none to exist."""
    return AbstractMesh((devices,), (MODEL_AXIS,))


def param_sharding(spec: ParamSpec, mesh: AbstractMesh) -> NamedSharding:
    """The first axis that has a rule and divides evenly is sharded; replicated where there is none."""
    for position, (axis, extent) in enumerate(zip(spec.axes, spec.shape, strict=True)):
        mesh_axis = TENSOR_PARALLEL.get(axis) if axis else None
        if mesh_axis is not None and extent % mesh.shape[mesh_axis] == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * position, mesh_axis))
    return replicated(mesh)


def replicated(mesh: AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(config: KeyeConfig, mesh: AbstractMesh) -> dict[str, Any]:
    """The tree of shardings of all parameters."""
    return map_specs(lambda spec: param_sharding(spec, mesh), config)


def replicated_like(tree: Any, mesh: AbstractMesh) -> Any:
    """A tree of replicated shardings of the given shape."""
    return jax.tree.map(lambda _: replicated(mesh), tree)
