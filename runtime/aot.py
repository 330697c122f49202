"""Compiles graphs ahead of time, for the devices here or for a TPU topology that is not, and says what they need."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import DoesNotFit, InputError
from runtime.graphs import DONATED, GraphKey

if TYPE_CHECKING:
    from jax.export import Exported
    from jax.sharding import AbstractDevice

NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}
"""libtpu asks the metadata server of a cloud machine what it runs on, unless it is told; jax would look for chips."""

_GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """A kind of TPU chip."""

    kind: str
    """What JAX calls a device of it."""
    devices: int
    """That one chip shows itself as."""
    cores: int
    """Of a device."""
    memory: int
    """Bytes that the compiler lets a program have on a device."""


# The datasheets' 16, 95 and 32 GB, and half of 192, less what the system keeps.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 1, 1, int(15.75 * _GIB)),
    "v5p": Chip("TPU v5", 1, 2, int(95.74 * _GIB)),
    "v6e": Chip("TPU v6 lite", 1, 1, int(31.25 * _GIB)),
    "tpu7x": Chip("TPU7x", 2, 1, int(94.75 * _GIB)),
}

_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\]")
_BITS = re.compile(r"(?:pred|[a-z]+?(\d+))")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+)$")
# Asynchronous ones start once.
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
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

    def beside(self, held: int) -> int:
        """What the program takes beside `held` bytes of its arguments: weights and cache, which are there anyway."""
        return max(0, self.total - held)


@dataclass(frozen=True)
class Collective:
    """One communication operation in the text of a compiled program."""

    kind: str
    bytes: int
    """Of its largest operand or result, on one device."""


@dataclass(frozen=True)
class Compiled:
    """What is known of a program for devices that are not here."""

    memory: Memory
    collectives: tuple[Collective, ...]
    """In the compiled text; one inside a loop stands there once."""


def split_topology(name: str) -> tuple[str, int]:
    """A TPU topology such as "v5e:2x4" → its kind of chip and its number of devices.

    Raises:
        InputError: a name of another form, or chips that are not known here.
    """
    chip, _, extents = name.partition(":")
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", extents):
        raise InputError(f"--topology {name!r:.60} must look like v5e:2x4 or v5p:2x2x1")
    if chip not in CHIPS:
        raise InputError(f"--topology {name!r:.60}: {chip!r} is none of {', '.join(CHIPS)}; use --devices N")
    return chip, CHIPS[chip].devices * math.prod(map(int, extents.split("x")))


def device_of(chip: str) -> "AbstractDevice":
    """A device of one of `CHIPS` as JAX describes it: what kernels take their sizes by."""
    from jax.sharding import AbstractDevice

    return AbstractDevice(CHIPS[chip].kind, num_cores=CHIPS[chip].cores, platform="tpu")


def without_chips() -> None:
    """Lets libtpu compile in this process without looking for chips; call it before jax is imported."""
    os.environ.pop("TPU_LIBRARY_PATH", None)
    os.environ.update(NO_TPU_HERE)


def compile_for_topology(key: GraphKey, exported: "Exported", topology: str) -> Compiled:
    """Compiles a graph for TPU chips that need not exist; libtpu must be installed.

    Args:
        topology: such as "v5e:2x4".

    Raises:
        DoesNotFit: the program needs more memory than a device has.
        InputError: libtpu is missing, the topology has another number of devices, or the program does not compile.
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
        reason = str(error).splitlines()[0]
        kind = DoesNotFit if reason.startswith("RESOURCE_EXHAUSTED") else InputError
        raise kind(f"graph {key.name} does not compile for {topology}: {reason:.300}") from None
    return Compiled(memory(compiled), tuple(collectives(compiled.as_text() or "")))


def argument_bytes(exported: "Exported") -> tuple[int, ...]:
    """Bytes of each of a graph's arguments on one device, by the shardings in the graph. Needs no device."""
    import jax
    from jax.sharding import AbstractMesh

    mesh = AbstractMesh((exported.nr_devices,), ("model",))
    places = exported.in_shardings_jax(mesh)
    sizes = [
        math.prod(place.shard_shape(aval.shape) if place else aval.shape) * aval.dtype.itemsize
        for aval, place in zip(exported.in_avals, places, strict=True)
    ]
    args, _ = jax.tree.unflatten(exported.in_tree, sizes)
    return tuple(sum(jax.tree.leaves(arg)) for arg in args)


def memory(compiled: Any) -> Memory:
    """What XLA says of a compiled program."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def collectives(text: str) -> list[Collective]:
    """The communication in the text of a compiled program, an asynchronous operation once.

    Raises:
        ValueError: an element type of unknown size.
    """
    types: dict[str, str] = {}
    calls = []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            name, right = match.groups()
            types[name], rest = _split_type(right)
            if operation := _COLLECTIVE.match(rest):
                calls.append((operation[1], name, rest[operation.end() - 1 :]))
    found = []
    for kind, name, rest in calls:
        # Operands are named; some versions write their types before the names.
        operands = rest[: _closing(rest)]
        texts = [types[name], operands, *(types.get(operand, "") for operand in _NAME.findall(operands))]
        found.append(Collective(kind, max(size for text in texts for size in _sizes(text))))
    return found


def _split_type(right: str) -> tuple[str, str]:
    """`type operation(...)` → both. Tuples and layouts hold parentheses, and tuples hold spaces."""
    end = _closing(right) + 1 if right.startswith("(") else right.find(" ")
    return right[:end], right[end:].lstrip()


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    return len(text)


def _sizes(text: str) -> Iterator[int]:
    """Bytes of every array type that the text names; 0 for none."""
    yield 0
    for element, extents in _SHAPE.findall(text):
        if element == "token":
            continue
        bits = _BITS.match(element)
        if bits is None:
            raise ValueError(f"element type {element} of unknown size")
        # Dimensions of a bounded size are written <=n.
        count = math.prod(int(extent.lstrip("<=")) for extent in extents.split(",") if extent)
        yield -(-count * int(bits[1] or 8) // 8)
