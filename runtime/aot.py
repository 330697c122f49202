"""Compiles graphs ahead of time, for the devices here or for a TPU topology that is not, and says what they need."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError
from runtime.graphs import DONATED, GraphKey

if TYPE_CHECKING:
    from jax.export import Exported

# An operation's name stands between its result's type and its operands; asynchronous ones start once.
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(?:-start)?\("
)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while a program runs."""

    arguments: int
    """Weights, cache and inputs."""
    results: int
    aliased: int
    """Part of the results that takes over the memory of arguments."""
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.results - self.aliased + self.temporaries


@dataclass(frozen=True)
class Compiled:
    """What is known of a program for devices that are not here."""

    memory: Memory
    collectives: Mapping[str, int]
    """Communication operations in the compiled text by kind; one inside a loop counts once."""


def compile_for_topology(key: GraphKey, exported: "Exported", topology: str) -> Compiled:
    """Compiles a graph for TPU chips that need not exist; libtpu must be installed.

    Args:
        topology: such as "v5e:2x4".

    Raises:
        InputError: libtpu is missing, the topology has another number of devices, or the program does not fit.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        # Whatever the plug-in raises: no libtpu, or a name it does not know.
        raise InputError(
            f"no compiler for the topology {topology!r} ({error!s:.200}); install keye-jax[tpu], check the name"
        ) from None
    if len(devices) != key.devices:
        raise InputError(f"{topology} has {len(devices)} devices, graph {key.name} is for {key.devices}")
    mesh = Mesh(np.array(devices), ("model",))
    shardings, _ = jax.tree.unflatten(exported.in_tree, exported.in_shardings_jax(mesh))
    args, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    program = jax.jit(exported.call, in_shardings=shardings, donate_argnums=DONATED[key.program])
    try:
        compiled = program.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"graph {key.name} does not compile for {topology}: {str(error).splitlines()[0]:.300}"
        ) from None
    return Compiled(memory(compiled), dict(Counter(_COLLECTIVE.findall(compiled.as_text() or ""))))


def memory(compiled: Any) -> Memory:
    """What XLA says of a compiled program."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )
