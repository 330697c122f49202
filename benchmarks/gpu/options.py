"""The command line of the benchmark; `benchmarks.gpu` hands it on to `benchmarks.gpu.measure` as it is."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = ("selection", "attention", "products", "whole")
SECTIONS = ("checks", "prefill", "decode", "vision", "stages", "profile", "peer")

_FULL = {
    "contexts": [8192, 32768, 65536, 131072, 262144],
    "decode": [(1, 8192), (1, 131072), (1, 262144), (8, 32768), (4, 131072), (2, 262144)],
    "stage_contexts": [131072],
}
_QUICK = {"contexts": [8192, 32768], "decode": [(1, 8192), (1, 131072)], "stage_contexts": [32768]}
_TINY = {"contexts": [256, 512], "decode": [(1, 256), (2, 256)], "stage_contexts": [512]}


def parse(prog: str, description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line. What is not given depends on `--config` and `--quick`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--sections", metavar="A,B", help=f"only these of {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="few and short contexts")
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="tokens to prefill")
    parser.add_argument("--decode", type=_size, nargs="+", metavar="BxN", help="batch and context, such as 1x131072")
    parser.add_argument("--stage-contexts", type=int, nargs="+", metavar="N", help="contexts to time prefill stages at")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens of a prefill chunk (default 8192)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="timed prefills below 256K (default 2)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of video (default 2880, an hour)")
    parser.add_argument("--frames-per-call", type=int, metavar="N", help="of them in a call (default 32)")
    parser.add_argument("--seconds", type=float, default=360, help="what does not fit into this is left out")
    parser.add_argument(
        "--go-on", action="store_true", help="time also what a check found wrong (exit code 1 all the same)"
    )
    parser.add_argument("--config", choices=("30b", "tiny"), default="30b", help="tiny: to try the benchmark on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what benchmarks.gpu.check checks")
    parser.add_argument("--hold", action="store_true", help="trace, and go on when a line comes from standard input")
    parser.add_argument("--commit", help="the version that is measured (default: what git says)")
    args = parser.parse_args(argv)
    tiny = args.config == "tiny"
    sizes = _TINY if tiny else _QUICK if args.quick else _FULL
    complete(parser, args, {**sizes, "chunk": 128 if tiny else 8192, "frames": 4 if tiny else 2880})
    args.contexts = sorted(args.contexts)
    args.frames_per_call = args.frames_per_call or min(32, args.frames)
    args.sections = set(args.sections.split(",")) if args.sections else set(SECTIONS)
    if args.no_peer:
        args.sections -= {"peer"}
    if args.sections - set(SECTIONS):
        parser.error(f"--sections: unknown {', '.join(sorted(args.sections - set(SECTIONS)))}")
    return args


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: Mapping[str, Any]) -> None:
    """Sets what was not given, and ends with an error where contexts are no multiples of a chunk."""
    for name, value in sizes.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if any(context % min(args.chunk, context) for context in args.contexts):
        parser.error(f"--contexts must be multiples of the chunk, {args.chunk}, or shorter than it")


def _size(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    return int(batch), int(context)
