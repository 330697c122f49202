"""Bundles: what `python -m convert` writes and everything here runs from.

A bundle is a folder with `manifest.json`, the tokenizer's files and `weights/`: one Orbax checkpoint (OCDBT) for
each storage group, holding that group's arrays under their full paths, a layer's arrays without the layer axis.
Weights are read through tensorstore, which is the store beneath Orbax: importing Orbax itself takes longer than
loading a small model, and restoring would need the model library's parameter tree.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.errors import InputError

FORMAT = "keye-jax-bundle"
VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
"""Kept in the working folder of a conversion: finished groups."""
WEIGHTS = "weights"
TOKENIZER = "tokenizer.json"

_MANIFEST_KEYS = {
    *("format", "version", "created", "keye_jax", "source", "config", "dtype", "indexer_dtype"),
    *("processor", "weights", "files"),
}
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_INDEXER_DTYPES = ("fp8", "bf16", "float32")
_MAX_MANIFEST_BYTES = 32 << 20
_MAX_RANK = 8
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Stacks up to this size are put together in host memory and sent at once; larger ones grow on the device,
# layer by layer, so that the host never holds a whole one (38.7 GB for the published expert weights).
_HOST_STACK_BYTES = 256 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""


@dataclass(frozen=True)
class StoredArray:
    """An array as it lies on disk."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredGroup:
    """One Orbax checkpoint: arrays by dotted path, all of one layer of the stack or (None) outside it."""

    layer: int | None
    arrays: Mapping[str, StoredArray]


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A complete bundle whose manifest fits its files."""

    path: Path
    config: dict[str, Any]
    """The official config.json, as the model library reads it."""
    dtype: str
    """Of the weights: "bfloat16" or "float32"."""
    indexer_dtype: str
    """Number format of the lightning indexer: "fp8", "bf16" or "float32"."""
    processor_settings: dict[str, Any]
    """What `runtime.processor.ProcessorSettings` was made of."""
    source: str
    """Hash of the checkpoint files and options that the bundle was made from."""
    groups: Mapping[str, StoredGroup]
    files: Mapping[str, StoredFile]
    """Every file by its path in the bundle, except the manifest."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Reads the manifest and checks it against the files: presence and size of all, sha256 of all but weights.

        Raises:
            InputError: not a bundle, an unfinished one, one from a newer version, missing or altered files.
        """
        root = Path(path)
        manifest = _read_manifest(root)
        bundle = cls(
            path=root,
            config=_typed(manifest, "config", dict),
            dtype=_one_of(manifest, "dtype", tuple(_ITEM_BYTES)),
            indexer_dtype=_one_of(manifest, "indexer_dtype", _INDEXER_DTYPES),
            processor_settings=_typed(manifest, "processor", dict),
            source=_typed(manifest, "source", str),
            groups=_parse_groups(_typed(manifest, "weights", dict)),
            files=_parse_files(_typed(manifest, "files", list)),
        )
        bundle._check_stored_bytes()
        bundle._check_files()
        return bundle

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json; None for a bundle made from a folder without one."""
        return self.path / TOKENIZER if TOKENIZER in self.files else None

    def verify(self, *, progress: Progress | None = None) -> None:
        """Reads every file and compares it with its sha256. Raises InputError naming the first that differs."""
        total = sum(file.bytes for file in self.files.values())
        done = 0
        for name, file in self.files.items():
            self._check_sha256(name, file)
            done += file.bytes
            if progress is not None:
                progress(done, total)

    def load_params(self, *, progress: Progress | None = None) -> dict[str, Any]:
        """Reads all weights onto the default device.

        Returns:
            Nested dictionaries with `jax.Array` leaves; the layers' arrays stacked on a leading axis.

        Raises:
            InputError: the store does not hold what the manifest says.
        """
        reader = _ArrayReader(self.path)
        total = sum(array.nbytes for group in self.groups.values() for array in group.arrays.values())
        done = 0
        tree: dict[str, Any] = {}
        for leaf, groups in _leaves(self.groups).items():
            array = self.groups[groups[0]].arrays[leaf]
            *parents, name = leaf.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = reader.load(leaf, array, groups, stacked=self.groups[groups[0]].layer is not None)
            done += array.nbytes * len(groups)
            if progress is not None:
                progress(done, total)
        return tree

    def read_group(self, name: str) -> dict[str, Any]:
        """One storage group as numpy arrays, by dotted path. Raises InputError as `load_params` does."""
        reader = _ArrayReader(self.path)
        return {leaf: reader.read(leaf, array, [name])[0] for leaf, array in self.groups[name].arrays.items()}

    def _check_stored_bytes(self) -> None:
        # Arrays are stored uncompressed, so this bounds what a forged manifest can make the loader allocate.
        arrays = sum(array.nbytes for group in self.groups.values() for array in group.arrays.values())
        stored = sum(file.bytes for name, file in self.files.items() if name.startswith(WEIGHTS + "/"))
        if arrays > stored:
            raise _damaged(f"weights of {arrays} bytes in files of {stored} bytes")

    def _check_files(self) -> None:
        root = self.path.resolve()
        for name, file in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise InputError(f"{path} is missing from the bundle; {_MEND}")
            if not path.resolve().is_relative_to(root):
                raise InputError(f"{path} is a link out of the bundle; put the file itself there")
            size = path.stat().st_size
            if size != file.bytes:
                raise InputError(f"{path} has {size} bytes, {file.bytes} in {MANIFEST}; {_MEND}")
            if not name.startswith(WEIGHTS + "/"):
                self._check_sha256(name, file)

    def _check_sha256(self, name: str, file: StoredFile) -> None:
        if file_sha256(self.path / name) != file.sha256:
            raise InputError(f"{self.path / name} differs from its sha256 in {MANIFEST}; {_MEND}")


