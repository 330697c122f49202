"""`python -m benchmarks.gpu.check`: kernels and the whole model against their references on this device.

Exit code 1 if something is wrong. `benchmarks.gpu` starts one of these for each part, for tracing takes one core.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu import cases, cases_products, options
from benchmarks.gpu.checks import Checks, Outcome
from benchmarks.gpu.model import CONFIGS, Compiler
from benchmarks.gpu.record import Record
from benchmarks.gpu.whole import Whole

CASES: dict[str, Callable[..., Any]] = {
    "selection": cases.selection_cases,
    "attention": cases.attention_cases,
    "products": cases_products.product_cases,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = options.parse("python -m benchmarks.gpu.check", __doc__, argv)
    tiny, compiler = args.config == "tiny", Compiler(held=args.hold)
    sizes = cases.TINY_SIZES if tiny else cases.Sizes()
    parts: list[Checks | Whole] = []
    for name in args.parts:
        if name == "whole":
            parts.append(Whole(compiler, tokens=256 if tiny else 1024))
        else:
            parts.append(Checks(CASES[name](CONFIGS[args.config], sizes), compiler))
    if args.hold and not sys.stdin.readline():
        return 1
    compiler.release()
    return 0 if check((pair for part in parts for pair in part.run()), Record(args.out, args.seconds)) else 1


def check(outcomes: Iterator[tuple[str, Outcome]], record: Record) -> bool:
    """Fills checks[name] and prints a line for each; whether all passed."""
    passed = True
    for name, outcome in outcomes:
        error = outcome.error if math.isfinite(outcome.error) else None
        record.put(("checks", name), {**dataclasses.asdict(outcome), "error": error})
        passed &= outcome.passed
        path = "kernel" if outcome.custom_kernel else "XLA"
        repeats = "" if outcome.repeats else ", a repeated run differs"
        verdict = "ok" if outcome.passed else "WRONG"
        line = f"check {name:<44} {path:<7} error {outcome.error:.2g} of {outcome.bound:.2g}{repeats}: {verdict}"
        print(line, flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
