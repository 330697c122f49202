"""Conversion of the published model's sizes on this machine: `python -m benchmarks.conversion [--folder DIR]`.

Two checkpoints in the official layout, whose tensors have the published names and sizes:

- zeros: the whole model, 13 shards of 62.24 GB as sparse files, so that reading costs no disk. Its conversion is
  killed with SIGKILL in the middle and run again with --verify. Every byte of the bundle is written to the disk and
  forced out; blocks of finished groups are given back afterwards (they hold zeros), because few disks have 62 GB to
  spare. Needs Linux and `fallocate`.
- random: a few layers at full width, of bytes that no disk or file system can compress, converted with --verify and
  restored by processes that hold a part each.

Peaks of memory are VmHWM of each process from /proc, sampled ten times a second; nothing else is counted, so pages of
the page cache are not. `dd` before and after says what the disk does by itself.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.published import CONFIG, PACKING_TABLE
from examples.tiny_checkpoint import tensor_shapes

ROOT = Path(__file__).resolve().parent.parent
_SHARD_BYTES = 5_000_000_000  # as transformers divides a checkpoint
_BLOCK_BYTES = 64 << 20
_JOURNAL = "journal.jsonl"


def write_checkpoint(folder: Path, *, layers: int, random: bool) -> int:
    """Writes config.json, shards and their index; returns the bytes of the tensors.

    Args:
        layers: of the decoder; the published model has 48.
        random: bytes that do not compress, instead of sparse zeros.
    """
    folder.mkdir(parents=True)
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = tensor_shapes(config)
    table = next(name for name in shapes if "packing_position" in name)
    width = shapes[table][1]
    shapes[table] = (PACKING_TABLE // width, width)
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        if sum(shards[-1].values()) + 2 * prod(shape) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = 2 * prod(shape)
    weight_map = {}
    for number, sizes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(sizes, file)
        _write_shard(folder / file, {name: shapes[name] for name in sizes}, random)
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: bool) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    generator = np.random.default_rng(len(encoded))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        if not random:
            file.truncate(file.tell() + end)
            return
        for begin in range(0, end, _BLOCK_BYTES):
            # All bits but the exponent's highest, without which every bfloat16 is finite.
            block = generator.integers(0, 1 << 64, _BLOCK_BYTES // 8, np.uint64) & np.uint64(0xBFFFBFFFBFFFBFFF)
            file.write(block.tobytes()[: end - begin])
        file.flush()
        os.fsync(file.fileno())


def run_measured(command: list[str], until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Runs a command to its end, or kills it as soon as `until()`: seconds, processor seconds, peak memory, stdout."""
    begin, peak, killed = time.monotonic(), 0, False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        cpu: dict[str, float] = {}
        while process.poll() is None:
            peak = max(peak, _status(process.pid).get("VmHWM", 0))
            cpu = _processor_seconds(process.pid) or cpu
            if not killed and until():
                process.kill()
                killed = True
            time.sleep(0.1)
        seconds = time.monotonic() - begin
        out.seek(0)
        err.seek(0)
        if process.returncode != (-9 if killed else 0):
            raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{err.read()}")
        peak_mib = round(peak / (1 << 20))
        return {"seconds": round(seconds, 1), **cpu, "peak_rss_mib": peak_mib, "killed": killed, "out": out.read()}


def _status(pid: int | str) -> dict[str, int]:
    """VmHWM and VmRSS of a process in bytes; empty once it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB", text, re.MULTILINE)}


def _processor_seconds(pid: int) -> dict[str, float]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return {}
    tick = os.sysconf("SC_CLK_TCK")
    return {"user_s": round(int(fields[11]) / tick, 1), "system_s": round(int(fields[12]) / tick, 1)}


def _groups(partial: Path) -> list[str]:
    """Groups that a conversion in progress has finished."""
    try:
        lines = (partial / _JOURNAL).read_text().splitlines()[1:]
    except OSError:
        return []
    return [json.loads(line)["group"] for line in lines if line.endswith("}")]


class _Holes:
    """Gives the blocks of finished groups back to the disk while a conversion of zeros runs."""

    def __init__(self, partial: Path):
        self._partial = partial
        self._done: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "_Holes":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            for group in _groups(self._partial):
                if group not in self._done:
                    self._done.add(group)
                    for path in (self._partial / "weights" / group).rglob("d/*"):
                        # Fails where the conversion has just ended and its folder has another name.
                        subprocess.run(["fallocate", "--dig-holes", path], check=False, stderr=subprocess.DEVNULL)


def _convert(checkpoint: Path, bundle: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "convert", str(checkpoint), str(bundle), *options]


def _size(bundle: Path) -> int:
    return sum(file["bytes"] for file in json.loads((bundle / "manifest.json").read_text())["files"])


def measure_zeros(folder: Path, layers: int) -> dict[str, Any]:
    """The conversion of the whole model, killed in the middle, resumed and verified."""
    tensors = write_checkpoint(folder / "hf", layers=layers, random=False)
    bundle, partial = folder / "bundle", folder / "bundle.partial"
    with _Holes(partial):
        first = run_measured(_convert(folder / "hf", bundle), until=lambda: len(_groups(partial)) >= 1.5 * layers)
        kept = sum(file.stat().st_size for group in _groups(partial) for file in _files(partial / "weights" / group))
        second = run_measured(_convert(folder / "hf", bundle))
    size = _size(bundle)
    verified = run_measured(_convert(folder / "hf", bundle, "--verify"))
    shutil.rmtree(folder)
    return {
        "tensor_bytes": tensors,
        "bundle_bytes": size,
        "killed": {**_rated(first, kept), "bytes_kept": kept},
        "resumed": _rated(second, size - kept),
        "verify": _rated(verified, size),
        "note": "sparse files: reading them costs no disk, nor does verifying what has given its blocks back",
    }


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _rated(run: dict[str, Any], size: int) -> dict[str, Any]:
    return {**{name: value for name, value in run.items() if name != "out"}, "mb_per_s": _rate(size, run["seconds"])}


def _rate(size: int, seconds: float) -> int:
    return round(size / seconds / 1e6)


def measure_random(folder: Path, layers: int, processes: int) -> dict[str, Any]:
    """Conversion, verification and restores of a few layers of incompressible bytes."""
    tensors = write_checkpoint(folder / "hf", layers=layers, random=True)
    bundle = folder / "bundle"
    _forget(folder / "hf")
    converted = run_measured(_convert(folder / "hf", bundle))
    _forget(folder)
    verified = run_measured(_convert(folder / "hf", bundle, "--verify"))
    shutil.rmtree(folder / "hf")
    size = _size(bundle)
    restores = {}
    for count in (1, processes):
        _forget(bundle)
        restores[f"{count} processes"] = _restore(bundle, count)
    shutil.rmtree(folder)
    return {
        "layers": layers,
        "tensor_bytes": tensors,
        "bundle_bytes": size,
        "convert": _rated(converted, size),
        "verify": _rated(verified, size),
        "restore": restores,
    }


def _forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that the next reader asks the disk."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _restore(bundle: Path, processes: int) -> list[dict[str, Any]]:
    """Restores with experts, heads and vocabulary divided among processes of one device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = "import sys; from benchmarks.conversion import restore; restore(*sys.argv[1:])"
    commands = [
        [sys.executable, "-c", program, str(bundle), address, str(number), str(processes)]
        for number in range(processes)
    ]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    outcomes = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a restoring process failed")
    return outcomes


