"""8-bit weights on one GPU beside bfloat16 ones: the full-size model with random weights.

    python -m benchmarks.gpu_weights --out benchmarks/results/gpu-weights.json

Kernels that read 8-bit weights are checked against their references at the model's sizes, and a small model against
float32; then prefill and decode are timed, format after format. The result is written after every figure. `--config
tiny` tries all of it on a CPU.
"""

import argparse
import datetime
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import options
from benchmarks.gpu.__main__ import commit
from benchmarks.gpu.cases import TINY_SIZES, Sizes
from benchmarks.gpu.cases_weights import weight_cases
from benchmarks.gpu.check import check
from benchmarks.gpu.checks import Checks, Outcome, attempt
from benchmarks.gpu.decode import time_decode
from benchmarks.gpu.model import (
    CONFIGS,
    GIB,
    Compiler,
    Model,
    abstract,
    chunks,
    empty_cache,
    lower_decode,
    lower_prefill,
    peak_bytes,
    random_model,
)
from benchmarks.gpu.prefill import time_prompt
from benchmarks.gpu.record import Record
from benchmarks.gpu.whole import Rounded
from keye_jax import KeyeConfig, graphs
from keye_jax.params import WeightFormat

NAMES: dict[WeightFormat, str] = {"none": "bfloat16", "int8": "int8", "fp8": "fp8"}

_SIZES: dict[str, dict[str, Any]] = {
    "30b": {"contexts": [32768, 131072], "decode": [8192, 131072], "chunk": 8192, "tokens": 1024},
    "tiny": {"contexts": [256], "decode": [256], "chunk": 128, "tokens": 256},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a check failed or a figure is missing."""
    begin, argv = time.monotonic(), list(sys.argv[1:] if argv is None else argv)
    args = _parse(argv)
    args.out.unlink(missing_ok=True)
    record = Record(args.out, args.seconds)
    record.put(("command",), shlex.join(["python", "-m", "benchmarks.gpu_weights", *argv]))
    record.put(("date",), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    record.put(("commit",), args.commit or commit())
    record.put(("device",), jax.devices()[0].device_kind)
    record.put(("versions",), {"jax": jax.__version__, "python": platform.python_version()})
    config, compiler = CONFIGS[args.config], Compiler()
    eight = [weights for weights in args.formats if weights != "none"]
    _add(config, args, compiler)
    sizes = TINY_SIZES if args.config == "tiny" else Sizes()
    # As in `benchmarks.gpu`: the references are compared as they are written.
    exact = {"xla_allow_excess_precision": False}
    cases = Checks([case for weights in eight for case in weight_cases(config, sizes, weights)], compiler, **exact)
    small = {f"bfloat16 model {weights}": Rounded(compiler, args.tokens, weights, **exact) for weights in eight}
    compiler.wait(args.seconds / 2)
    record.put(("seconds", "trace, compile"), round(time.monotonic() - begin, 1))
    passed = check(_outcomes(cases, small), record)
    for weights in args.formats:
        model = random_model(config, weights=weights)
        jax.block_until_ready(model.params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        record.put(("weights_gib", NAMES[weights]), round(size / GIB, 2))
        _measure(model, weights, args, compiler, record)
        jax.tree.map(lambda leaf: leaf.delete(), model.params)
    record.put(("seconds", "all"), round(time.monotonic() - begin, 1))
    print(table(record.data), flush=True)
    return 0 if passed and not (record.failures or compiler.failed or record.get("left_out")) else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--config", choices=tuple(_SIZES), default="30b", help="tiny: to try the benchmark on a CPU")
    parser.add_argument("--formats", nargs="+", choices=tuple(NAMES), default=list(NAMES), help="default: all")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="tokens to prefill")
    parser.add_argument("--decode", type=int, nargs="+", metavar="N", help="contexts to decode at")
    parser.add_argument("--seconds", type=float, default=240, help="what does not fit into this is left out")
    parser.add_argument("--commit", help="the version that is measured (default: what git says)")
    args = parser.parse_args(argv)
    options.complete(parser, args, _SIZES[args.config])
    return args


def _add(config: KeyeConfig, args: argparse.Namespace, compiler: Compiler) -> None:
    for weights in args.formats:
        for context in args.contexts:
            part = abstract(jax.eval_shape(lambda n=context: chunks(config, n, min(args.chunk, n))[0]))
            lower = partial(lower_prefill, graphs.prefill, config, context, part, weights)
            compiler.add(("prefill", weights, context), lower)
        for context in args.decode:
            lower = partial(lower_decode, graphs.decode, config, context, 1, weights)
            compiler.add(("decode", weights, context), lower)


def _outcomes(cases: Checks, small: dict[str, Rounded]) -> Iterator[tuple[str, Outcome]]:
    yield from cases.run()
    for name, model in small.items():
        yield name, attempt(name, model.outcome)


def _measure(model: Model, weights: WeightFormat, args: argparse.Namespace, compiler: Compiler, record: Record) -> None:
    """Fills decode_ms and prefill_s, [context][format], and compiled_gib."""
    for context in args.decode:
        if program := compiler.get(("decode", weights, context)):
            run = partial(time_decode, model, program, 1, context)
            record.attempt(("decode_ms", context, NAMES[weights]), 5, run)
    for context in args.contexts:
        if program := compiler.get(("prefill", weights, context)):
            run = partial(_time_prefill, model, program, context, args.chunk)
            record.attempt(("prefill_s", context, NAMES[weights]), 10, run)
            record.put(("compiled_gib", context, NAMES[weights]), round(peak_bytes(program) / GIB, 2))


def _time_prefill(model: Model, program: Any, context: int, chunk: int) -> float:
    """Seconds of the whole prompt, warm."""
    parts = chunks(model.config, context, min(chunk, context))
    logits = jnp.zeros((1, model.config.text.vocab_size), jnp.float32)
    for some in (parts[:1], parts):
        carried = empty_cache(model.config, 1, context), logits + 0
        seconds, _ = time_prompt(program, model.text, carried, some)
    return round(seconds, 4)


def table(data: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"\n{data.get('device')}, commit {data.get('commit')}"]
    for title, field, unit in (("prefill", "prefill_s", "s"), ("decode", "decode_ms", "ms")):
        for context, row in data.get(field, {}).items():
            for name, value in row.items():
                speed = f"{row['bfloat16'] / value:8.2f} x" if "bfloat16" in row else ""
                lines.append(f"{title} {int(context):>8,} {name:<9}{value:>10.4g} {unit}{speed}")
    for title in ("weights_gib", "compiled_gib", "left_out", "failed"):
        lines += [f"{title.replace('_', ' ')}: {name}: {value}" for name, value in data.get(title, {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
