"""The full-size model on one GPU, with random weights: checks, times, floors, and a peer beside them.

    python -m benchmarks.gpu --out benchmarks/results/gpu-h200.json

Times the peer, where torch and transformers are importable. Then checks every kernel against its reference at the
model's sizes, and stops if one is wrong (exit code 1). Then times prefill, decode, the vision tower and every stage.
The result is written after every figure. `--config tiny` tries all of it on a CPU in a few minutes.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import options
from benchmarks.gpu.record import Record
from benchmarks.gpu.report import tables

PEER_CONTEXTS = (8192, 32768, 65536, 131072)
PEER_DECODE = ((1, 8192), (1, 131072), (8, 32768))
"""What fits a peer whose attention is dense and whose prefill is one piece."""


CHECK_SECONDS = {"30b": 120, "tiny": 900}
"""After which checks that have not ended have failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    begin = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse("python -m benchmarks.gpu", __doc__, argv)
    args.out.unlink(missing_ok=True)
    record = Record(args.out, args.seconds)
    record.put(("command",), shlex.join(["python", "-m", "benchmarks.gpu", *argv]))
    record.put(("date",), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    record.put(("commit",), args.commit or commit())
    record.put(("config",), args.config)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # Tracing takes a core for a minute and no device: it goes on while the peer is timed.
        outs = [Path(folder) / f"{part}.json" for part in args.parts] if "checks" in args.sections else []
        checkers = [
            stack.enter_context(_held("check", [*argv, "--out", str(out), "--parts", part]))
            for out, part in zip(outs, args.parts, strict=False)
        ]
        ours = args.sections - {"checks", "peer"}
        measure = stack.enter_context(_held("measure", argv)) if ours else None
        if "peer" in args.sections:
            _run_peers(args, record)
        record.put(("seconds", "peer"), round(time.monotonic() - begin, 1))
        for process in [*checkers, measure]:
            _go_on(process)
        limit = time.monotonic() + CHECK_SECONDS[args.config]
        codes = [_exit_code(process, limit) for process in checkers]
        passed = not any(codes)
        for out in outs:
            for name, outcome in Record(out, 0).get("checks").items() if out.exists() else ():
                record.put(("checks", name), outcome)
        if checkers:
            record.put(("checks_passed",), passed)
            record.put(("seconds", "checks"), round(time.monotonic() - begin, 1))
        code = 0 if passed else 1
        if measure is not None and (passed or args.go_on):
            _go_on(measure)
            code = max(code, measure.wait())
    record = Record(args.out, 0)
    record.put(("seconds", "all"), round(time.monotonic() - begin, 1))
    print(tables(record.data), flush=True)
    return code


def _exit_code(process: subprocess.Popen[str], limit: float) -> int:
    """Waits until a time at most: a kernel that hangs is wrong, and takes the rest of the run otherwise."""
    try:
        return process.wait(max(limit - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        print(f"{process.args}: did not end in time", flush=True)
        process.kill()
        return 1


@contextlib.contextmanager
def _held(module: str, argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that traces its programs and then waits for `_go_on`; it ends at the latest with the context."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}", *argv, "--hold"]
    process = subprocess.Popen(command, env=environment(module), stdin=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with process:
            pass


def _go_on(process: subprocess.Popen[str] | None) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has failed and said why
        if process is not None and process.stdin is not None:
            process.stdin.write("\n")
            process.stdin.flush()


def environment(module: str) -> dict[str, str]:
    """Of a process that runs a module of the benchmark."""
    # The allocator grows with the need instead of taking three quarters of the device at once, so that it reports a
    # peak; and it may take nearly all, for the caches of several long rows.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"}
    if module == "check":
        # XLA may leave roundings to bfloat16 out; the references are compared as they are written.
        flags = [os.environ.get("XLA_FLAGS", ""), "--xla_allow_excess_precision=false"]
        environment["XLA_FLAGS"] = " ".join(flags).strip()
    return environment


def commit() -> str:
    """What git says of the version here."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def _run_peers(args: Any, record: Record) -> None:
    """Fills prefill_s[context]["peer"], decode_ms[batch][context]["peer" (the better), "peer_eager", "peer_graph"] and
    peer."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        record.put(("peer",), f"not run: no {' and no '.join(missing)}")
        print(f"peer {record.get('peer')}", flush=True)
        return
    tiny = ["--tiny"] if args.config == "tiny" else []
    contexts = [c for c in args.contexts if c in PEER_CONTEXTS or tiny]
    sizes = [size for size in args.decode if size in PEER_DECODE or tiny]
    batches, lengths = ([str(size[i]) for size in sizes] for i in (0, 1))
    arguments = ["--batches", *batches, "--contexts", *lengths, "--eager", *map(str, contexts), *tiny]
    found = _peer("torch_peer_graph", arguments, record)
    record.put(("peer",), found)
    for context, row in found.get("contexts", {}).items():
        if "error" not in row:
            record.put(("prefill_s", context, "peer"), row["prefill_s"])
            if (1, int(context)) in sizes:
                record.put(("decode_ms", 1, context, "peer_eager"), row["decode_ms"])
            record.put(("peer_peak_gib", context), row["peak_gib"])
    for batch, rows in found.get("decode_ms", {}).items():
        for context, row in rows.items():
            times = [ms for ms in row.values() if isinstance(ms, float)]
            if times:
                record.put(("decode_ms", batch, context, "peer_graph"), min(times))
    for batch, rows in (record.get("decode_ms") or {}).items():
        for context, row in list(rows.items()):
            times = [row[name] for name in ("peer_eager", "peer_graph") if name in row]
            if times:
                record.put(("decode_ms", batch, context, "peer"), min(times))


def _peer(module: str, arguments: list[str], record: Record) -> dict[str, Any]:
    """What the peer's script wrote, also if it was stopped for lack of time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.json"
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", str(out), *arguments]
        try:
            subprocess.run(command, check=False, timeout=max(record.left, 1))
        except subprocess.TimeoutExpired:
            print(f"{module}: stopped for lack of time", flush=True)
        return json.loads(out.read_text()) if out.exists() else {"error": f"{module} wrote nothing"}


if __name__ == "__main__":
    sys.exit(main())
