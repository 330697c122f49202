"""`python -m benchmarks.gpu.measure`: the part of the benchmark that times our own programs. `benchmarks.gpu` starts it
in a process of its own, so that the peer finds the device's memory free."""

import argparse
import dataclasses
import platform
import sys
import time
from collections.abc import Sequence

import jax

from benchmarks.gpu import (
    decode,
    options,
    prefill,
    profile,
    rates,
    stages,
    vision,
)
from benchmarks.gpu.floors import Rates
from benchmarks.gpu.model import CONFIGS, Compiler, Model, random_model
from benchmarks.gpu.record import Record


@dataclasses.dataclass
class Run:
    """What the sections share."""

    args: argparse.Namespace
    record: Record
    rates: Rates
    prefill: prefill.Plan
    decode: decode.Plan
    vision: vision.Plan
    stages: stages.Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a program did not compile or gave no finite result."""
    begin = time.monotonic()
    args = options.parse("python -m benchmarks.gpu.measure", __doc__, argv)
    tiny, config, compiler = args.config == "tiny", CONFIGS[args.config], Compiler(held=args.hold)
    plans = (
        prefill.Plan(tuple(args.contexts), args.chunk, args.repeats),
        decode.Plan(tuple(args.decode)),
        vision.Plan(args.frames, args.frames_per_call, side=4 if tiny else 16),
        stages.Plan(args.chunk, tuple(args.stage_contexts), tuple(args.decode[1:2] or args.decode)),
    )
    for name, module, plan in zip(("prefill", "decode", "vision", "stages"), _MODULES, plans, strict=True):
        if name in args.sections or ("profile" in args.sections and name in ("prefill", "decode")):
            module.add(config, plan, compiler)
    traced = time.monotonic() - begin
    if args.hold and not sys.stdin.readline():
        return 1
    compiler.release()
    model = random_model(config)
    jax.block_until_ready(model.params)
    compiler.wait()
    if args.hold and not sys.stdin.readline():
        return 1
    record = Record(args.out, args.seconds - (time.monotonic() - begin))
    record.put(("seconds", "trace"), round(traced, 1))
    record.put(("seconds", "trace, compile, weights, checks"), round(time.monotonic() - begin, 1))
    record.put(("failed_to_compile",), list(compiler.failed))
    _sections(Run(args, record, _rates(record, tiny), *plans), model, compiler)
    return 1 if record.failures or compiler.failed else 0


_MODULES = (prefill, decode, vision, stages)


def _rates(record: Record, tiny: bool) -> Rates:
    device = jax.devices()[0].device_kind
    record.put(("device",), device)
    record.put(("platform",), jax.default_backend())
    record.put(("versions",), {"jax": jax.__version__, "python": platform.python_version()})
    rate = rates.measure(1 << 20, 256) if tiny else rates.measure(1 << 32, 8192)
    record.put(("rates",), {"tflops": round(rate.flops / 1e12, 1), "tb_per_s": round(rate.bytes / 1e12, 3)})
    print(f"{device}: {rate.flops / 1e12:.0f} TFLOP/s in bfloat16, {rate.bytes / 1e12:.2f} TB/s", flush=True)
    return rate


def _sections(run: Run, model: Model, compiler: Compiler) -> None:
    for name, section in _SECTIONS:
        if name in run.args.sections:
            begin = time.perf_counter()
            section(run, model, compiler)
            taken = time.perf_counter() - begin + (run.record.get("seconds", name) or 0)
            run.record.put(("seconds", name), round(taken, 1))


def _prefill(run: Run, model: Model, compiler: Compiler) -> None:
    prefill.measure(model, run.prefill, ("dsa_random",), run.prefill.contexts, compiler, run.record)


def _prefill_compared(run: Run, model: Model, compiler: Compiler) -> None:
    prefill.measure(model, run.prefill, ("dsa_local",), run.prefill.contexts, compiler, run.record)
    shorter = [context for context in run.prefill.contexts if context < prefill.LONG]
    prefill.measure(model, run.prefill, ("dense",), shorter, compiler, run.record)


def _prefill_longest(run: Run, model: Model, compiler: Compiler) -> None:
    """Takes as long as all the rest, and nothing is compared with it."""
    longer = [context for context in run.prefill.contexts if context >= prefill.LONG]
    prefill.measure(model, run.prefill, ("dense",), longer, compiler, run.record)


def _decode(run: Run, model: Model, compiler: Compiler) -> None:
    decode.measure(model, run.decode, compiler, run.record)


def _vision(run: Run, model: Model, compiler: Compiler) -> None:
    vision.measure(model, run.vision, compiler, run.record)


def _stages(run: Run, model: Model, compiler: Compiler) -> None:
    stages.measure(model, run.stages, compiler, run.rates, run.record)


def _profile(run: Run, model: Model, compiler: Compiler) -> None:
    profile.measure(model, run.prefill, run.decode, compiler, run.record)


_SECTIONS = (
    ("prefill", _prefill),
    ("decode", _decode),
    ("vision", _vision),
    ("prefill", _prefill_compared),
    ("stages", _stages),
    ("profile", _profile),
    ("prefill", _prefill_longest),
)


if __name__ == "__main__":
    sys.exit(main())
