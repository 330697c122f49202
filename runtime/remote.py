"""Bundles in an object store: the small files come to a temporary folder, the weights stay where they are.

An address is what tensorstore takes: gs://bucket/name, s3://bucket/name, file:///path. Nothing but tensorstore is
needed, and it finds credentials as Google's and Amazon's own tools do.
"""

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.manifest import MANIFEST, WEIGHTS, parse_files, parse_graphs, read_manifest, typed

# Delays double from a second: an address out of reach is said within half a minute. tensorstore itself would ask for
# a quarter of an hour, which is right for weights and wrong for a slip of the pen.
_RETRIES = {"max_retries": 4}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://.+")


def is_address(path: str | os.PathLike[str]) -> bool:
    """True for gs://bucket/name and the like; False for a path."""
    return isinstance(path, str) and _ADDRESS.fullmatch(path) is not None


class RemoteFiles:
    """The files beneath an address."""

    def __init__(self, address: str):
        """Raises InputError for an address that tensorstore does not understand."""
        import tensorstore

        self.address = address.rstrip("/")
        with self._explained(""):
            context = tensorstore.Context({f"{store}_request_retries": _RETRIES for store in ("gcs", "s3")})
            self._store: Any = tensorstore.KvStore.open(f"{self.address}/", context=context).result()

    def read(self, name: str) -> bytes:
        """A whole file. Raises InputError if it is missing or out of reach."""
        with self._explained(name):
            found = self._store.read(name).result()
        if found.state != "value":
            raise InputError(f"{self.address}/{name} does not exist; give the address of a bundle that convert wrote")
        return found.value

    def names(self, folder: str) -> set[str]:
        """The names of all files beneath a folder, from the bundle's root."""
        from tensorstore import KvStore

        with self._explained(folder):
            # "0" follows "/": the range holds what begins with the folder's name and a slash.
            keys = self._store.list(KvStore.KeyRange(f"{folder}/", f"{folder}0")).result()
        return {key.decode() for key in keys}

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(
                f"{self.address}/{name} cannot be read ({reason}); check the address and your credentials"
            ) from None


def fetch_small_files(files: RemoteFiles) -> Path:
    """A private folder with the bundle's manifest, tokenizer and graphs, unchecked; it goes when the process ends.

    Raises:
        InputError: no bundle, or one that is out of reach.
    """
    folder = Path(tempfile.mkdtemp(prefix="keye-jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / MANIFEST).write_bytes(files.read(MANIFEST))
    manifest = read_manifest(folder)
    graphs = [graph.file for graph in parse_graphs(typed(manifest, "graphs", list)).values()]
    small = [name for name in parse_files(typed(manifest, "files", list)) if not name.startswith(f"{WEIGHTS}/")]
    for name in small + graphs:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.read(name))
    return folder
