"""`python -m benchmarks.gpu.measure`: the part of the benchmark that runs our own programs. `benchmarks.gpu` starts it
in a process of its own, so that the peer finds the device's memory free. Exit code 1 if a check fails."""

import argparse
import dataclasses
import math
import platform
import sys
import time
from collections.abc import Sequence

import jax

from benchmarks.gpu import (
    cases,
    cases_products,
    checks,
    decode,
    options,
    prefill,
    profile,
    rates,
    stages,
    vision,
    whole,
)
from benchmarks.gpu.floors import Rates
from benchmarks.gpu.model import CONFIGS, GIB, Compiler, Model, random_model
from benchmarks.gpu.record import Record
from keye_jax.config import KeyeConfig


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

    @property
    def config(self) -> KeyeConfig:
        return CONFIGS[self.args.config]

    @property
    def tiny(self) -> bool:
        return self.args.config == "tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = options.parse("python -m benchmarks.gpu.measure", __doc__, argv)
    record, tiny, device = Record(args.out, args.seconds), args.config == "tiny", jax.devices()[0].device_kind
    record.put(("device",), device)
    record.put(("platform",), jax.default_backend())
    record.put(("versions",), {"jax": jax.__version__, "python": platform.python_version()})
    rate = rates.measure(1 << 20, 256) if tiny else rates.measure(1 << 32, 8192)
    record.put(("rates",), {"tflops": round(rate.flops / 1e12, 1), "tb_per_s": round(rate.bytes / 1e12, 3)})
    print(f"{device}: {rate.flops / 1e12:.0f} TFLOP/s in bfloat16, {rate.bytes / 1e12:.2f} TB/s", flush=True)
    run = Run(
        args,
        record,
        rate,
        prefill.Plan(tuple(args.contexts), args.chunk, args.repeats),
        decode.Plan(tuple(args.decode)),
        vision.Plan(args.frames, args.frames_per_call, side=4 if tiny else 16),
        stages.Plan(args.chunk, tuple(args.stage_contexts), tuple(args.decode)),
    )
    compiler, checking = Compiler(), None
    begin = time.perf_counter()
    if "checks" in args.sections:
        sizes = cases.TINY_SIZES if tiny else cases.Sizes()
        found = cases.all_cases(run.config, sizes) + cases_products.product_cases(run.config, sizes)
        checking = checks.Checks(found, compiler), whole.Whole(compiler, tokens=256 if tiny else 1024)
    _add_programs(run, compiler)
    record.put(("seconds", "trace"), round(time.perf_counter() - begin, 1))
    if checking and not _check(run, checking):
        return 1
    if args.sections & {name for name, _ in _SECTIONS}:
        _time(run, compiler)
    return 1 if record.failures or compiler.failed else 0


def _add_programs(run: Run, compiler: Compiler) -> None:
    wanted = run.args.sections
    if wanted & {"prefill", "profile"}:
        prefill.add(run.config, run.prefill, compiler)
    if wanted & {"decode", "profile"}:
        decode.add(run.config, run.decode, compiler)
    if "vision" in wanted:
        vision.add(run.config, run.vision, compiler)
    if "stages" in wanted:
        stages.add(run.config, run.stages, compiler)


def _check(run: Run, checking: tuple[checks.Checks, whole.Whole]) -> bool:
    """Whether every kernel and the whole model give what they should."""
    passed, begin = True, time.perf_counter()
    for part in checking:
        for name, outcome in part.run():
            row = {**dataclasses.asdict(outcome), "error": outcome.error if math.isfinite(outcome.error) else None}
            run.record.put(("checks", name), row)
            passed &= outcome.passed
            verdict = "ok" if outcome.passed else "WRONG"
            path = "kernel" if outcome.custom_kernel else "XLA"
            repeats = "" if outcome.repeats else ", a repeated run differs"
            line = f"check {name:<44} {path:<7} error {outcome.error:.2g} of {outcome.bound:.2g}{repeats}: {verdict}"
            print(line, flush=True)
    run.record.put(("checks_passed",), passed)
    run.record.put(("seconds", "checks"), round(time.perf_counter() - begin, 1))
    return passed


def _time(run: Run, compiler: Compiler) -> None:
    """Waits until everything is compiled, then runs one section after the other."""
    begin = time.perf_counter()
    model = random_model(run.config)
    jax.block_until_ready(model.params)
    run.record.put(("seconds", "weights"), round(time.perf_counter() - begin, 1))
    compiler.wait()
    run.record.put(("seconds", "weights and compile"), round(time.perf_counter() - begin, 1))
    run.record.put(("failed_to_compile",), compiler.failed)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / GIB
    print(f"{size:.1f} GiB of random weights; all compiled after {time.perf_counter() - begin:.0f} s more", flush=True)
    for name, section in _SECTIONS:
        if name in run.args.sections:
            begin = time.perf_counter()
            section(run, model, compiler)
            taken = time.perf_counter() - begin + (run.record.get("seconds", name) or 0)
            run.record.put(("seconds", name), round(taken, 1))


def _prefill(run: Run, model: Model, compiler: Compiler) -> None:
    prefill.measure(model, run.prefill, ("dsa_random", "dsa_local"), run.prefill.contexts, compiler, run.record)
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
    ("stages", _stages),
    ("profile", _profile),
    ("prefill", _prefill_longest),
)


if __name__ == "__main__":
    sys.exit(main())
