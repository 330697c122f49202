"""From a checkpoint folder to a bundle: read a storage group, write it with Orbax, record it, go on.

All work happens in BUNDLE.partial, which becomes BUNDLE by one rename after its manifest is on disk. A journal there
names the finished groups with the sha256 of their files, so that the same command resumes after an interruption.
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from convert.journal import FileEntry, Journal
from convert.store import OrbaxWriter, describe_files, sync, write_synced
from keye_jax.checkpoint import Checkpoint, group_bytes, open_checkpoint, read_group, scratch_bytes, weight_dtype
from keye_jax.config import IndexerDtype, KeyeConfig, read_config_json
from keye_jax.params import Path as ParamPath
from keye_jax.params import StorageGroup, WeightFormat, storage_groups
from runtime.bundle import Bundle, group_folder
from runtime.errors import InputError
from runtime.manifest import FORMAT, JOURNAL, MANIFEST, TOKENIZER, VERSION, WEIGHTS, write_manifest
from runtime.processor import ProcessorSettings

Report = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in total)."""

COPIED = (
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Files that go into the bundle unchanged where the checkpoint has them."""

_MAX_COPIED_BYTES = 64 << 20
_SPARE_BYTES = 16 << 20
# Twice the largest group of the published model in bfloat16 (1.6 GB); in float32 no group is read ahead, so that with
# what tensorstore keeps of a group in writing the conversion stays below 4 GiB.
_READ_BYTES = 2 << 30


@dataclass(frozen=True)
class _Job:
    """A checked checkpoint and everything the manifest says about it besides its files."""

    checkpoint: Checkpoint | None
    """None: shapes only."""
    groups: dict[str, StorageGroup]
    dtype: np.dtype
    copied: dict[str, bytes]
    manifest: dict[str, Any]

    @property
    def source(self) -> str:
        return self.manifest["source"]

    @property
    def total(self) -> int:
        return sum(map(self.nbytes, self.groups))

    def nbytes(self, group: str) -> int:
        return sum(spec.nbytes(self.dtype) for spec in self.groups[group].stored.values())


def convert(
    hf_dir: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    indexer_dtype: IndexerDtype = "fp8",
    weights: WeightFormat = "none",
    verify: bool = False,
    shapes_only: bool = False,
    report: Report | None = None,
) -> Bundle:
    """Converts a checkpoint in the official layout; resumes an interrupted conversion of the same files.

    Args:
        bundle: the folder to make. One that is already complete and made from the same files is left as it is.
        dtype: "bfloat16" or "float32", of weights and activations.
        indexer_dtype: "fp8", "bf16" or "float32", in which the lightning indexer multiplies.
        weights: "int8" or "fp8" keeps the text decoder's large matrices with 8 bits and a scale for each output
            channel, quantised from their values in `dtype`.
        verify: afterwards read checkpoint and bundle again and compare bit for bit.
        shapes_only: describe the weights and store none; only config.json is needed. Such a bundle can be exported
            and planned with on any host, and not run.
        report: progress.

    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be converted.
        InputError: the bundle cannot be written, or the folder is something else.
    """
    report = report or (lambda stage, done, total: None)
    source, target = _folder(hf_dir), _folder(bundle)
    if verify and shapes_only:
        raise InputError("--verify compares weights and --shapes-only stores none; give one of them")
    job = _prepare(source, dtype, indexer_dtype, weights, shapes_only)
    if _is_complete(target, job):
        if (target / JOURNAL).exists():  # the conversion was killed in its last moment
            (target / JOURNAL).unlink()
        report(f"{target} is there already, made from the same files and options", job.total, job.total)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_bundle(target, job, report)
    made = Bundle.open(target)
    if verify and job.checkpoint is not None:
        _verify(job.checkpoint, job, made, report)
    return made


def _folder(path: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(path):
        raise InputError(
            f"{path} is an address, and conversion reads and writes folders; copy the checkpoint here before, or the "
            "bundle there afterwards (all commands of the runtime take a bundle's address)"
        )
    return Path(path)


def _prepare(folder: Path, dtype: str, indexer_dtype: IndexerDtype, weights: WeightFormat, shapes_only: bool) -> _Job:
    raw = read_config_json(folder)
    config = KeyeConfig.from_hf(raw, indexer_dtype=indexer_dtype)
    checkpoint = None if shapes_only else open_checkpoint(folder, config)
    copied = _read_copied(folder)
    processor = ProcessorSettings.from_hf_folder(folder).to_dict()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_hf(),
        "dtype": weight_dtype(dtype).name,
        "indexer_dtype": indexer_dtype,
        "weight_format": weights,
        "processor": processor,
        "shapes_only": shapes_only,
    }
    fingerprint = checkpoint.fingerprint if checkpoint else None
    source = [about, fingerprint, {name: _sha256(data) for name, data in copied.items()}]
    about["source"] = _sha256(json.dumps(source, sort_keys=True).encode())
    return _Job(checkpoint, storage_groups(config, weights), weight_dtype(dtype), copied, about)


def _read_copied(folder: Path) -> dict[str, bytes]:
    copied = {}
    for name in COPIED:
        path = folder / name
        if not path.exists():
            continue
        if not path.is_file() or path.stat().st_size > _MAX_COPIED_BYTES:
            raise InputError(f"{path} must be a file of at most {_MAX_COPIED_BYTES >> 20} MiB; fetch it again")
        copied[name] = path.read_bytes()
    return copied


def _is_complete(target: Path, job: _Job) -> bool:
    """True if `target` is this very bundle; False if it is free. Raises InputError if it is anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / MANIFEST).exists():
        raise InputError(f"{target} exists and is not a bundle; give another name or delete it")
    if Bundle.open(target).source != job.source:
        raise InputError(
            f"{target} is a bundle made from other files, with other options or by another version; "
            "give another name or delete it"
        )
    return True