class _ArrayReader:
    """Reads arrays from a bundle's Orbax checkpoints into device memory."""

    def __init__(self, bundle: Path) -> None:
        import tensorstore

        self._tensorstore = tensorstore
        self._bundle = bundle.resolve()
        # Keeps the stores' index nodes, which all arrays of a group share.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 << 20}})

    def load(self, leaf: str, array: StoredArray, groups: list[str], *, stacked: bool) -> Any:
        """A `jax.Array`: that of the one group, or those of all layers stacked."""
        import jax
        import numpy as np

        if not stacked:
            return jax.device_put(self.read(leaf, array, groups)[0])
        shape = (len(groups), *array.shape)
        if array.nbytes * len(groups) <= _HOST_STACK_BYTES:
            return jax.device_put(np.stack(self.read(leaf, array, groups)))
        stack = jax.numpy.zeros(shape, array.dtype)
        for layer, group in enumerate(groups):
            stack = _set_layer()(stack, self.read(leaf, array, [group])[0], layer)
        return stack

    def read(self, leaf: str, array: StoredArray, groups: list[str]) -> list[Any]:
        """The array of each group, as numpy arrays."""
        try:
            stores = [store.result() for store in [self._open(leaf, group) for group in groups]]
            for store, group in zip(stores, groups, strict=True):
                if store.shape != array.shape or store.dtype.name != array.dtype:
                    raise _damaged(f"{group}: {leaf} is {store.dtype.name} {store.shape}")
            return [read.result() for read in [store.read() for store in stores]]
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{self._bundle}: cannot read weights {leaf} ({reason}); {_MEND}") from None

    def _open(self, leaf: str, group: str) -> Any:
        folder = {"driver": "file", "path": f"{group_folder(self._bundle, group)}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": folder, "path": f"{leaf}/"}}
        return self._tensorstore.open(spec, open=True, read=True, context=self._context)


@cache
def _set_layer() -> Any:
    """The jitted in-place update; made on first use so that this module does not import jax."""
    import jax

    return jax.jit(partial(jax.lax.dynamic_update_index_in_dim, axis=0), donate_argnums=0)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def group_folder(bundle: Path, group: str) -> Path:
    """Where a storage group's Orbax checkpoint lies."""
    return bundle / WEIGHTS / group


