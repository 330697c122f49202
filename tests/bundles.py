"""Copies of the shared bundles, for tests that alter them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.graphs import FOLDER
from runtime.manifest import MANIFEST, write_manifest


def copy_without_graphs(bundle: Path, target: Path) -> Path:
    """Other tests may have left graphs in a shared bundle."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns(FOLDER))
    edit_manifest(target, lambda manifest: manifest.update(graphs=[]))
    return target


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and gives it the digest that belongs to the change."""
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    write_manifest(root, manifest)


def read_group(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """One storage group's arrays by dotted path."""
    arrays = bundle.groups[name].arrays
    return {leaf: np.concatenate([rows for _, rows in bundle.read_rows(name, leaf)]) for leaf in arrays}
