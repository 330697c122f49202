"""Compiles serialised graphs for TPU slices that are not here: `python -m benchmarks.tpu_aot [--quick]
[--topology NAME] [--json FILE]`.

The published model (with `--quick` a tiny one too), as bundles without weights, is exported for each topology; every
graph is read back from its file as a runtime would read it, and compiled by libtpu. One table says what each program
takes of a device, another what the model takes as a whole: weights, cache, and the most that any of its programs
needs beside them. A program that does not fit is a row with the compiler's words. Needs `pip install "keye-jax[tpu]"`
and no TPU.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import tpu_host
from benchmarks.published import write_published_config
from runtime import aot

TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1")
CONTEXTS = (262144, 131072, 32768)
WEIGHTS: dict[str, dict[str, Any]] = {"bf16": {}, "int8": {"weights": "int8"}}
"""Formats of the weights → options of `convert`."""
_PATCHES, _CHUNK, _TINY_CONTEXT = 8192, 512, 8192
_MIB, _GIB = 1 << 20, 1 << 30
Shape = tuple[str, tuple[int, ...]]
"""A program and its sizes; see `runtime.graphs.SHAPE_NAMES`."""


@dataclass(frozen=True)
class Row:
    """One program on one topology; sizes are bytes on each device, None where it did not compile."""

    model: str
    weights: str
    topology: str
    context: int | None
    """None for vision, which has none."""
    graph: str
    graph_bytes: int
    seconds: float
    weight_bytes: int
    """Of the program's own weights: the vision tower's or the decoder's."""
    cache_bytes: int
    device_bytes: int
    """That a device has for programs."""
    arguments: int | None = None
    results: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    collectives: dict[str, int] | None = None
    largest_collective: int | None = None
    """Bytes of the largest operand or result of one."""
    error: str | None = None

    @property
    def working(self) -> int:
        """Bytes beside weights and cache."""
        sizes = [size or 0 for size in (self.arguments, self.results, self.aliased, self.temporaries)]
        return aot.Memory(*sizes).beside(self.weight_bytes + self.cache_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_aot", description="Compile exported graphs for TPU slices that are not here."
    )
    parser.add_argument("--topology", metavar="NAME", help=f"only this one (default: {', '.join(TOPOLOGIES)})")
    parser.add_argument("--quick", action="store_true", help="v5e:2x4 only, and a tiny model as well; all must fit")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    args = parser.parse_args()
    libtpu = tpu_host.prepare()
    if libtpu is None:
        return 2
    rows = []
    print(_HEADER)
    with tempfile.TemporaryDirectory() as folder:
        topologies = (args.topology,) if args.topology else TOPOLOGIES[:1] if args.quick else TOPOLOGIES
        for row in _rows(Path(folder), topologies, quick=args.quick):
            print(_line(row), flush=True)
            rows.append(row)
            if args.json is not None:
                tpu_host.write_record(args.json, "benchmarks.tpu_aot", libtpu, rows)
    for line in _summary(rows):
        print(line)
    fitting = [row for row in rows if row.error is None]
    print(f"{len(fitting)} of {len(rows)} programs compile")
    # What --quick compiles fits; beyond it, finding out what does not is the purpose.
    return 0 if len(fitting) == len(rows) or (fitting and not args.quick) else 1