def _write_bundle(target: Path, job: _Job, report: Report) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(exist_ok=True)
    if any(partial.iterdir()) and not (partial / JOURNAL).exists():
        raise InputError(f"{partial} exists and is not an unfinished conversion; move it away or give another name")
    with Journal(partial / JOURNAL, job.source) as journal:
        _remove_unfinished(partial, journal)
        files = []
        if job.checkpoint is not None:
            missing = sum(job.nbytes(name) for name in job.groups if name not in journal.groups)
            _check_space(partial, missing + sum(map(len, job.copied.values())))
            _write_groups(partial, job.checkpoint, job, journal, report)
            files = [entry for name in job.groups for entry in journal.groups[name]]
        for name, data in job.copied.items():
            write_synced(partial / name, data)
            files.append({"path": name, "bytes": len(data), "sha256": _sha256(data)})
        write_manifest(partial, _manifest(job, files))
        sync(partial / WEIGHTS)
        sync(partial)
        os.rename(partial, target)
        sync(target.parent)
        (target / JOURNAL).unlink()


def _manifest(job: _Job, files: list[FileEntry]) -> dict[str, Any]:
    weights = {}
    for name, group in job.groups.items():
        arrays = {
            ".".join(path): {"shape": list(spec.shape), "dtype": spec.as_dtype(job.dtype).name}
            for path, spec in group.stored.items()
        }
        weights[name] = {"layer": group.layer, "arrays": arrays}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        **job.manifest,
        "created": created,
        "keye_jax": _version(),
        "weights": weights,
        "files": files,
        "graphs": [],
    }


def _remove_unfinished(partial: Path, journal: Journal) -> None:
    """Leaves only the journal and the groups it lists whose files are all there."""
    for name, files in list(journal.groups.items()):
        paths = [(partial / entry["path"], entry["bytes"]) for entry in files]
        if not all(path.is_file() and path.stat().st_size == size for path, size in paths):
            del journal.groups[name]
    for path in partial.iterdir():
        if path.is_dir() and path.name != WEIGHTS:
            shutil.rmtree(path)
        elif path.is_file() and path.name != JOURNAL:
            path.unlink()
    weights = partial / WEIGHTS
    weights.mkdir(exist_ok=True)
    for path in weights.iterdir():
        if path.name not in journal.groups:
            shutil.rmtree(path)


