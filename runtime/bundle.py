"""Bundles: what `python -m convert` writes and everything here runs from.

A bundle is a folder with `manifest.json`, the tokenizer's files and `weights/`: one Orbax checkpoint (OCDBT) for
each storage group, holding that group's arrays under their full paths, a layer's arrays without the layer axis.
Weights are read through tensorstore, which is the store beneath Orbax: importing Orbax itself takes longer than
loading a small model, and restoring would need the model library's parameter tree.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import graphs
from runtime.errors import InputError
from runtime.graphs import GraphEntry, GraphKey
from runtime.manifest import (
    INDEXER_DTYPES,
    ITEM_BYTES,
    MANIFEST,
    MEND,
    TOKENIZER,
    WEIGHTS,
    StoredArray,
    StoredFile,
    StoredGroup,
    damaged,
    leaf_groups,
    one_of,
    parse_files,
    parse_graphs,
    parse_groups,
    read_manifest,
    typed,
    write_file,
    write_manifest,
)

if TYPE_CHECKING:
    from jax.export import Exported

# Stacks up to this size are put together in host memory and sent at once; larger ones grow on the device,
# layer by layer, so that the host never holds a whole one (38.7 GB for the published expert weights).
_HOST_STACK_BYTES = 256 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""


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
    shapes_only: bool
    """The weights are described and not stored: enough to export and compile, not to run."""
    files: Mapping[str, StoredFile]
    """Every file by its path in the bundle, except the manifest and the graphs."""
    graphs: dict[GraphKey, GraphEntry]
    """The exported graphs; `add_graph` adds to them."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Reads the manifest and checks it against the files: presence and size of all, sha256 of all but weights.

        Raises:
            InputError: not a bundle, an unfinished one, one from a newer version, missing or altered files.
        """
        root = Path(path)
        manifest = read_manifest(root)
        bundle = cls(
            path=root,
            config=typed(manifest, "config", dict),
            dtype=one_of(manifest, "dtype", tuple(ITEM_BYTES)),
            indexer_dtype=one_of(manifest, "indexer_dtype", INDEXER_DTYPES),
            processor_settings=typed(manifest, "processor", dict),
            source=typed(manifest, "source", str),
            groups=parse_groups(typed(manifest, "weights", dict)),
            shapes_only=typed(manifest, "shapes_only", bool),
            files=parse_files(typed(manifest, "files", list)),
            graphs=parse_graphs(typed(manifest, "graphs", list)),
        )
        if not bundle.shapes_only:
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
        if self.shapes_only:
            raise InputError(
                f"{self.path} describes weights and holds none (convert --shapes-only); convert the whole checkpoint"
            )
        reader = _ArrayReader(self.path)
        total = sum(array.nbytes for group in self.groups.values() for array in group.arrays.values())
        done = 0
        tree: dict[str, Any] = {}
        for leaf, groups in leaf_groups(self.groups).items():
            array = self.groups[groups[0]].arrays[leaf]
            stacked = self.groups[groups[0]].layer is not None
            _insert(tree, leaf, reader.load(leaf, array, groups, stacked=stacked))
            done += array.nbytes * len(groups)
            if progress is not None:
                progress(done, total)
        return tree

    def read_group(self, name: str) -> dict[str, Any]:
        """One storage group as numpy arrays, by dotted path. Raises InputError as `load_params` does."""
        reader = _ArrayReader(self.path)
        return {leaf: reader.read(leaf, array, [name])[0] for leaf, array in self.groups[name].arrays.items()}

    def abstract_params(self) -> dict[str, Any]:
        """The tree of `load_params` with `jax.ShapeDtypeStruct` leaves."""
        import jax

        tree: dict[str, Any] = {}
        for leaf, groups in leaf_groups(self.groups).items():
            array, stacked = self.groups[groups[0]].arrays[leaf], self.groups[groups[0]].layer is not None
            shape = (len(groups), *array.shape) if stacked else array.shape
            _insert(tree, leaf, jax.ShapeDtypeStruct(shape, jax.numpy.dtype(array.dtype)))
        return tree

    def add_graph(self, key: GraphKey, exported: "Exported", *, device_kind: str = "any") -> GraphEntry:
        """Stores a graph in the bundle, in the place of one of the same key. Several processes may add at once.

        Raises:
            OSError: the bundle cannot be written.
        """
        entry, content = graphs.describe(key, exported, device_kind)
        folder = self.path / graphs.FOLDER
        folder.mkdir(exist_ok=True)
        with _locked(folder):
            manifest = read_manifest(self.path)
            stored = parse_graphs(manifest["graphs"])
            old = stored.get(key)
            # A name of its own content: until the manifest changes, the old graph stays whole.
            write_file(self.path / entry.file, content)
            stored[key] = entry
            write_manifest(self.path, {**manifest, "graphs": [g.to_json() for _, g in sorted(stored.items())]})
            if old is not None and old.file != entry.file:
                (self.path / old.file).unlink(missing_ok=True)
        self.graphs[key] = entry
        return entry

    def _check_stored_bytes(self) -> None:
        # Arrays are stored uncompressed, so this bounds what a forged manifest can make the loader allocate.
        arrays = sum(array.nbytes for group in self.groups.values() for array in group.arrays.values())
        stored = sum(file.bytes for name, file in self.files.items() if name.startswith(WEIGHTS + "/"))
        if arrays > stored:
            raise damaged(f"weights of {arrays} bytes in files of {stored} bytes")

    def _check_files(self) -> None:
        root = self.path.resolve()
        for name, file in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise InputError(f"{path} is missing from the bundle; {MEND}")
            if not path.resolve().is_relative_to(root):
                raise InputError(f"{path} is a link out of the bundle; put the file itself there")
            size = path.stat().st_size
            if size != file.bytes:
                raise InputError(f"{path} has {size} bytes, {file.bytes} in {MANIFEST}; {MEND}")
            if not name.startswith(WEIGHTS + "/"):
                self._check_sha256(name, file)

    def _check_sha256(self, name: str, file: StoredFile) -> None:
        if file_sha256(self.path / name) != file.sha256:
            raise InputError(f"{self.path / name} differs from its sha256 in {MANIFEST}; {MEND}")


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
                    raise damaged(f"{group}: {leaf} is {store.dtype.name} {store.shape}")
            return [read.result() for read in [store.read() for store in stores]]
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{self._bundle}: cannot read weights {leaf} ({reason}); {MEND}") from None

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


def _insert(tree: dict[str, Any], leaf: str, value: Any) -> None:
    """Puts a leaf into nested dictionaries at its dotted path."""
    *parents, name = leaf.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
