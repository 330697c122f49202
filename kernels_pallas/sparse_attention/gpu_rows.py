"""Gathering rows into shared memory with asynchronous copies, for Mosaic GPU kernels on Hopper.

Pallas has no gather into swizzled tiles: its bulk copies move a row into one place, but the tensor cores want the
halves of a row of 256 bytes in different tiles, with pieces of 16 bytes permuted. `cp.async` lets every lane choose its
16 bytes, so this is written in PTX. A warpgroup takes 8 rows at a time, 16 lanes a row.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""Layout of an [n, 128] tile of 16-bit values as the tensor cores read it: tiles of 8 rows x 128 bytes, and piece j
(16 bytes) of row i at place j ^ i."""

ROW_BYTES, LANES_A_ROW, ROWS_AT_ONCE = 256, 16, 8

_LANE = "mov.u32 t, %tid.x; and.b32 t, t, 127;"


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

    def copy_list(self, ids: Any, smem: Any) -> None:
        """Starts to copy [128] int32 from global to shared memory."""
        if self.interpret:
            smem[...] = ids[...]
            return
        code = f"{{ .reg .u32 t, s; .reg .u64 p; {_LANE} mad.wide.u32 p, t, 4, $0; mad.lo.u32 s, t, 4, $1;"
        code += " cp.async.ca.shared.global [s], [p], 4; }"

        def emit(_: Any, ids: Any, smem: Any) -> None:
            _asm(code, "l,r", _address(ids), _address(smem))

        _inline(emit, plgpu.RefType(), plgpu.RefType())(ids, smem)

    def gather(self, ids: Any, keys: Any, values: Any) -> None:
        """Starts to copy the rows of `ids` ([n] int32 in shared memory, n a multiple of 8) into two [n, 128] tiles."""
        n = ids.shape[0]
        if self.interpret:
            rows, at = self.ref[...], self.first + ids[...] * (2 * self.heads)
            keys[...], values[...] = rows[at], rows[at + self.heads]
            return
        code = _gather_code(n, self.heads)

        def emit(_: Any, rows: Any, first: Any, ids: Any, keys: Any, values: Any) -> None:
            places = _address(ids), _address(keys), _address(values)
            _asm(code, "l,r,r,r,r", _address(rows), first.registers.item(), *places)

        tile, scalar = plgpu.RefType(TRANSFORMS), plgpu.Layout.WG_SPLAT(())
        start = _inline(emit, plgpu.RefType(), scalar, plgpu.RefType(), tile, tile)
        start(self.ref, self.first, ids, keys, values)

    def commit(self) -> None:
        """Closes a group of copies."""
        self._plain("cp.async.commit_group;")

    def wait(self, groups: int) -> None:
        """Waits until at most this many of the latest groups of this lane are under way."""
        self._plain(f"cp.async.wait_group {groups};")

    def _plain(self, code: str) -> None:
        if not self.interpret:
            _inline(lambda _: _asm(code, ""))()


def _gather_code(n: int, heads: int) -> str:
    """PTX; operands: address of the rows, first row, shared addresses of ids, keys and values."""
    steps = range(n // ROWS_AT_ONCE)
    lines = [
        "{ .reg .u32 t, row, piece, x, y, i, k, v; .reg .u64 base, p;",
        f".reg .u32 id<{len(steps)}>;",
        _LANE,
        f"shr.u32 row, t, 4; and.b32 piece, t, {LANES_A_ROW - 1};",
        # Half of the row, row in the tile, swizzled piece.
        "shr.u32 x, piece, 3; shl.b32 x, x, 10; mad.lo.u32 x, row, 128, x;",
        "and.b32 y, piece, 7; xor.b32 y, y, row; mad.lo.u32 x, y, 16, x;",
        "add.u32 k, $3, x; add.u32 v, $4, x; mad.lo.u32 i, row, 4, $2;",
        f"mad.wide.u32 base, $1, {ROW_BYTES}, $0; mad.wide.u32 base, piece, 16, base;",
        *(f"ld.shared.u32 id{j}, [i + {j * ROWS_AT_ONCE * 4}];" for j in steps),
    ]
    for j in steps:
        place = j * ROWS_AT_ONCE * ROW_BYTES
        lines += [
            f"mad.wide.u32 p, id{j}, {2 * heads * ROW_BYTES}, base;",
            f"cp.async.cg.shared.global [k + {place}], [p], 16;",
            f"cp.async.cg.shared.global [v + {place}], [p + {heads * ROW_BYTES}], 16;",
        ]
    return "\n".join([*lines, "}"])


def _inline(emit: Any, *arg_types: Any) -> Any:
    return plgpu.inline_mgpu(arg_types=arg_types)(emit)


def _address(ref: Any) -> Any:
    pointer = mgpu.utils.memref_ptr(ref)
    shared = str(pointer.type) == "!llvm.ptr<3>"
    return llvm.ptrtoint(ir.IntegerType.get_signless(32 if shared else 64), pointer)


def _asm(code: str, operands: str, *args: Any) -> None:
    llvm.inline_asm(None, args, code, operands, has_side_effects=True)
