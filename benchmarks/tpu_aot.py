"""Compiles serialised graphs for TPU slices that are not here: `python -m benchmarks.tpu_aot [--quick]
[--topology NAME] [--json FILE]`.

The published model (with `--quick` a tiny one too), as bundles without weights, is exported for each topology; every
graph is read back from its file as a runtime would read it, and compiled by libtpu. The table says what one device
holds of it. A program that does not fit is a row with the compiler's words. Needs `pip install "keye-jax[tpu]"`
and no TPU.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.published import write_published_config

# libtpu asks the metadata server of a cloud machine what it runs on, unless it is told; jax would look for chips.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1")
_PATCHES, _CHUNK = 8192, 512
_CONTEXTS = {"tiny": 8192, "published": 262144}
_MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One program on one topology; sizes are bytes on each device, None where it did not compile."""

    model: str
    topology: str
    graph: str
    graph_bytes: int
    seconds: float
    arguments: int | None = None
    results: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    collectives: dict[str, int] | None = None
    error: str | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_aot", description="Compile exported graphs for TPU slices that are not here."
    )
    parser.add_argument("--topology", metavar="NAME", help=f"only this one (default: {', '.join(TOPOLOGIES)})")
    parser.add_argument("--quick", action="store_true", help="v5e:2x4 only, and a tiny model as well; all must fit")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    args = parser.parse_args()
    try:
        libtpu = version("libtpu")
    except PackageNotFoundError:
        print('error: libtpu is not installed; pip install "keye-jax[tpu]" (make tpu-aot does)', file=sys.stderr)
        return 2
    os.environ.pop("TPU_LIBRARY_PATH", None)
    os.environ.update(NO_TPU_HERE)
    rows = []
    print(_HEADER)
    with tempfile.TemporaryDirectory() as folder:
        topologies = (args.topology,) if args.topology else TOPOLOGIES[:1] if args.quick else TOPOLOGIES
        for row in _rows(Path(folder), topologies, quick=args.quick):
            print(_line(row), flush=True)
            rows.append(row)
            if args.json is not None:
                _write(args.json, rows, libtpu)
    fitting = [row for row in rows if row.error is None]
    print(f"{len(fitting)} of {len(rows)} programs compile")
    # What --quick compiles fits; beyond it, finding out what does not is the purpose.
    return 0 if len(fitting) == len(rows) or (fitting and not args.quick) else 1


def _rows(folder: Path, topologies: tuple[str, ...], *, quick: bool) -> Iterator[Row]:
    from convert.convert import convert
    from examples.tiny_checkpoint import tiny_config

    sources = {"published": write_published_config(folder / "published")}
    if quick:
        tiny = folder / "tiny"
        tiny.mkdir()
        (tiny / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
        sources["tiny"] = tiny
    for model, source in sources.items():
        bundle = convert(source, folder / f"{model}-bundle", shapes_only=True)
        for topology in topologies:
            yield from _compile(model, bundle.path, topology, _CONTEXTS[model])


def _compile(model: str, path: Path, topology: str, context: int) -> Iterator[Row]:
    from runtime import aot, graphs
    from runtime.bundle import Bundle
    from runtime.errors import InputError
    from runtime.export import topology_chip, topology_devices
    from runtime.trace import Tracer

    bundle = Bundle.open(path)
    tracer = Tracer(bundle.config, bundle.dtype, bundle.indexer_dtype)
    shapes: list[tuple[str, tuple[int, ...]]] = [("vision", (_PATCHES,))]
    shapes += [("prefill", (1, _CHUNK, context)), ("decode", (1, context))]
    for program, shape in shapes:
        key = graphs.GraphKey(program, "tpu", topology_devices(topology), shape, preset=graphs.PRESETS[0])
        entry = bundle.add_graph(key, tracer.export(key, topology_chip(topology)), device_kind=topology)
        begin = time.perf_counter()
        measured: dict[str, Any]
        try:
            compiled = aot.compile_for_topology(key, graphs.load(path, entry), topology)
            measured = {**asdict(compiled.memory), "collectives": dict(compiled.collectives)}
        except InputError as error:
            measured = {"error": str(error)}
        seconds = round(time.perf_counter() - begin, 1)
        yield Row(model, topology, key.name, entry.bytes, seconds, **measured)


_HEADER = (
    f"{'model':<10}{'topology':<13}{'graph':<52}{'arguments':>10}{'results':>9}{'aliased':>9}{'temp':>9}"
    f"{'compile':>9}  collectives (MiB on each device)"
)


def _line(row: Row) -> str:
    start = f"{row.model:<10}{row.topology:<13}{row.graph:<52}"
    if row.error is not None:
        return f"{start}{row.seconds:>46.1f} s  does not fit or compile: {row.error}"
    sizes = (row.arguments, row.results, row.aliased, row.temporaries)
    columns = "".join(f"{(size or 0) / _MIB:>{10 if n == 0 else 9},.1f}" for n, size in enumerate(sizes))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted((row.collectives or {}).items()))
    return f"{start}{columns}{row.seconds:>7.1f} s  {kinds or 'none'}"


def _write(path: Path, rows: list[Row], libtpu: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": shlex.join(["python", "-m", "benchmarks.tpu_aot", *sys.argv[1:]]),
        "jax": version("jax"),
        "libtpu": libtpu,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
