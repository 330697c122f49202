"""Putting storage groups on disk: Orbax writes them, and what must survive a power cut is forced out of the caches."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from convert.journal import FileEntry
from keye_jax.params import Path as ParamPath
from keye_jax.params import StorageGroup, unflatten
from runtime.bundle import file_sha256
from runtime.errors import InputError

# A chunk is what a sharded restore has to read whole; Orbax would make it the array.
_CHUNK_BYTES = 64 << 20
# Axes that are stored one index to a chunk: devices that share the experts or the heads read only their own.
_CHUNKED_AXES = frozenset({"expert", "heads", "kv_heads"})


class OrbaxWriter:
    """Writes storage groups, uncompressed (random-looking mantissas shrink by a quarter at a fifth of the speed)."""

    def __init__(self) -> None:
        # It warns about chunks smaller than 1 MiB, which are right for small models.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._checkpointer = ocp.PyTreeCheckpointer(use_ocdbt=True, use_compression=False)

    def save(self, folder: Path, arrays: dict[ParamPath, np.ndarray], group: StorageGroup) -> None:
        """Returns when everything is written; the arrays may then be changed.

        Raises:
            InputError: the folder cannot be written.
        """
        lent = {path: array.view(_Lent) for path, array in arrays.items()}
        save_args = {}
        for path, spec in group.stored.items():
            axes = tuple(position for position, axis in enumerate(spec.axes) if axis in _CHUNKED_AXES)
            save_args[path] = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)
        try:
            self._checkpointer.save(folder.resolve(), unflatten(lent), save_args=unflatten(save_args))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{folder} cannot be written ({reason}); mend that and run the command again") from error


class _Lent(np.ndarray):
    """An array that is not changed while it is saved. Orbax copies all others first, which costs as much again in
    memory."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Lent":
        return self


def describe_files(partial: Path, folder: Path) -> list[FileEntry]:
    """Forces a group's files to disk and describes them."""
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        name = path.relative_to(partial).as_posix()
        entries.append({"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    for path in {Path(partial / entry["path"]).parent for entry in entries}:
        sync(path)
    return entries


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file; it is on disk on return."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
