"""Gathering rows into shared memory with asynchronous copies, for Mosaic GPU kernels on Hopper.

Pallas has no gather into swizzled tiles: its bulk copies move a row into one place, but the tensor cores want the
halves of a row of 256 bytes in different tiles, with pieces of 16 bytes permuted. `cp.async` lets every lane choose its
16 bytes, so this is written in PTX. A warpgroup takes 128 rows, a warp two of its 32 at a time, 16 lanes a row; the
numbers of the rows stay in registers, one a lane, where lists in shared memory would leave no room for a third tile.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""Layout of an [n, 128] tile of 16-bit values as the tensor cores read it: tiles of 8 rows x 128 bytes, and piece j
(16 bytes) of row i at place j ^ i."""

ROW_BYTES, LANES_A_ROW = 256, 16

LANES = 128

_ENTRY = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

_LANE = "mov.u32 t, %tid.x; and.b32 t, t, 127;"


@dataclass(frozen=True)
class Place:
    """Where the entries of a part of one of `gpu_lists.Halves` lie: those of numbers first <= u < end.

    Attributes:
        front, middle: a, and a + b, of the list's counts.
        half: the list's first entry for the second half of the queries.
    """

    first: Any
    end: Any
    front: Any
    middle: Any
    half: int

    def of(self, lane: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Index in the list of each lane's entry, and whether there is one."""
        u = self.first + lane
        at = jnp.where(u < self.front, u, self.half - 1 - (u - self.front))
        return jnp.where(u < self.middle, at, self.half + (u - self.middle)), u < self.end


@dataclass(frozen=True)
class Rows:
    """Keys and values of one head among rows [N, 128] of 16-bit values.

    Attributes:
        ref: the rows; those of key s are `first` + 2 heads s for the key and `heads` more for the value.
        first: int32 scalar.
        heads: key/value heads of the cache.
        interpret: copy at once, in plain Pallas.
    """

    ref: Any
    first: jax.Array
    heads: int
    interpret: bool

    def load_lists(self, lists: tuple[Any, Any], place: "Place") -> tuple[jax.Array, jax.Array]:
        """128 entries of two lists [n] int32 in global memory, zero behind the end: one entry a lane."""
        if self.interpret:
            at, used = place.of(jnp.arange(LANES, dtype=jnp.int32))
            ids, members = (jnp.where(used, ref[...][jnp.where(used, at, 0)], 0) for ref in lists)
            return ids, members
        entry = plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=_ENTRY)
        scalar = plgpu.Layout.WG_SPLAT(())
        types = plgpu.RefType(), plgpu.RefType(), scalar, scalar, scalar, scalar

        @plgpu.inline_mgpu(arg_types=types, return_type=(entry, entry))
        def load(_: Any, ids: Any, members: Any, *numbers: Any) -> Any:
            i32 = ir.IntegerType.get_signless(32)
            operands = [_address(ids), _address(members), *(x.registers.item() for x in numbers)]
            loaded: Any = llvm.inline_asm(
                llvm.StructType.get_literal([i32, i32]),
                operands,
                _LOAD_LISTS.format(half=place.half, last=place.half - 1),
                "=&r,=&r,l,l,r,r,r,r",
                has_side_effects=True,
            )
            return tuple(_one_a_lane(llvm.extractvalue(i32, loaded, [i])) for i in range(2))

        return load(*lists, place.first, place.end, place.front, place.middle)

    def gather(self, ids: jax.Array, tile: Any, values: bool) -> None:
        """Starts to copy the keys or values of `ids`, one a lane as from `load_lists`, into a [128, 128] tile."""
        own = self.heads * values
        if self.interpret:
            tile[...] = self.ref[...][self.first + own + ids * (2 * self.heads)]
            return
        code = _gather_code(self.heads)

        def emit(_: Any, rows: Any, first: Any, ids: Any, tile: Any) -> None:
            id = vector.extract(ids.registers.item(), dynamic_position=[], static_position=[0])
            _asm(code, "l,r,r,r", _address(rows), first.registers.item(), id, _address(tile))

        scalar = plgpu.Layout.WG_SPLAT(())
        start = _inline(emit, plgpu.RefType(), scalar, _ENTRY, plgpu.RefType(TRANSFORMS))
        start(self.ref, self.first + own, ids, tile)

    def commit(self) -> None:
        """Closes a group of copies."""
        self._plain("cp.async.commit_group;")

    def wait(self, groups: int) -> None:
        """Waits until at most this many of the latest groups of this lane are under way."""
        self._plain(f"cp.async.wait_group {groups};")

    def _plain(self, code: str) -> None:
        if not self.interpret:
            _inline(lambda _: _asm(code, ""))()


