"""A training run on disk: weights, optimizer state and step in one .npz, replaced as a whole."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from keye_jax.params import flatten, unflatten


def save_state(path: Path, params: dict[str, Any], state: Any, step: int) -> None:
    """Writes `path`; an interruption leaves the previous one."""
    arrays: dict[str, Any] = {"params/" + "/".join(name): np.asarray(leaf) for name, leaf in flatten(params)}
    arrays |= {f"state/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    fresh = path.with_suffix(".part.npz")
    np.savez(fresh, step=np.int64(step), **arrays)
    os.replace(fresh, path)


def load_state(path: Path, like: dict[str, Any]) -> tuple[dict[str, Any], list[Any], int] | None:
    """Weights, the leaves of the optimizer's state and the step; None where there is no `path`.

    Raises:
        ValueError: the weights are not shaped like `like`.
    """
    if not path.exists():
        return None
    with np.load(path) as file:
        loaded = {name: file["params/" + "/".join(name)] for name, _ in flatten(like)}
        count = sum(name.startswith("state/") for name in file.files)
        leaves = [file[f"state/{i}"] for i in range(count)]
        step = int(file["step"])
    for name, leaf in flatten(like):
        if loaded[name].shape != leaf.shape:
            raise ValueError(f"{path}: {'/'.join(name)} is {loaded[name].shape}, the model has {leaf.shape}")
    return jax.device_put(unflatten(loaded)), leaves, step