def _leaves(groups: Mapping[str, StoredGroup]) -> dict[str, list[str]]:
    """Dotted path of every parameter → names of the groups that hold it, in the order of the layers."""
    found: dict[str, dict[int | None, str]] = {}
    for name, group in groups.items():
        for leaf in group.arrays:
            if group.layer in found.setdefault(leaf, {}):
                raise _damaged(f"{leaf} stands in {name} and in {found[leaf][group.layer]}")
            found[leaf][group.layer] = name
    leaves = {}
    for leaf, by_layer in found.items():
        if set(by_layer) != {None} and set(by_layer) != set(range(len(by_layer))):
            raise _damaged(f"{leaf} lacks a layer")
        names = [by_layer[layer] for layer in (range(len(by_layer)) if None not in by_layer else (None,))]
        if len({groups[name].arrays[leaf] for name in names}) != 1:
            raise _damaged(f"{leaf} has another shape or dtype in some layers")
        leaves[leaf] = names
    return leaves


def _read_manifest(root: Path) -> dict[str, Any]:
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
        raise InputError(f"{path} cannot be read as JSON ({error}); {_MEND}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a keye-jax bundle; give the folder that convert wrote")
    version = manifest.get("version")
    if type(version) is int and version > VERSION:
        raise InputError(f"{root} has bundle version {version}, newer than {VERSION}; upgrade keye-jax")
    if version != VERSION:
        raise _damaged(f"version is {version!r}")
    if set(manifest) != _MANIFEST_KEYS:
        raise _damaged(f"keys {sorted(set(manifest) ^ _MANIFEST_KEYS)[:5]} are missing or unknown")
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


def _parse_groups(weights: dict[str, Any]) -> dict[str, StoredGroup]:
    groups = {}
    if not weights:
        raise _damaged("it lists no weights")
    for name, entry in weights.items():
        if not _NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != {"layer", "arrays"}:
            raise _damaged(f"weights group {name!r}")
        layer, arrays = entry["layer"], _typed(entry, "arrays", dict)
        if layer is not None and (type(layer) is not int or not 0 <= layer < 1 << 16):
            raise _damaged(f"layer of weights group {name!r}")
        groups[name] = StoredGroup(layer, {leaf: _parse_array(leaf, array) for leaf, array in arrays.items()})
    _leaves(groups)
    return groups


def _parse_array(leaf: str, entry: Any) -> StoredArray:
    if not _NAME.fullmatch(leaf) or not isinstance(entry, dict) or set(entry) != {"shape", "dtype"}:
        raise _damaged(f"array {leaf!r}")
    shape = _typed(entry, "shape", list)
    if len(shape) > _MAX_RANK or not all(type(extent) is int and 0 < extent < 1 << 40 for extent in shape):
        raise _damaged(f"shape of array {leaf!r}")
    return StoredArray(tuple(shape), _one_of(entry, "dtype", tuple(_ITEM_BYTES)))


def _parse_files(entries: list[Any]) -> dict[str, StoredFile]:
    files = {}
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"path", "bytes", "sha256"}:
            raise _damaged(f"file entry {entry!r:.80}")
        name, size, digest = _typed(entry, "path", str), _typed(entry, "bytes", int), _typed(entry, "sha256", str)
        if not _is_inside(name) or name in files or size < 0 or not _SHA256.fullmatch(digest):
            raise _damaged(f"file entry {name!r:.80}")
        files[name] = StoredFile(size, digest)
    return files


def _is_inside(name: str) -> bool:
    """A plain relative path with forward slashes, spelled the one way that does not climb."""
    path = PurePosixPath(name)
    plain = "\\" not in name and ":" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and str(path) == name != "."


def _typed(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(entry[key]) is not kind:
        raise _damaged(f"{key} is {entry[key]!r:.80}")
    return entry[key]


def _one_of(entry: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    if entry[key] not in allowed:
        raise _damaged(f"{key} is {entry[key]!r:.80}, not one of {', '.join(allowed)}")
    return entry[key]


_MEND = "copy the whole bundle again or convert again"


def _damaged(what: str) -> InputError:
    return InputError(f"{MANIFEST} of the bundle is damaged: {what}; {_MEND}")
