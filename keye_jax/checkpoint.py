"""Reading an official checkpoint into this library's parameters.

Every tensor is checked against the configuration before any data is read (`hf_layout` says where each belongs), then
written through its view into the target a piece at a time: host memory holds the target and one piece.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.errors import CheckpointError
from keye_jax.hf_layout import View, expected_rows, is_ignored
from keye_jax.params import (
    SCALE,
    VALUES,
    ParamSpec,
    Path,
    StorageGroup,
    WeightFormat,
    flatten,
    kept_as,
    param_specs,
    unflatten,
)
from keye_jax.quantise import quantise
from keye_jax.safetensors import Tensor, open_folder

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total), counted in the target dtype."""

# Stacks up to this size are put together in host memory and sent at once; larger ones grow on the device,
# layer by layer, so that the host never holds a whole one (38.7 GB for the published expert weights).
_HOST_STACK_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """A part of a tensor that fills a target: its rows from `first`, as many as the view has."""

    tensor: Tensor
    first: int
    view: View


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors were all found to fit the configuration; no data read yet."""

    config: KeyeConfig
    sources: Mapping[tuple[Path, int | None], tuple[Source, ...]]
    """What fills each parameter; the number is the layer of a stacked one."""
    fingerprint: str
    """Changes whenever the files do; see `safetensors.TensorFiles`."""

    def fill(self, path: Path, layer: int | None, target: np.ndarray) -> None:
        """Reads one parameter (one layer of a stacked one) into `target`, converting to its dtype.

        Raises:
            CheckpointError: a value that is not finite in that dtype; a file that shrank.
        """
        for source in self.sources[path, layer]:
            view = source.view(target)
            stop = source.first + view.shape[0]
            for row, piece in source.tensor.read_rows(source.first, stop):
                values = piece.astype(target.dtype, copy=False)
                if not _all_finite(values):
                    raise CheckpointError(
                        f"tensor {source.tensor.name!r} in {source.tensor.file.name} holds a value that is "
                        f"not finite as {target.dtype}; fetch the file again"
                    )
                _copy_rows(view[row - source.first :], values)


def load_params(
    folder: str | os.PathLike[str],
    config: KeyeConfig,
    dtype: Any,
    *,
    weights: WeightFormat = "none",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads all weights of an official checkpoint folder.

    Args:
        dtype: float32 or bfloat16; parameters that the model fixes to float32 stay float32.
        weights: "int8" or "fp8" keeps the large matrices with 8 bits, quantised from their values in `dtype`.
        progress: called with (bytes done, bytes in total) after each array; bytes in `dtype`.

    Returns:
        The tree of `params.param_specs` with `jax.Array` leaves on the default device.

    Raises:
        CheckpointError: see `open_checkpoint` and `Checkpoint.fill`.
    """
    dtype = weight_dtype(dtype)
    checkpoint = open_checkpoint(folder, config)
    specs = dict(flatten(param_specs(config)))
    total = sum(spec.nbytes(dtype) for spec in specs.values())
    done = 0
    leaves = {}
    for path, spec in specs.items():
        leaves.update(_load_leaf(checkpoint, path, spec, dtype, weights))
        done += spec.nbytes(dtype)
        if progress is not None:
            progress(done, total)
    return unflatten(leaves)


def read_group(
    checkpoint: Checkpoint,
    group: StorageGroup,
    dtype: Any,
    *,
    memory: np.ndarray | None = None,
    scratch: np.ndarray | None = None,
) -> dict[Path, np.ndarray]:
    """Reads one storage group (see `params.storage_groups`): full path of each parameter → array as stored.

    Args:
        memory: bytes `[group_bytes(group, dtype)]` or more for the arrays to lie in, so that groups can be read one
            after another into pages that are there already; new memory without it.
        scratch: bytes `[scratch_bytes(group, dtype)]` or more, in use until the return.

    Raises:
        CheckpointError: see `Checkpoint.fill`.
    """
    dtype = weight_dtype(dtype)
    if memory is None:
        memory = np.empty(group_bytes(group, dtype), np.uint8)
    arrays, begin = {}, 0
    for path, spec in group.stored.items():
        end = begin + spec.nbytes(dtype)
        arrays[path] = memory[begin:end].view(spec.as_dtype(dtype)).reshape(spec.shape)
        begin = _aligned(end)
    for path, spec in group.specs.items():
        _fill(checkpoint, path, group.layer, spec, arrays, spec.as_dtype(dtype), scratch)
    return arrays


def _fill(
    checkpoint: Checkpoint,
    path: Path,
    layer: int | None,
    spec: ParamSpec,
    arrays: Mapping[Path, np.ndarray],
    dtype: np.dtype,
    scratch: np.ndarray | None = None,
) -> None:
    """Reads one parameter (one layer of a stacked one) into what is kept of it; see `params.kept_as`.

    Args:
        arrays: what to fill, by full path; more are ignored.
        dtype: of the parameter before it is quantised.
        scratch: bytes for it, if it is; new memory without them.
    """
    if path in arrays:
        checkpoint.fill(path, layer, arrays[path])
        return
    values = arrays[*path, VALUES]
    if scratch is None:
        scratch = np.empty(values.size * dtype.itemsize, np.uint8)
    wide = scratch[: values.size * dtype.itemsize].view(dtype).reshape(values.shape)
    checkpoint.fill(path, layer, wide)
    quantise(wide, spec.contracted, values, arrays[*path, SCALE])