def _rows(folder: Path, topologies: tuple[str, ...], *, quick: bool) -> Iterator[Row]:
    from convert.convert import convert
    from examples.tiny_checkpoint import tiny_config

    published = write_published_config(folder / "published")
    formats = WEIGHTS if not quick else {"bf16": WEIGHTS["bf16"]}
    bundles = {
        weights: convert(published, folder / f"published-{weights}", shapes_only=True, **options).path
        for weights, options in formats.items()
    }
    for topology in topologies:
        # The vision tower's weights are in one format only.
        yield from _compile("published", "bf16", bundles["bf16"], topology, [("vision", (_PATCHES,))])
        for context in CONTEXTS[:1] if quick else CONTEXTS:
            for weights, path in bundles.items():
                yield from _compile("published", weights, path, topology, _texts(context))
    if quick:
        tiny = folder / "tiny"
        tiny.mkdir()
        (tiny / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
        bundle = convert(tiny, folder / "tiny-bundle", shapes_only=True)
        for topology in topologies:
            shapes = [("vision", (_PATCHES,)), *_texts(_TINY_CONTEXT)]
            yield from _compile("tiny", "bf16", bundle.path, topology, shapes)


def _texts(context: int) -> list[Shape]:
    return [("prefill", (1, _CHUNK, context)), ("decode", (1, context))]


def _compile(model: str, weights: str, path: Path, topology: str, shapes: Sequence[Shape]) -> Iterator[Row]:
    from runtime import graphs
    from runtime.bundle import Bundle
    from runtime.errors import InputError
    from runtime.trace import Tracer

    bundle = Bundle.open(path)
    tracer = Tracer.of(bundle)
    chip, devices = aot.split_topology(topology)
    for program, shape in shapes:
        key = graphs.GraphKey(program, "tpu", devices, shape, preset=graphs.PRESETS[0])
        entry = bundle.add_graph(key, tracer.export(key, chip.abstract_device()), device_kind=chip.kind)
        exported = graphs.load(path, entry)
        sizes = aot.argument_bytes(exported)
        begin = time.perf_counter()
        measured: dict[str, Any]
        try:
            compiled = aot.compile_for_topology(key, exported, topology)
            measured = {
                **asdict(compiled.memory),
                "collectives": dict(Counter(one.kind for one in compiled.collectives)),
                "largest_collective": max((one.bytes for one in compiled.collectives), default=0),
            }
        except InputError as error:
            measured = {"error": str(error)}
        yield Row(
            model=model,
            weights=weights,
            topology=topology,
            context=None if program == "vision" else shape[-1],
            graph=key.name,
            graph_bytes=entry.bytes,
            seconds=round(time.perf_counter() - begin, 1),
            weight_bytes=sizes[0],
            cache_bytes=0 if program == "vision" else sizes[1],
            device_bytes=chip.memory,
            **measured,
        )


_HEADER = (
    f"{'model':<10}{'weights':<8}{'topology':<13}{'graph':<52}{'arguments':>10}{'results':>9}{'aliased':>9}{'temp':>9}"
    f"{'compile':>9}  collectives (MiB on each device)"
)


def _line(row: Row) -> str:
    start = f"{row.model:<10}{row.weights:<8}{row.topology:<13}{row.graph:<52}"
    if row.error is not None:
        return f"{start}{row.seconds:>46.1f} s  does not fit or compile: {row.error}"
    sizes = (row.arguments, row.results, row.aliased, row.temporaries)
    columns = "".join(f"{(size or 0) / _MIB:>{10 if n == 0 else 9},.1f}" for n, size in enumerate(sizes))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted((row.collectives or {}).items()))
    largest = f", the largest {(row.largest_collective or 0) / _MIB:.2f}" if kinds else ""
    return f"{start}{columns}{row.seconds:>7.1f} s  {kinds or 'none'}{largest}"


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    """The models as wholes: vision's and the decoder's weights stay on the device while either runs."""
    yield ""
    yield (
        f"{'model':<10}{'weights':<8}{'topology':<13}{'context':>9}{'weights':>10}{'cache':>8}{'working':>9}{'total':>8}"
        f"{'device':>8}  (GiB on each device)"
    )
    towers = {(row.model, row.topology): row for row in rows if row.context is None}
    texts = [row for row in rows if row.context is not None]
    for (model, weights, topology, context), pair in groupby(
        texts, lambda row: (row.model, row.weights, row.topology, row.context)
    ):
        parts = [towers[model, topology], *pair]
        held = parts[0].weight_bytes + parts[-1].weight_bytes
        sizes = held, parts[-1].cache_bytes, max(row.working for row in parts)
        device = parts[0].device_bytes
        fits = all(row.error is None for row in parts) and sum(sizes) <= device
        columns = "".join(f"{size / _GIB:>8.2f}" for size in (*sizes, sum(sizes), device))
        start = f"{model:<10}{weights:<8}{topology:<13}{context:>9,}"
        yield f"{start}  {columns}  {'fits' if fits else 'does not fit'}"


if __name__ == "__main__":
    sys.exit(main())