def _gather_code(heads: int) -> str:
    """PTX; operands: address of the rows, first row, the lane's id, shared address of the tile. A warp copies the rows
    of its own lanes' ids, two at a time."""
    lines = [
        "{ .reg .u32 t, odd, piece, x, y, k; .reg .u64 base, p;",
        ".reg .u32 from, id, k<4>;",
        _LANE,
        f"shr.u32 x, t, 5; mad.lo.u32 k, x, {32 * ROW_BYTES}, $3;",
        f"shr.u32 odd, t, 4; and.b32 odd, odd, 1; and.b32 piece, t, {LANES_A_ROW - 1};",
        # Half of the row.
        "shr.u32 x, piece, 3; mad.lo.u32 k, x, 1024, k; and.b32 x, piece, 7;",
        f"mad.wide.u32 base, $1, {ROW_BYTES}, $0; mad.wide.u32 base, piece, 16, base;",
    ]
    for i in range(4):
        # Row in the tile of 8, swizzled piece.
        lines.append(
            f"add.u32 y, odd, {2 * i}; mad.lo.u32 k{i}, y, 128, k; xor.b32 y, y, x; mad.lo.u32 k{i}, y, 16, k{i};"
        )
    for j in range(LANES // 8):
        lines += [
            f"add.u32 from, odd, {2 * j}; shfl.sync.idx.b32 id, $2, from, 31, 0xffffffff;",
            f"mad.wide.u32 p, id, {2 * heads * ROW_BYTES}, base;",
            f"cp.async.cg.shared.global [k{j % 4} + {j // 4 * 8 * ROW_BYTES}], [p], 16;",
        ]
    return "\n".join([*lines, "}"])


_LOAD_LISTS = f"""{{{{ .reg .u32 t, u, x, y; .reg .pred p; .reg .u64 o, q;
{_LANE} add.u32 u, t, $4; mov.u32 $0, 0; mov.u32 $1, 0;
sub.u32 y, $6, u; add.u32 y, y, {{last}}; setp.lt.s32 p, u, $6; selp.b32 x, u, y, p;
sub.u32 y, u, $7; add.u32 y, y, {{half}}; setp.lt.s32 p, u, $7; selp.b32 x, x, y, p;
setp.lt.s32 p, u, $5; mul.wide.u32 o, x, 4; add.u64 q, $2, o; @p ld.global.nc.u32 $0, [q];
add.u64 q, $3, o; @p ld.global.nc.u32 $1, [q]; }}}}"""
"""PTX of `Place.of` and the loads; operands: two entries, addresses of the lists, first, end, front, middle."""


def _one_a_lane(value: Any) -> Any:
    register = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    registers = np.empty((1,), object)
    registers[0] = register
    layout = mgpu.WGStridedFragLayout((LANES,), 1)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _inline(emit: Any, *arg_types: Any) -> Any:
    return plgpu.inline_mgpu(arg_types=arg_types)(emit)


def _address(ref: Any) -> Any:
    pointer = mgpu.utils.memref_ptr(ref)
    shared = str(pointer.type) == "!llvm.ptr<3>"
    return llvm.ptrtoint(ir.IntegerType.get_signless(32 if shared else 64), pointer)


def _asm(code: str, operands: str, *args: Any) -> None:
    llvm.inline_asm(None, args, code, operands, has_side_effects=True)