def restore(bundle: str, address: str, number: str, processes: str) -> None:
    """One process of a restore: prints its own bytes, the bytes it read, seconds, and memory before and at the peak."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if int(processes) > 1:
        jax.distributed.initialize(address, num_processes=int(processes), process_id=int(number))
    import tensorstore
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    mesh = Mesh(np.array(jax.devices()), ("model",))

    def sharding(path: tuple[Any, ...], array: Any) -> NamedSharding:
        axis = _divided_axis(".".join(key.key for key in path))
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "model")
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map_with_path(sharding, opened.abstract_params())
    before, begin = _status("self")["VmRSS"], time.monotonic()
    params = opened.load_params(shardings=shardings)
    seconds, own = time.monotonic() - begin, 0
    for array in jax.tree.leaves(params):
        own += sum(shard.data.nbytes for shard in array.addressable_shards)
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    peak = _status("self")["VmHWM"]
    outcome = {
        "own_bytes": own,
        "bytes_read": sum(metric["values"][0]["value"] for metric in metrics),
        "seconds": round(seconds, 1),
        "mb_per_s": _rate(own, seconds),
        "rss_before_mib": before >> 20,
        "peak_rss_mib": peak >> 20,
        "peak_beyond_own_mib": (peak - before - own) >> 20,
    }
    print(json.dumps(outcome))


def _divided_axis(leaf: str) -> int | None:
    """Which axis of a parameter (its layer axis included) the processes divide among them."""
    axes = {
        r"text\.(embed_tokens|lm_head)": 0,
        r"text\.layers\.moe\.(gate_up|down)_proj": 1,
        r"text\.layers\.attn\.[qkv]_proj": 2,
        r"text\.layers\.attn\.o_proj": 1,
    }
    return next((axis for pattern, axis in axes.items() if re.fullmatch(pattern, leaf)), None)


def measure_disk(folder: Path) -> dict[str, int]:
    """MB/s of `dd` for 4 GiB: written and forced to disk, and read past the page cache."""
    file = folder / "dd"
    block = np.random.default_rng(0).bytes(_BLOCK_BYTES)
    begin = time.monotonic()
    command = ["dd", f"of={file}", "bs=64M", "iflag=fullblock", "conv=fsync"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as writing:
        assert writing.stdin is not None
        for _ in range(64):
            writing.stdin.write(block)
    written = time.monotonic() - begin
    _forget(folder)
    begin = time.monotonic()
    reading = ["dd", f"if={file}", "of=/dev/null", "bs=64M", "iflag=direct"]
    subprocess.run(reading, check=True, stderr=subprocess.DEVNULL)
    read = time.monotonic() - begin
    file.unlink()
    return {"write_mb_per_s": _rate(64 * _BLOCK_BYTES, written), "read_mb_per_s": _rate(64 * _BLOCK_BYTES, read)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion", description="Convert the published model's sizes on this machine."
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: the current one)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--layers", type=int, default=48, help="of the checkpoint of zeros (default: %(default)s)")
    parser.add_argument("--random-layers", type=int, default=3, help="of the other (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="that restore it together (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="conversion-") as name:
        folder = Path(name).resolve()
        document = {
            "command": shlex.join(["python", "-m", "benchmarks.conversion", *_without_paths(sys.argv[1:])]),
            "machine": _machine(),
            "dd_before": measure_disk(folder),
        }
        for step, measure in {
            "random": lambda: measure_random(folder / "random", args.random_layers, args.processes),
            "zeros": lambda: measure_zeros(folder / "zeros", args.layers),
            "dd_after": lambda: measure_disk(folder),
        }.items():
            load = os.getloadavg()[0]
            document[step] = measure()
            document[f"load_before_{step}"] = round(load, 1)
            print(json.dumps({step: document[step]}, indent=1), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _without_paths(arguments: list[str]) -> list[str]:
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "orbax-checkpoint", "tensorstore")},
    }


if __name__ == "__main__":
    sys.exit(main())