def group_bytes(group: StorageGroup, dtype: Any) -> int:
    """Bytes of memory that `read_group` puts a group's arrays into."""
    return sum(_aligned(spec.nbytes(dtype)) for spec in group.stored.values())


def scratch_bytes(group: StorageGroup, dtype: Any) -> int:
    """Bytes of memory that `read_group` needs beside a group's arrays."""
    quantised = (spec.nbytes(dtype) for path, spec in group.specs.items() if path not in group.stored)
    return max(quantised, default=0)


def open_checkpoint(folder: str | os.PathLike[str], config: KeyeConfig) -> Checkpoint:
    """Reads the headers of all shards and checks every tensor against the configuration.

    Raises:
        CheckpointError: damaged files; a tensor that is missing, unexpected, misshapen or not floating.
    """
    files = open_folder(folder)
    found = files.tensors
    specs = dict(flatten(param_specs(config)))
    sources: dict[tuple[Path, int | None], tuple[Source, ...]] = {}
    used = set()
    for name, row, layer in expected_rows(config, found):
        # Stopping at the first name that is missing also bounds what a forged config.json can make this loop do.
        if name not in found:
            raise CheckpointError(f"missing tensor {name!r}; the download is incomplete or config.json was changed")
        used.add(name)
        tensor, first, shape = found[name], 0, ()
        for path, view in row.targets:
            part = view(_blank(specs[path])).shape
            key = (path, layer if specs[path].stacked else None)
            sources[key] = (*sources.get(key, ()), Source(tensor, first, view))
            first += part[0]
            shape = (first, *part[1:])
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)} where config.json asks for {list(shape)}; "
                "the weights belong to another model or config.json was changed"
            )
        tensor.check_floating()
    for name in sorted(found.keys() - used):
        if not is_ignored(name):
            raise CheckpointError(
                f"unexpected tensor {name!r}; the weights belong to another model or config.json was changed"
            )
    return Checkpoint(config, sources, files.fingerprint)


def weight_dtype(dtype: Any) -> np.dtype:
    """The numpy type of float32 or bfloat16 (name or type). Raises CheckpointError for any other."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (np.float32, ml_dtypes.bfloat16):
        raise CheckpointError(f"dtype {dtype!r} is not supported for weights; use float32 or bfloat16")
    return np.dtype(found)


def _aligned(count: int) -> int:
    """The next multiple of 64 bytes: a cache line, and aligned for every dtype."""
    return -(-count // 64) * 64


def _blank(spec: ParamSpec) -> np.ndarray:
    """An array of a parameter's shape (of one layer) that takes no memory: views of it tell shapes."""
    return np.broadcast_to(np.float32(0), spec.shape[1:] if spec.stacked else spec.shape)


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:
        # All exponent bits set: seven times as fast as isfinite for this type.
        return bool((values.view(np.uint16) << 1).max(initial=0) < 0xFF00)
    return bool(np.isfinite(values).all())


def _copy_rows(view: np.ndarray, values: np.ndarray) -> None:
    """view[:len(values)] = values; blocks of 64 rows keep a transposition in cache, which doubles its speed."""
    for row in range(0, len(values), 64):
        block = values[row : row + 64]
        view[row : row + len(block)] = block


def _load_leaf(
    checkpoint: Checkpoint, path: Path, spec: ParamSpec, dtype: np.dtype, weights: WeightFormat
) -> dict[Path, jax.Array]:
    """A parameter, or what is kept of it, by full path."""
    kept, wide = kept_as(path, spec, weights), spec.as_dtype(dtype)
    if not spec.stacked or spec.nbytes(dtype) <= _HOST_STACK_BYTES:
        hosts = {name: np.empty(array.shape, array.as_dtype(dtype)) for name, array in kept.items()}
        for layer in range(spec.shape[0]) if spec.stacked else [None]:
            own = hosts if layer is None else {name: host[layer] for name, host in hosts.items()}
            _fill(checkpoint, path, layer, spec, own, wide)
        return {name: jax.device_put(host) for name, host in hosts.items()}
    stacks = {name: jnp.zeros(array.shape, array.as_dtype(dtype)) for name, array in kept.items()}
    for layer in range(spec.shape[0]):
        own = {name: np.empty(array.shape[1:], array.as_dtype(dtype)) for name, array in kept.items()}
        _fill(checkpoint, path, layer, spec, own, wide)
        stacks = {name: _set_layer(stack, own[name], layer) for name, stack in stacks.items()}
    return stacks


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, values: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, values, layer, 0)
