"""Programs over several devices: exported as the runtime exports them, in processes of their own, for tracing takes a
core each; read back from their files and compiled side by side; and what is in them."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu.model import Compiler
from runtime import aot
from runtime.graphs import DONATED, GraphKey, arguments, kernels
from runtime.programs import Program
from runtime.trace import Tracer

_KERNEL = re.compile(
    r'custom_call_target="(?:mosaic_gpu_v2|__gpu\$xla\.gpu\.triton)".*?op_name="[^"]*?(\w+)/(?:pallas_call|mpmd_map)"'
)


@dataclass(frozen=True)
class Graph:
    """A graph of a model.

    Attributes:
        model: content of config.json.
        dtype: of weights and activations.
        indexer: format of the index keys.
    """

    model: str
    dtype: str
    indexer: Any
    key: GraphKey

    def __str__(self) -> str:
        return f"{self.key.name} {self.dtype} {self.indexer}"

    @property
    def file(self) -> str:
        """A name for it."""
        return f"{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}.stablehlo"


def export_graph(graph: Graph, folder: Path) -> Path:
    """Writes the serialised graph unless it is there; returns where."""
    path = folder / graph.file
    if not path.exists():
        exported = Tracer(json.loads(graph.model), graph.dtype, graph.indexer, "none").export(graph.key)
        new = path.with_suffix(".new")
        new.write_bytes(exported.serialize())
        os.replace(new, path)
    return path


def _without_devices() -> None:
    jax.config.update("jax_platforms", "cpu")


class Programs:
    """What graphs compile to on the first devices here.

    Args:
        folder: for the graphs; those that it holds already are not traced again.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        workers = min(os.cpu_count() or 1, 16)
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_without_devices)
        self._files: dict[Graph, Future[Path]] = {}
        self._rest: dict[Graph, tuple[Any, ...]] = {}
        self._compiler = Compiler()

    def export(self, graphs: Sequence[Graph]) -> None:
        """Begins to export graphs, in their order."""
        for graph in graphs:
            if graph not in self._files:
                self._files[graph] = self._pool.submit(export_graph, graph, self._folder)

    def compile(self, graphs: Sequence[Graph], **options: Any) -> None:
        """Begins to compile graphs, each when it is exported; returns when the last one has begun.

        Args:
            options: XLA's.
        """
        waiting = {self._files[graph]: graph for graph in graphs}
        for file in as_completed(waiting):
            self._compiler.add(waiting[file], partial(self._lower, waiting[file], file), **options)

    def get(self, graph: Graph) -> Program:
        """Waits for a program.

        Raises:
            RuntimeError: it cannot be exported or does not compile; the message says why.
        """
        compiled = self._compiler.get(graph)
        if compiled is None:
            raise RuntimeError(f"{graph}: does not compile: {self._compiler.failed[str(graph)]}")
        args, places, calls = self._rest[graph]
        return Program(graph.key, args, compiled, aot.memory(compiled), calls, places)

    def wait(self, seconds: float) -> None:
        """Until nothing is being compiled, or at most so long."""
        self._compiler.wait(seconds)

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)

    def _lower(self, graph: Graph, file: Future[Path]) -> Any:
        exported = export.deserialize(bytearray(file.result().read_bytes()))
        args, calls = arguments(exported), tuple(kernels(exported))
        mesh = Mesh(np.array(jax.devices()[: graph.key.devices]), ("model",))
        if mesh.size == 1:
            places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
        else:
            places = jax.tree.unflatten(exported.in_tree, exported.in_shardings_jax(mesh))[0]
        if any(name.startswith("mosaic_gpu") for name in calls):
            # Registers the library that these calls look up when they are compiled.
            import_module("jax.experimental.mosaic.gpu")
        self._rest[graph] = args, places, calls
        run = jax.jit(exported.call, in_shardings=places, donate_argnums=DONATED[graph.key.program])
        return run.lower(*args)


def place(program: Program, argument: int, tree: Any) -> Any:
    """An argument's arrays in its dtypes and where the program wants them."""
    cast = jax.tree.map(lambda x, a: x.astype(a.dtype), tree, program.args[argument])
    return jax.device_put(cast, program.shardings[argument])


def kernel_calls(text: str) -> dict[str, int]:
    """Our kernels in the text of a compiled program, and how often each is called there."""
    return dict(sorted(Counter(_KERNEL.findall(text)).items()))


def collectives(text: str, layers: int) -> tuple[dict[str, int], dict[str, int]]:
    """Communication in the text of a compiled program, by kind: for a layer, and beside the layers.

    Args:
        layers: that stand in the text.
    """
    parts = [Counter(one.kind for one in aot.collectives(part)) for part in text.split("\n\n")]
    most = max(parts, key=Counter.total)
    layer = Counter({kind: count // layers for kind, count in most.items()})
    whole = sum(parts, Counter())
    return dict(+layer), dict(whole - Counter({kind: count * layers for kind, count in layer.items()}))
