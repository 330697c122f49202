"""The compiled programs of a bundle, for the static shapes asked for.

One path on every platform: a program is an exported graph, compiled here. A graph that the bundle lacks is exported
on the spot, stored in the bundle where it can be written, and then treated like any other.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.export import Exported
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from runtime import buckets, graphs
from runtime.aot import Memory, memory
from runtime.bundle import Bundle
from runtime.errors import DoesNotFit, InputError
from runtime.graphs import DONATED, PRESETS, SINGLE, GraphKey
from runtime.processes import ALONE, Processes

HOPPER = "9.0"
"""The compute capability that the GPU kernels are made for; other GPUs run plain graphs."""

Report = Callable[[str], None]
"""Called with a line for a person."""


@dataclass(frozen=True)
class Program:
    """A compiled graph. Calling it takes and gives what its function in `keye_jax.graphs` does."""

    key: GraphKey
    args: tuple[Any, ...]
    """Its arguments' shapes and dtypes, as trees."""
    run: Callable[..., Any]
    memory: Memory
    kernels: tuple[str, ...]
    """The custom calls in it; empty where XLA alone made it."""
    shardings: tuple[Any, ...]
    """Where its arguments lie, as trees like `args`."""

    def zeros(self, *arguments: int) -> tuple[Any, ...]:
        """Zeros for these arguments, by their position, where the program wants them."""
        return tuple(
            jax.tree.map(lambda a, place: jnp.zeros(a.shape, a.dtype, device=place), self.args[n], self.shardings[n])
            for n in arguments
        )

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