def _check_space(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free
    if free < needed + _SPARE_BYTES:
        raise InputError(
            f"{partial.parent} has {free / 1e9:.1f} GB free and the bundle needs {needed / 1e9:.1f} GB more; "
            "free some space or choose another disk"
        )


def _write_groups(partial: Path, checkpoint: Checkpoint, job: _Job, journal: Journal, report: Report) -> None:
    """Reads, writes and describes at the same time, a group each."""
    total, done = job.total, sum(map(job.nbytes, journal.groups))
    if done:
        report(f"resuming, {len(journal.groups)}/{len(job.groups)} groups are there", done, total)
    names = {name: number for number, name in enumerate(job.groups, 1) if name not in journal.groups}
    writer = OrbaxWriter()
    # Leaving the block waits for the last group's record, also after Ctrl-C.
    with ThreadPoolExecutor(1, thread_name_prefix="describe") as pool:
        described: list[Future[None]] = []
        for name, arrays in _read_ahead(checkpoint, job, list(names)):
            report(f"group {names[name]}/{len(job.groups)} {name}", done, total)
            with _interrupt_waits():
                writer.save(group_folder(partial, name), arrays, job.groups[name])
                described.append(pool.submit(_record, partial, name, journal))
            done += job.nbytes(name)
            # One group may lag behind: a full disk must stop the conversion, and hashing is faster than writing.
            for future in described[:-1]:
                future.result()
            del described[:-1]
        for future in described:
            future.result()
    report("weights written", done, total)


def _record(partial: Path, name: str, journal: Journal) -> None:
    journal.add(name, describe_files(partial, group_folder(partial, name)))


def _read_ahead(
    checkpoint: Checkpoint, job: _Job, names: list[str]
) -> Iterator[tuple[str, dict[ParamPath, np.ndarray]]]:
    """Groups in order; while one is in use, the next is read. The arrays are valid until the next step.

    All are read into the same memory: fresh pages cost more time than what is read into them.
    """
    size = max((group_bytes(job.groups[name], job.dtype) for name in names), default=0)
    # One for all: there is one reader.
    scratch = np.empty(max((scratch_bytes(job.groups[name], job.dtype) for name in names), default=0), np.uint8)
    buffers = 2 if 2 * size <= _READ_BYTES else 1
    memory = itertools.cycle([np.empty(size, np.uint8) for _ in range(buffers)])
    reads: deque[Future[dict[ParamPath, np.ndarray]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        for position, name in enumerate(names):
            # Whoever asks for a group has done with the one before it, so that its memory may be used.
            for later in names[position + len(reads) : position + buffers]:
                group = job.groups[later]
                lent = {"memory": next(memory), "scratch": scratch}
                reads.append(pool.submit(read_group, checkpoint, group, job.dtype, **lent))
            yield name, reads.popleft().result()


@contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: Orbax's threads report errors of their own when a save is cut."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught:
        raise KeyboardInterrupt


def _verify(checkpoint: Checkpoint, job: _Job, bundle: Bundle, report: Report) -> None:
    """Reads everything once more: files against their sha256, and arrays against the checkpoint's, bit for bit."""
    total, done = job.total, 0
    names = list(job.groups)
    for number, (name, arrays) in enumerate(_read_ahead(checkpoint, job, names), 1):
        report(f"comparing group {number}/{len(names)} {name}", done, total)
        # Before the comparison, which then reads what the page cache still holds.
        bundle.verify(group=name)
        for path, array in arrays.items():
            _compare(bundle, name, ".".join(path), array)
        done += job.nbytes(name)
    report("bundle and checkpoint are equal", total, total)


def _compare(bundle: Bundle, group: str, leaf: str, expected: np.ndarray) -> None:
    bits = f"u{expected.dtype.itemsize}"
    for first, rows in bundle.read_rows(group, leaf):
        if not np.array_equal(expected[first : first + len(rows)].view(bits), rows.view(bits)):
            raise InputError(
                f"{bundle.path}: weights {leaf} differ from the checkpoint in {group}; delete the bundle and "
                "convert again"
            )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("keye-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
