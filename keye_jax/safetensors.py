"""Reading safetensors files with numpy alone, in bounded pieces.

Files are untrusted: headers are size-capped and checked entry by entry before any data is read, and data is
read at the offsets found into one small buffer, never mapped, so that host memory does not follow the file.
Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors).
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from keye_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_MAX_INDEX_BYTES = 64 << 20
_MAX_RANK = 8
_PIECE_BYTES = 16 << 20

_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ITEM_BYTES = {
    **{name: np.dtype(kind).itemsize for name, kind in _FLOATS.items()},
    # The other documented types: legal in a file, but no weight of this model.
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `bytes` from `offset` (counted from the start of the file)."""

    name: str
    dtype: str
    """As the file spells it: "BF16", "F32", ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def check_floating(self) -> None:
        """Raises CheckpointError for a type that `read_rows` does not read."""
        if self.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {self.name!r} has dtype {self.dtype}; weights must be BF16, F16 or F32, "
                "so fetch the original (not a quantised) checkpoint"
            )

    def read_rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Reads rows `start:stop` of the first axis, a bounded piece at a time.

        Yields:
            (first row, array `[rows, *shape[1:]]`); the array is reused for the next piece.

        Raises:
            CheckpointError: the file shrank or cannot be read.
        """
        dtype = np.dtype(_FLOATS[self.dtype])
        row_bytes = dtype.itemsize * math.prod(self.shape[1:])
        rows = min(max(1, _PIECE_BYTES // row_bytes), stop - start)
        piece = np.empty((rows, *self.shape[1:]), dtype)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset + start * row_bytes)
                for first in range(start, stop, rows):
                    part = piece[: min(rows, stop - first)]
                    _read_exactly(file, part, self)
                    yield first, part
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot read tensor {self.name!r} ({error.strerror})") from None


@dataclass(frozen=True)
class TensorFiles:
    """All tensors of a checkpoint folder, and a hash of everything that says what they are."""

    tensors: dict[str, Tensor]
    fingerprint: str
    """sha256 over the headers, sizes and modification times of the files."""


def open_folder(folder: str | os.PathLike[str]) -> TensorFiles:
    """Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        CheckpointError: no such files; an index that does not fit its shards; a damaged or truncated file.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    if (folder / INDEX_FILE).exists():
        weight_map = _read_index(folder / INDEX_FILE)
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE_FILE).exists():
        weight_map, names = None, [SINGLE_FILE]
    else:
        raise CheckpointError(f"{folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}; is the download complete?")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if weight_map is not None and not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing ({INDEX_FILE} lists it); fetch that shard")
        for tensor in _read_header(folder / name, digest).values():
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise CheckpointError(f"tensor {tensor.name!r} stands in two files, {other} and {name}")
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(weight_map, tensors)
    return TensorFiles(tensors, digest.hexdigest())


def _read_exactly(file: Any, array: np.ndarray, tensor: Tensor) -> None:
    view = memoryview(array.view(np.uint8).reshape(-1).data)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{tensor.file} ends inside tensor {tensor.name!r}; fetch the file again")
        view = view[count:]


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} is larger than {_MAX_INDEX_BYTES >> 20} MiB; that is not an index")
    index = _parse_json(path.read_bytes(), path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; fetch the file again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r} (for {tensor!r}) is not the name of a shard beside the index")
    return weight_map


def _check_index(weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{shard} does not hold tensor {name!r}, which {INDEX_FILE} promises")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{tensor.file.name} holds tensor {name!r}, which {INDEX_FILE} does not list")


def _read_header(path: Path, digest: Any) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, stat.st_size - 8):
                raise CheckpointError(f"{path} is not a complete safetensors file; fetch it again")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    for part in (path.name, stat.st_size, stat.st_mtime_ns, len(header)):
        digest.update(f"{part}\n".encode())
    digest.update(header)
    return _parse_header(header, path, stat.st_size - 8 - length)


def _parse_header(header: bytes, path: Path, data_bytes: int) -> dict[str, Tensor]:
    entries = _parse_json(header, path)
    entries.pop("__metadata__", None)
    data_start = 8 + len(header)
    tensors = [_parse_entry(name, entry, path, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the one before it" if tensor.offset < position else "follows a hole"
            raise CheckpointError(f"{path}: tensor {tensor.name!r} {what}; fetch the file again")
        position += tensor.nbytes
    if position != data_start + data_bytes:
        what = "truncated" if position > data_start + data_bytes else "longer than its header says"
        raise CheckpointError(f"{path} is {what}: {data_bytes} bytes of {position - data_start}; fetch it again")
    return {tensor.name: tensor for tensor in tensors}


def _parse_entry(name: str, entry: Any, path: Path, data_start: int) -> Tensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets; fetch the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r:.40}, which safetensors does not define")
    if not _are_counts(shape) or len(shape) > _MAX_RANK or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: bad shape {shape!r:.80} or data_offsets {offsets!r:.80}; fetch the file again")
    tensor = Tensor(name, dtype, tuple(shape), path, data_start + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise CheckpointError(
            f"{where}: {shape} of {dtype} does not take {offsets[1] - offsets[0]} bytes; fetch the file again"
        )
    return tensor


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise CheckpointError(f"{path}: {twice!r} stands there twice; fetch the file again")
        return keys

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object; fetch the file again")
    return value