class Programs:
    """Loads, or exports, and compiles each graph once.

    Args:
        bundle: where graphs come from and go to.
        report: told what is about to take long, and what was exported.
        devices: that programs run on, in their order; None: the first one.
        preset: how the model lies on them.
        processes: that the devices belong to. Process 0's graphs serve all of them.
    """

    def __init__(
        self,
        bundle: Bundle,
        report: Report | None = None,
        devices: Sequence[Any] | None = None,
        preset: str | None = None,
        processes: Processes = ALONE,
    ):
        self.mesh = Mesh(np.array(devices or jax.devices()[:1]), ("model",))
        """The devices that programs run on."""
        self.platform = local_platform()
        self.plain = self.platform == "cuda" and getattr(jax.devices()[0], "compute_capability", None) != HOPPER
        """Whether this machine runs graphs without kernels."""
        self._chip = self.mesh.devices.flat[0].device_kind if self.platform == "tpu" else graphs.ANY_CHIP
        self.compile_s = 0.0
        """Seconds spent loading, exporting and compiling so far."""
        self._bundle = bundle
        self._processes = processes
        self._preset = (preset or PRESETS[0]) if self.mesh.size > 1 else SINGLE
        self._report = report or (lambda line: None)
        self._programs: dict[GraphKey, Program] = {}
        self._tracer: Any = None

    def vision(self, patches: int) -> Program:
        """params, patches [n * N, 3, P, P] float32, grid [n * N // merge ** 2, 3] int32 → rows [n * N // merge ** 2,
        D]; N patches on each of n devices."""
        return self._get("vision", patches)

    def prefill(self, batch: int, chunk: int, context: int) -> Program:
        """params, cache, logits, chunk → cache, logits; cache and logits are donated."""
        return self._get("prefill", batch, chunk, context)

    def decode(self, batch: int, context: int) -> Program:
        """params, cache, logits, state, steps → cache, logits, state, tokens, finite; donated likewise."""
        return self._get("decode", batch, context)

    def explain(self, batch: int, chunk: int, context: int) -> Program:
        """params, cache, produced tokens → cache, counts [B, C, S] uint8; the cache is donated."""
        return self._get("explain", batch, chunk, context)

    def chunk(self, batch: int, context: int, prompt_tokens: int) -> int:
        """Chunk length for a prompt's prefill; one that the bundle has a graph for, where it suits the prompt."""
        here = [k for k in self._bundle.graphs if k == self._key("prefill", *k.shape)]
        exported = [k.shape[1] for k in here if (k.shape[0], k.shape[2]) == (batch, context)]
        size = buckets.chunk(prompt_tokens, exported, buckets.chunks(self.platform, self.plain))
        # The bundles of several processes may be copies with other graphs.
        return int(self._processes.shared(str(size).encode))

    def param_shardings(self) -> dict[str, Any]:
        """Where weights lie: a tree of the bundle's parameters. Any of the graphs says it."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        shapes = self._bundle.abstract_params()
        places = {name: jax.tree.map(lambda _: whole, tree) for name, tree in shapes.items()}
        if self.mesh.size > 1:
            known = [k for k in self._bundle.graphs if k == self._key("decode", *k.shape)]
            key = min(known, default=self._key("decode", 1, buckets.context(1, buckets.CONTEXTS[0], self.mesh.size)))
            places["text"] = self._places(self._load(key))[0]
        return places

    def _places(self, exported: Exported) -> tuple[Any, ...]:
        """The shardings of a graph's arguments, as trees like theirs."""
        if self.mesh.size == 1:
            return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), graphs.arguments(exported))
        return jax.tree.unflatten(exported.in_tree, exported.in_shardings_jax(self.mesh))[0]

    def _key(self, program: str, *shape: int) -> GraphKey:
        return GraphKey(program, self.platform, self.mesh.size, shape, self.plain, self._preset)

    def _get(self, program: str, *shape: int) -> Program:
        key = self._key(program, *shape)
        if key not in self._programs:
            begin = time.perf_counter()
            self._programs[key] = self._compile(key, self._load(key))
            # Devices that begin give up on those of a process that compiles much longer, having none of it cached.
            self._processes.wait()
            self.compile_s += time.perf_counter() - begin
        return self._programs[key]

    def _load(self, key: GraphKey) -> Exported:
        if self._processes.count == 1:
            return self._own(key)
        # One program for all, also where their bundles are copies that differ in graphs; and one of them writes.
        return export.deserialize(bytearray(self._processes.shared(lambda: bytes(self._own(key).serialize()))))

    def _own(self, key: GraphKey) -> Exported:
        """A graph of the bundle, or a new one."""
        entry = self._bundle.graphs.get(key)
        if entry is not None and entry.suits(self._chip):
            return graphs.load(self._bundle.path, entry)
        self._report(f"exporting {key.name}, which the bundle lacks{'' if entry is None else ' for this chip'}")
        exported = self._export(key)
        try:
            self._bundle.add_graph(key, exported, device_kind=self._chip)
        except OSError as error:
            self._report(f"keeping {key.name} for this run only: the bundle cannot be written ({error.strerror})")
        return exported

    def _export(self, key: GraphKey) -> Exported:
        if self._tracer is None:
            try:
                from runtime.trace import Tracer
            except ImportError as error:
                raise InputError(
                    f"the bundle has no graph {key.name}, and exporting it needs the package {error.name!r}; "
                    f"where that is installed, run: {key.export_command(self._bundle.path)}"
                ) from None
            try:
                self._tracer = Tracer.of(self._bundle)
            except InputError as error:
                raise InputError(f"the bundle lacks graph {key.name} and none can be made for it: {error}") from None
        return self._tracer.export(key, self.mesh.abstract_mesh.abstract_device)

    def _compile(self, key: GraphKey, exported: Exported) -> Program:
        args = graphs.arguments(exported)
        mend = f"make it again: {key.export_command(self._bundle.path)}"
        _check_params(key, args[0], self._bundle.abstract_params(), mend)
        kernels = tuple(graphs.kernels(exported))
        if any(name.startswith("mosaic_gpu") for name in kernels):
            # Registers the library that these calls look up when they are compiled.
            import_module("jax.experimental.mosaic.gpu")
        self._report(f"compiling {key.name}")
        places = self._places(exported)
        program = jax.jit(exported.call, in_shardings=places, donate_argnums=DONATED[key.program])
        try:
            compiled = program.lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0][:300]
            kind = DoesNotFit if reason.startswith("RESOURCE_EXHAUSTED") else InputError
            raise kind(f"graph {key.name} does not compile here ({reason}); {mend}") from None
        return Program(key, args, compiled, memory(compiled), kernels, places)


def choose_devices(count: int | None) -> list[Any]:
    """The `jax.Device`s that a model is spread over: `count` of them, or all of all processes, or the one CPU of one.

    Raises:
        InputError: there are not so many, or a process would have none.
    """
    devices = jax.devices()
    if count is None:
        return devices[:1] if jax.default_backend() == "cpu" and jax.process_count() == 1 else devices
    if not 1 <= count <= len(devices):
        owner = "this machine" if jax.process_count() == 1 else f"all {jax.process_count()} processes"
        raise InputError(f"--devices {count} must be from 1 to {len(devices)}, the devices of {owner}")
    idle = set(range(jax.process_count())) - {device.process_index for device in devices[:count]}
    if idle:
        raise InputError(
            f"--devices {count} leaves process {min(idle)} without one; use more, or start fewer processes"
        )
    return devices[:count]


def local_platform() -> str:
    """The default backend by the name that jax.export knows it by."""
    backend = jax.default_backend()
    return {"gpu": "cuda"}.get(backend, backend)


def _check_params(key: GraphKey, wanted: Any, stored: Mapping[str, Any], mend: str) -> None:
    """The weights that the graph was traced for must be those of the bundle."""
    subtree = stored["text"] if key.program != "vision" else {n: stored[n] for n in ("vision", "projector")}
    mine = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(subtree)}
    theirs = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            raise InputError(f"graph {key.name} was made for other weights ({name} differs from the bundle's); {mend}")
