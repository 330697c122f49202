"""Bundles: what `python -m convert` writes and everything here runs from.

A bundle is a folder with `manifest.json`, the tokenizer's files and `weights/`: one Orbax checkpoint (OCDBT) for
each storage group, holding that group's arrays under their full paths, a layer's arrays without the layer axis. It may
lie in an object store (`runtime.remote`), and its weights may go to any devices (`runtime.weights`).
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import graphs, remote
from runtime.errors import InputError
from runtime.graphs import ANY_CHIP, GraphEntry, GraphKey
from runtime.manifest import (
    DTYPES,
    INDEXER_DTYPES,
    MANIFEST,
    MEND,
    TOKENIZER,
    WEIGHT_FORMATS,
    WEIGHTS,
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
from runtime.remote import RemoteFiles
from runtime.weights import Parameter, WeightReader, local_bytes, sharding_of

if TYPE_CHECKING:
    from jax.export import Exported

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""


@dataclass(frozen=True)
class Bundle:
    """A complete bundle whose manifest fits its files."""

    path: Path
    """The folder, or for a bundle in an object store a temporary one with everything but the weights."""
    config: dict[str, Any]
    """The official config.json, as the model library reads it."""
    dtype: str
    """Of weights and activations: "bfloat16" or "float32"."""
    indexer_dtype: str
    """Number format of the lightning indexer: "fp8", "bf16" or "float32"."""
    weight_format: str
    """Of the text decoder's large matrices: "int8" or "fp8", each with float32 scales; "none": they are in `dtype`."""
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
    remote: RemoteFiles | None = None
    """Where the weights are, if not in `path`."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Reads the manifest and checks it against the files: presence and size of all, sha256 of all but weights.

        Args:
            path: a folder, or the address of one in an object store such as gs://bucket/name, where the weights' files
                are checked for presence only.

        Raises:
            InputError: not a bundle, an unfinished one, one from a newer version, missing or altered files.
        """
        files = RemoteFiles(str(path)) if remote.is_address(path) else None
        root = remote.fetch_small_files(files) if files else Path(path)
        manifest = read_manifest(root)
        bundle = cls(
            path=root,
            config=typed(manifest, "config", dict),
            dtype=one_of(manifest, "dtype", DTYPES),
            indexer_dtype=one_of(manifest, "indexer_dtype", INDEXER_DTYPES),
            weight_format=one_of(manifest, "weight_format", WEIGHT_FORMATS),
            processor_settings=typed(manifest, "processor", dict),
            source=typed(manifest, "source", str),
            groups=parse_groups(typed(manifest, "weights", dict)),
            shapes_only=typed(manifest, "shapes_only", bool),
            files=parse_files(typed(manifest, "files", list)),
            graphs=parse_graphs(typed(manifest, "graphs", list)),
            remote=files,
        )
        if not bundle.shapes_only:
            bundle._check_stored_bytes()
        bundle._check_files()
        return bundle

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json; None for a bundle made from a folder without one."""
        return self.path / TOKENIZER if TOKENIZER in self.files else None

    def verify(self, *, group: str | None = None, progress: Progress | None = None) -> None:
        """Reads every file, or those of one storage group, and compares it with its sha256.

        Raises:
            InputError: names the first file that differs.
        """
        prefix = f"{WEIGHTS}/{group}/" if group else ""
        files = {name: file for name, file in self.files.items() if name.startswith(prefix)}
        total = sum(file.bytes for file in files.values())
        done = 0
        for name, file in files.items():
            self._check_sha256(name, file)
            done += file.bytes
            if progress is not None:
                progress(done, total)

    def load_params(
        self, *, shardings: Mapping[str, Any] | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Reads all weights onto the default device, or onto the devices of this process as `shardings` says.

        Each process reads the chunks that its own shards touch, once, whatever mesh the shardings belong to.

        Args:
            shardings: a tree like the result with a `jax.sharding.Sharding` for every array (more are ignored).
            progress: called with bytes of this process's shards.

        Returns:
            Nested dictionaries with `jax.Array` leaves; the layers' arrays stacked on a leading axis.

        Raises:
            InputError: the store does not hold what the manifest says.
            ValueError: `shardings` lacks an array.
        """
        if self.shapes_only:
            raise InputError(
                f"{self.path} describes weights and holds none (convert --shapes-only); convert the whole checkpoint"
            )
        reader = self._reader()
        placed = [(parameter, sharding_of(shardings, parameter.leaf)) for parameter in self._parameters()]
        total = sum(local_bytes(parameter, sharding) for parameter, sharding in placed)
        done = 0

        def count(arrived: int) -> None:
            nonlocal done
            done += arrived
            if progress is not None:
                progress(done, total)

        tree: dict[str, Any] = {}
        for parameter, sharding in placed:
            _insert(tree, parameter.leaf, reader.load(parameter, sharding, count))
        return tree

    def read_rows(self, group: str, leaf: str) -> Iterator[tuple[int, Any]]:
        """One array of a storage group as numpy arrays of bounded size: (first row, rows). Raises as `load_params`."""
        return self._reader().rows(leaf, self.groups[group].arrays[leaf], group)

    def abstract_params(self) -> dict[str, Any]:
        """The tree of `load_params` with `jax.ShapeDtypeStruct` leaves."""
        import jax

        tree: dict[str, Any] = {}
        for parameter in self._parameters():
            struct = jax.ShapeDtypeStruct(parameter.shape, jax.numpy.dtype(parameter.array.dtype))
            _insert(tree, parameter.leaf, struct)
        return tree

    def add_graph(self, key: GraphKey, exported: "Exported", *, device_kind: str = ANY_CHIP) -> GraphEntry:
        """Stores a graph in the bundle, in the place of one of the same key. Several processes may add at once.

        Raises:
            OSError: the bundle cannot be written.
        """
        if self.remote is not None:
            raise OSError(errno.EROFS, "graphs are added to a bundle's own folder", self.remote.address)
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

    def _parameters(self) -> Iterator[Parameter]:
        for leaf, groups in leaf_groups(self.groups).items():
            first = self.groups[groups[0]]
            yield Parameter(leaf, first.arrays[leaf], groups, stacked=first.layer is not None)

    def _reader(self) -> WeightReader:
        return WeightReader(self.remote.address if self.remote else self.path)

    def _check_stored_bytes(self) -> None:
        # Arrays are stored uncompressed, so this bounds what a forged manifest can make the loader allocate.
        arrays = sum(array.nbytes for group in self.groups.values() for array in group.arrays.values())
        stored = sum(file.bytes for name, file in self.files.items() if name.startswith(WEIGHTS + "/"))
        if arrays > stored:
            raise damaged(f"weights of {arrays} bytes in files of {stored} bytes")

    def _check_files(self) -> None:
        root = self.path.resolve()
        in_store = self.remote.names(WEIGHTS) if self.remote else set()
        for name, file in self.files.items():
            if name in in_store:
                continue
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
        if self.remote is not None and name.startswith(f"{WEIGHTS}/"):
            where, found = f"{self.remote.address}/{name}", hashlib.sha256(self.remote.read(name)).hexdigest()
        else:
            where, found = self.path / name, file_sha256(self.path / name)
        if found != file.sha256:
            raise InputError(f"{where} differs from its sha256 in {MANIFEST}; {MEND}")


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
