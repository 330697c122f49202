"""Reading stored weights through tensorstore, straight into the memory of the devices that shall hold them.

tensorstore is the store beneath Orbax: importing Orbax itself takes longer than loading a small model, and restoring
would need the model library's parameter tree. Each process reads the chunks that its own devices' shards touch, every
one once, in pieces; host memory holds the pieces in flight.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError
from runtime.manifest import ITEM_BYTES, MEND, WEIGHTS, StoredArray, damaged

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Sharding

Region = tuple[tuple[int, int], ...]
"""(start, stop) on every axis of an array."""
Start = tuple[int, ...]
Piece = tuple[Start, list["np.ndarray"]]
"""Where a piece begins in each of several regions of one size, and what each has there."""

# Shards of one parameter up to this size are put together in host memory and sent at once; larger ones grow on the
# device, piece by piece, so that the host never holds a whole one (38.7 GB for the published expert weights).
_HOST_BYTES = 64 << 20
# What is read at a time; as much again is on its way meanwhile.
_PIECE_BYTES = 64 << 20
_INDEX_BYTES = 16 << 20


@dataclass(frozen=True)
class Parameter:
    """A parameter as the program has it, and where it lies."""

    leaf: str
    """Its dotted path."""
    array: StoredArray
    """What each group holds of it."""
    groups: list[str]
    """The one group, or those of all layers in their order."""
    stacked: bool
    """Whether it has a leading layer axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.groups), *self.array.shape) if self.stacked else self.array.shape


class WeightReader:
    """Arrays of a bundle's Orbax checkpoints, by storage group and dotted path."""

    def __init__(self, root: Path | str) -> None:
        """`root`: the bundle's folder, or its address for a store that tensorstore knows, such as gs://bucket/name."""
        import tensorstore

        self._tensorstore = tensorstore
        self._root = root if isinstance(root, str) else root.resolve()
        # Index nodes are shared by all arrays of a group, and a chunk by the devices that hold parts of it.
        self._context = tensorstore.Context(
            {
                "cache_pool": {"total_bytes_limit": _PIECE_BYTES},
                "cache_pool#index": {"total_bytes_limit": _INDEX_BYTES},
            }
        )

    def load(self, parameter: Parameter, sharding: "Sharding | None", report: Callable[[int], None]) -> Any:
        """A parameter as `jax.Array`.

        Args:
            sharding: how it lies on the devices; None: on the default device.
            report: called with the bytes of every piece that has arrived.

        Raises:
            InputError: the store does not hold what the manifest says.
        """
        import jax

        places = _places(parameter, sharding)
        local = tuple(stop - start for start, stop in next(iter(places)))
        dtype = jax.numpy.dtype(parameter.array.dtype)
        targets = [(number, device) for number, devices in enumerate(places.values()) for device in devices]
        pieces = self._pieces(parameter, list(places), report)
        small = math.prod(local) * dtype.itemsize * len(places) <= _HOST_BYTES
        shards = (_sent if small else _grown)(pieces, local, dtype, targets)
        if sharding is None:
            return shards[0]
        return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)

    def rows(self, leaf: str, array: StoredArray, group: str) -> Iterator[tuple[int, "np.ndarray"]]:
        """One group's array in bounded pieces of its first axis: (first row, rows). Raises InputError as `load`."""
        whole = tuple((0, extent) for extent in array.shape)
        for start, (part,) in self._pieces(Parameter(leaf, array, [group], stacked=False), [whole], lambda count: None):
            yield start[0], part

    def _pieces(
        self, parameter: Parameter, regions: Sequence[Region], report: Callable[[int], None]
    ) -> Iterator[Piece]:
        """Pieces of regions of equal size, in step, while the next are on their way."""
        try:
            stores = self._open(parameter)
            waiting: deque[tuple[int, Start, list[Any]]] = deque()
            for reading in _reads(stores, regions, stacked=parameter.stacked):
                waiting.append(reading)
                while len(waiting) > 1 and sum(count for count, _, _ in waiting) > _PIECE_BYTES:
                    yield _arrived(*waiting.popleft(), report)
            while waiting:
                yield _arrived(*waiting.popleft(), report)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{self._root}: cannot read weights {parameter.leaf} ({reason}); {MEND}") from None

    def _open(self, parameter: Parameter) -> list[Any]:
        array = parameter.array
        stores = [store.result() for store in [self._opening(parameter.leaf, group) for group in parameter.groups]]
        for store, group in zip(stores, parameter.groups, strict=True):
            if store.shape != array.shape or store.dtype.name != array.dtype or not array.shape:
                raise damaged(f"{group}: {parameter.leaf} is {store.dtype.name} {store.shape}")
        return stores

    def _opening(self, leaf: str, group: str) -> Any:
        folder = self._tensorstore.KvStore.Spec(_base(self._root, group)).to_json()
        spec = {
            "driver": "zarr",
            # A bundle does not change; otherwise every read would ask again for a chunk that is there.
            "recheck_cached_data": "open",
            "kvstore": {"driver": "ocdbt", "base": folder, "path": f"{leaf}/", "cache_pool": "cache_pool#index"},
        }
        return self._tensorstore.open(spec, open=True, read=True, context=self._context)


