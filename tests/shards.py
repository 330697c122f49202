"""Taking safetensors files apart and putting changed ones together, for tests of what a loader must refuse."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

CHECKPOINT = Path(__file__).parent / "golden" / "checkpoint"
INDEX = "model.safetensors.index.json"
_TYPES = {"F32": np.float32, "F16": np.float16}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name → dtype as the file spells it, shape, bytes."""


def read_tensors(folder: Path = CHECKPOINT) -> Tensors:
    """All tensors of a folder's shards."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, data = split(path)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return tensors


def read_array(tensors: Tensors, name: str) -> np.ndarray:
    dtype, shape, data = tensors[name]
    return np.frombuffer(data, _TYPES[dtype]).reshape(shape)


def entry(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """The tensor that holds a numpy array of float32, float16 or bfloat16."""
    dtype = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[array.dtype.name]
    return dtype, array.shape, np.ascontiguousarray(array).tobytes()


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of one file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: Any, data: bytes) -> None:
    """Writes a file with any header, also a wrong one."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_file(path: Path, tensors: Tensors) -> None:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    join(path, header, data)


def write_checkpoint(folder: Path, tensors: Tensors) -> Path:
    """A folder with the golden config.json and one model.safetensors."""
    folder.mkdir(exist_ok=True)
    shutil.copy(CHECKPOINT / "config.json", folder)
    write_file(folder / "model.safetensors", tensors)
    return folder


def copy_checkpoint(folder: Path) -> Path:
    """A writable copy of the golden checkpoint: two shards and an index."""
    return Path(shutil.copytree(CHECKPOINT, folder))
