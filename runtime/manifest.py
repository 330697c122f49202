"""manifest.json: what a bundle is made of. Read strictly, because everything else is trusted only through it."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.errors import InputError
from runtime.graphs import GraphEntry, GraphKey

FORMAT = "keye-jax-bundle"
VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
"""Kept in the working folder of a conversion: finished groups."""
WEIGHTS = "weights"
TOKENIZER = "tokenizer.json"

_MANIFEST_KEYS = {
    *("format", "version", "created", "keye_jax", "source", "config", "dtype", "indexer_dtype", "weight_format"),
    *("processor", "weights", "shapes_only", "files", "graphs", "sha256"),
}
ITEM_BYTES = {"bfloat16": 2, "float32": 4, "int8": 1, "float8_e4m3fn": 1}
DTYPES = ("bfloat16", "float32")
WEIGHT_FORMATS = ("none", "int8", "fp8")
INDEXER_DTYPES = ("fp8", "bf16", "float32")
_MAX_MANIFEST_BYTES = 32 << 20
_MAX_RANK = 8
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredArray:
    """An array as it lies on disk."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredGroup:
    """One Orbax checkpoint: arrays by dotted path, all of one layer of the stack or (None) outside it."""

    layer: int | None
    arrays: Mapping[str, StoredArray]


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in a manifest but its own digest; tells a damaged or edited one."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Puts a manifest with its digest in place. Raises OSError."""
    content = json.dumps({**manifest, "sha256": manifest_digest(manifest)}, indent=1)
    write_file(root / MANIFEST, content.encode())


def write_file(path: Path, content: bytes) -> None:
    """Puts a file in place in one step, on disk before it has its name. Raises OSError and leaves nothing behind."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def leaf_groups(groups: Mapping[str, StoredGroup]) -> dict[str, list[str]]:
    """Dotted path of every parameter → names of the groups that hold it, in the order of the layers."""
    found: dict[str, dict[int | None, str]] = {}
    for name, group in groups.items():
        for leaf in group.arrays:
            if group.layer in found.setdefault(leaf, {}):
                raise damaged(f"{leaf} stands in {name} and in {found[leaf][group.layer]}")
            found[leaf][group.layer] = name
    leaves = {}
    for leaf, by_layer in found.items():
        if set(by_layer) != {None} and set(by_layer) != set(range(len(by_layer))):
            raise damaged(f"{leaf} lacks a layer")
        names = [by_layer[layer] for layer in (range(len(by_layer)) if None not in by_layer else (None,))]
        if len({groups[name].arrays[leaf] for name in names}) != 1:
            raise damaged(f"{leaf} has another shape or dtype in some layers")
        leaves[leaf] = names
    return leaves


def read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(_why_not_a_bundle(root))
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise InputError(f"{path} is larger than {_MAX_MANIFEST_BYTES >> 20} MiB; that is not a manifest")
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as JSON ({error}); {MEND}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a keye-jax bundle; give the folder that convert wrote")
    version = manifest.get("version")
    if type(version) is int and version > VERSION:
        raise InputError(f"{root} has bundle version {version}, newer than {VERSION}; upgrade keye-jax")
    if type(version) is not int or version != VERSION:
        raise damaged(f"version is {version!r}")
    if set(manifest) != _MANIFEST_KEYS:
        raise damaged(f"keys {sorted(set(manifest) ^ _MANIFEST_KEYS)[:5]} are missing or unknown")
    if manifest["sha256"] != manifest_digest(manifest):
        raise damaged("its content does not have its sha256")
    return manifest


def _why_not_a_bundle(root: Path) -> str:
    if not root.exists():
        return f"{root} does not exist; give the folder that `python -m convert HF_DIR BUNDLE` wrote"
    if not root.is_dir():
        return f"{root} is a file; give the folder that `python -m convert HF_DIR BUNDLE` wrote"
    if (root / JOURNAL).exists():
        return f"{root} is an unfinished conversion; run the same convert command again to finish it"
    if (root / "config.json").exists():
        return f"{root} is a checkpoint, not a bundle; run `python -m convert {root} BUNDLE` and give BUNDLE"
    return f"{root} holds no {MANIFEST}; give the folder that `python -m convert HF_DIR BUNDLE` wrote"


def parse_groups(weights: dict[str, Any]) -> dict[str, StoredGroup]:
    groups = {}
    if not weights:
        raise damaged("it lists no weights")
    for name, entry in weights.items():
        if not _NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != {"layer", "arrays"}:
            raise damaged(f"weights group {name!r}")
        layer, arrays = entry["layer"], typed(entry, "arrays", dict)
        if layer is not None and (type(layer) is not int or not 0 <= layer < 1 << 16):
            raise damaged(f"layer of weights group {name!r}")
        groups[name] = StoredGroup(layer, {leaf: _parse_array(leaf, array) for leaf, array in arrays.items()})
    leaf_groups(groups)
    return groups


def _parse_array(leaf: str, entry: Any) -> StoredArray:
    if not _NAME.fullmatch(leaf) or not isinstance(entry, dict) or set(entry) != {"shape", "dtype"}:
        raise damaged(f"array {leaf!r}")
    shape = typed(entry, "shape", list)
    if len(shape) > _MAX_RANK or not all(type(extent) is int and 0 < extent < 1 << 40 for extent in shape):
        raise damaged(f"shape of array {leaf!r}")
    return StoredArray(tuple(shape), one_of(entry, "dtype", tuple(ITEM_BYTES)))


def parse_files(entries: list[Any]) -> dict[str, StoredFile]:
    files = {}
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"path", "bytes", "sha256"}:
            raise damaged(f"file entry {entry!r:.80}")
        name, size, digest = typed(entry, "path", str), typed(entry, "bytes", int), typed(entry, "sha256", str)
        if not _is_inside(name) or name in files or size < 0 or not _SHA256.fullmatch(digest):
            raise damaged(f"file entry {name!r:.80}")
        files[name] = StoredFile(size, digest)
    return files


def parse_graphs(entries: list[Any]) -> dict[GraphKey, GraphEntry]:
    """The graphs by key. Raises InputError for a malformed entry or two of one key."""
    graphs = {}
    for raw in entries:
        entry = GraphEntry.from_json(raw)
        if entry.key in graphs:
            raise damaged(f"graph {entry.key.name} is listed twice")
        graphs[entry.key] = entry
    return graphs


def _is_inside(name: str) -> bool:
    """A plain relative path with forward slashes, spelled the one way that does not climb."""
    path = PurePosixPath(name)
    plain = "\\" not in name and ":" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and str(path) == name != "."


def typed(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(entry[key]) is not kind:
        raise damaged(f"{key} is {entry[key]!r:.80}")
    return entry[key]


def one_of(entry: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    if entry[key] not in allowed:
        raise damaged(f"{key} is {entry[key]!r:.80}, not one of {', '.join(allowed)}")
    return entry[key]


MEND = "copy the whole bundle again or convert again"


def damaged(what: str) -> InputError:
    return InputError(f"{MANIFEST} of the bundle is damaged: {what}; {MEND}")