def local_bytes(parameter: Parameter, sharding: "Sharding | None") -> int:
    """Bytes of a parameter that this process reads: each part of it once, on however many devices it is."""
    parts = (math.prod(stop - start for start, stop in region) for region in _places(parameter, sharding))
    return sum(parts) * ITEM_BYTES[parameter.array.dtype]


def _places(parameter: Parameter, sharding: "Sharding | None") -> dict[Region, list[Any]]:
    """Which parts of a parameter this process holds: region → devices, [None] for the default device."""
    if sharding is None:
        return {tuple((0, extent) for extent in parameter.shape): [None]}
    found: dict[Region, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
        bounds = (part.indices(extent) for part, extent in zip(index or (), parameter.shape, strict=True))
        found.setdefault(tuple((start, stop) for start, stop, _ in bounds), []).append(device)
    return found


def _reads(stores: list[Any], regions: Sequence[Region], *, stacked: bool) -> Iterator[tuple[int, Start, list[Any]]]:
    """Starts to read, in the order of the pieces: (bytes, where in each region, a future for each region)."""
    layers = [region[0] for region in regions] if stacked else [(0, 1)] * len(regions)
    inner = [region[1:] if stacked else region for region in regions]
    extents = [stop - start for start, stop in inner[0]]
    row_bytes = math.prod(extents[1:]) * stores[0].dtype.numpy_dtype.itemsize * len(regions)
    # Whole chunks, as many as make a piece: part of one costs as much to read.
    chunk = stores[0].chunk_layout.read_chunk.shape[0]
    step = max(1, _PIECE_BYTES // (row_bytes * chunk)) * chunk
    for layer in range(layers[0][1] - layers[0][0]):
        for first in range(0, extents[0], step):
            count = min(step, extents[0] - first)
            reads = []
            for (bottom, _), bounds in zip(layers, inner, strict=True):
                begin = bounds[0][0] + first
                index = (slice(begin, begin + count), *(slice(*bound) for bound in bounds[1:]))
                reads.append(stores[bottom + layer][index].read())
            start = (first, *(0 for _ in extents[1:]))
            yield count * row_bytes, ((layer, *start) if stacked else start), reads


def _base(root: Path | str, group: str) -> Any:
    """Where a group's checkpoint lies, as tensorstore takes it."""
    if isinstance(root, str):
        return f"{root}/{WEIGHTS}/{group}/"
    return {"driver": "file", "path": f"{root / WEIGHTS / group}/"}


def _arrived(count: int, start: Start, reads: list[Any], report: Callable[[int], None]) -> Piece:
    arrays = [read.result() for read in reads]
    report(count)
    # A piece of a stack has the layer axis too.
    return start, [array.reshape((1,) * (len(start) - array.ndim) + array.shape) for array in arrays]


def _sent(pieces: Iterator[Piece], shape: tuple[int, ...], dtype: Any, targets: list[tuple[int, Any]]) -> list[Any]:
    """The shards for `targets` (number of the region, device), each put together here and sent whole."""
    import jax
    import numpy as np

    hosts = {number: np.empty(shape, dtype) for number, _ in targets}
    for start, parts in pieces:
        for number, part in enumerate(parts):
            hosts[number][tuple(slice(at, at + extent) for at, extent in zip(start, part.shape, strict=True))] = part
    return [jax.device_put(hosts[number], device) for number, device in targets]


def _grown(pieces: Iterator[Piece], shape: tuple[int, ...], dtype: Any, targets: list[tuple[int, Any]]) -> list[Any]:
    """The same, put together on the devices."""
    import jax

    shards = [jax.numpy.zeros(shape, dtype, device=device) for _, device in targets]
    for start, parts in pieces:
        shards = [_put()(shard, parts[number], start) for shard, (number, _) in zip(shards, targets, strict=True)]
        # Transfers lag behind; without waiting, pieces would pile up in host memory.
        jax.block_until_ready(shards)
    return shards


@cache
def _put() -> Callable[..., Any]:
    """The jitted in-place update; made on first use so that this module does not import jax."""
    import jax

    return jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def sharding_of(shardings: Mapping[str, Any] | None, leaf: str) -> "Sharding | None":
    """The sharding of a parameter in a tree of the parameters' shape. Raises ValueError if the tree lacks it."""
    node: Any = shardings
    if node is None:
        return None
    try:
        for name in leaf.split("."):
            node = node[name]
    except (KeyError, TypeError):
        raise ValueError(f"the shardings have none for {leaf}") from None
    return node
