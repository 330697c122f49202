"""The full-size model on one GPU and on several of one host, with random weights.

    python -m benchmarks.gpu_mesh --out benchmarks/results/gpu-mesh.json

The programs are those that the runtime exports, one set for each number of devices and preset. Small models are checked
first: golden tokens in float32, logits in bfloat16, the same bits twice. Then prefill and decode are timed and compared
with one device. The result is written after every figure. A figure in which the process dies or hangs is named, and the
others go on in a new process. `--config tiny` tries all of it on a CPU of two virtual devices
(XLA_FLAGS=--xla_force_host_platform_device_count=2).
"""

import argparse
import datetime
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import options
from benchmarks.gpu.__main__ import commit, environment
from benchmarks.gpu.record import Record

STUCK = 60.0
"""Seconds; a figure that takes longer hangs."""

LOST = 70
"""Exit code of a process whose devices no longer answer."""

_SIZES: dict[str, dict[str, Any]] = {
    "30b": {"contexts": [32768, 131072], "decode": [8192, 131072], "chunk": 8192, "tokens": 1024, "large": 1 << 30},
    "tiny": {"contexts": [256, 512], "decode": [512], "chunk": 128, "tokens": 256, "large": 1 << 20},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a check failed or a figure is missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parse(argv)
    return _supervise(args, argv) if args.worker is None else _work(args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_mesh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--config", choices=tuple(_SIZES), default="30b", help="tiny: to try the benchmark on a CPU")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--presets", nargs="+", choices=("context", "expert"), default=["context", "expert"], help="default: both"
    )
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help="tokens to prefill")
    parser.add_argument("--decode", type=int, nargs="+", metavar="N", help="contexts to decode at")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="timed prefills of a prompt (default 2)")
    parser.add_argument("--seconds", type=float, default=255, help="what does not fit into this is left out")
    parser.add_argument("--commit", help="the version that is measured (default: what git says)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    options.complete(parser, args, _SIZES[args.config])
    return args


def _supervise(args: argparse.Namespace, argv: list[str]) -> int:
    """Starts the process that measures, and another one where it dies or hangs."""
    begin = time.monotonic()
    end = begin + args.seconds
    args.out.unlink(missing_ok=True)
    record = Record(args.out, args.seconds)
    record.put(("command",), shlex.join(["python", "-m", "benchmarks.gpu_mesh", *argv]))
    record.put(("date",), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    record.put(("commit",), args.commit or commit())
    code, doing = 1, ""
    with tempfile.TemporaryDirectory() as folder:
        # Compiled programs are kept in there.
        variables = {**environment("mesh"), "XDG_CACHE_HOME": folder}
        while doing is not None and time.monotonic() < end:
            options = ["--worker", folder, "--seconds", f"{end - time.monotonic():.1f}"]
            command = [sys.executable, "-m", "benchmarks.gpu_mesh", *argv, *options]
            code, reason = _watch(command, variables, args.out, end)
            record = Record(args.out, 0)
            doing = record.get("doing")
            if doing is not None:
                record.put(("doing",), None)
                record.put(("failed", doing), record.get("failed", doing) or reason)
                print(f"{doing} FAILED: {reason}", flush=True)
    record.put(("seconds", "all"), round(time.monotonic() - begin, 1))
    print(table(record.data), flush=True)
    return code


def _watch(command: list[str], variables: dict[str, str], out: Path, end: float) -> tuple[int, str]:
    """Runs the command until it ends, hangs or time is over: its exit code, and what to say of an unfinished figure."""
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    reason = "the process ended in it"
    try:
        while process.poll() is None and reason.startswith("the"):
            time.sleep(0.2)
            if time.monotonic() > end:
                reason = "time was over"
            elif Record(out, 0).get("doing") is not None and time.time() - out.stat().st_mtime > STUCK:
                reason = f"hung for {STUCK:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return (1, reason) if code < 0 else (code, f"{reason}, exit code {code}")


def _work(args: argparse.Namespace) -> int:
    """Checks and measures what the result does not hold yet."""
    # Here, because the process that watches needs none of it.
    import jax

    from benchmarks.gpu import mesh_checks, mesh_model
    from benchmarks.gpu.mesh_programs import Programs
    from runtime import compile_cache
    from runtime.graphs import SINGLE
    from runtime.programs import local_platform

    begin, record = time.monotonic(), Record(args.out, args.seconds)
    compile_cache.enable()
    devices = jax.devices()
    record.put(("device",), devices[0].device_kind)
    record.put(("versions",), {"jax": jax.__version__, "python": platform.python_version()})
    counts = [count for count in args.devices if count <= len(devices)]
    for count in set(args.devices) - set(counts):
        record.put(("left_out", f"{count} devices"), f"there are {len(devices)}")
    several = [(preset, count) for count in counts if count > 1 for preset in args.presets]
    layouts = [(SINGLE, 1)] * (1 in counts) + several
    checks = mesh_checks.Checks(several, local_platform(), args.tokens)
    plan = mesh_model.Plan(
        args.config,
        tuple(layouts),
        *(tuple(args.contexts), tuple(args.decode)),
        args.chunk,
        args.repeats,
        local_platform(),
    )
    full = [graph for layout in layouts for graph in plan.graphs(layout).values()]
    programs = Programs(args.worker)
    programs.export([*checks.graphs(), *full])
    checks.load()
    # As in `benchmarks.gpu`: the references are compared as they are written.
    programs.compile(checks.graphs(), xla_allow_excess_precision=False)
    programs.wait(args.seconds / 2)
    _say(record, begin, "checks compiled")
    _measure(checks.run(programs), record)
    _say(record, begin, "checks")
    # Not before: compiling tries kernels out on a device, while others may wait there for one another.
    programs.compile(full)
    programs.close()
    measured = mesh_model.FullSize(plan, programs, args.worker)
    programs.wait(args.seconds / 2)
    _say(record, begin, "checks, trace, compile, weights")
    _measure(measured.items(), record)
    _measure(_links(sorted({count for _, count in several}), args.large), record)
    gaps = [record.get(name) for name in ("failed", "left_out")]
    wrong = [row for rows in (record.get("checks") or {}).values() for row in rows.values() if not row["passed"]]
    return 1 if any(gaps) or wrong else 0


def _links(counts: list[int], large: int) -> Iterator[tuple[tuple[object, ...], Callable[[], Any]]]:
    from benchmarks.gpu.mesh_model import links

    for count in counts:
        yield ("all_reduce", count), lambda count=count: links(count, large)


def _say(record: Record, begin: float, what: str) -> None:
    record.put(("seconds", what), round(time.monotonic() - begin, 1))
    print(f"{time.monotonic() - begin:6.1f} s  {what}", flush=True)


def _measure(items: Iterator[tuple[tuple[object, ...], Callable[[], Any]]], record: Record) -> None:
    """Puts what the result does not hold. It says what is being done, for whoever begins again."""
    for keys, find in items:
        name = ".".join(map(str, keys))
        if record.get(*keys) is not None or record.get("failed", name):
            continue
        record.put(("doing",), name)
        begin, failures = time.monotonic(), record.failures
        value = record.attempt(keys, 5, find)
        if record.failures > failures and not _devices_answer():
            os._exit(LOST)
        record.put(("doing",), None)
        print(f"{time.monotonic() - begin:6.1f} s  {name}: {value}", flush=True)


def _devices_answer() -> bool:
    """Whether something can still be computed, which after some failures cannot."""
    import jax

    try:
        return all(int(jax.device_put(1, device) + 1) == 2 for device in jax.devices())
    except Exception:  # whatever a broken device raises
        return False


def table(data: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"\n{data.get('device')}, commit {data.get('commit')}"]
    for check, rows in data.get("checks", {}).items():
        for name, row in rows.items():
            verdict = "ok" if row["passed"] else "WRONG"
            path = ", ".join(row["kernels"]) or "no kernels of ours"
            lines.append(f"{check}, {name}: error {row['error']:.2g} of {row['bound']:.2g}, {verdict} ({path})")
    for title, field, unit in (("prefill", "seconds", "s"), ("decode", "ms", "ms")):
        for context, rows in data.get(title, {}).items():
            for name, row in rows.items():
                speed = f"{rows['1'][field] / row[field]:8.2f} x" if "1" in rows else ""
                lines.append(f"{title} {int(context):>8,} on {name:<10}{row[field]:>10.4g} {unit}{speed}")
    lines += [f"{name}: {row}" for name, row in data.get("programs", {}).items()]
    for title in ("peak_gib", "all_reduce", "left_out", "failed"):
        lines += [f"{title.replace('_', ' ')}: {name}: {value}" for name, value in data.get(title, {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
