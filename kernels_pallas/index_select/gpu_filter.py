"""What becomes of scores in the registers of `gpu_score`: stored, or only listed where they reach their row's bound.

Row r of warp w's 16 of an accumulator is held by the four threads 4r..4r + 3 (and 8 rows further down, in the second
half of the registers). To list, each thread has two lists of its own, for its two rows, of pairs of 4 bytes: a score
and its key, 8 bytes in one predicated store. How many there are stands in shared memory between tiles. So no thread
waits for another, and the order of a list is always the same. A score costs five instructions, the 64 of a tile and
thread about a sixth of what their 16 heads do.

Inline code for the GPU is PTX; its twin for interpret mode takes keys in their own order.
"""

from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

QUERIES = 64
"""Queries of a block: the rows of a wgmma."""
TILE = 128
QUAD = 4
"""Threads that share a row of a wgmma accumulator."""
FULL = 1 << 20
"""The size of a list that had no room: more than any room."""
_NAN = "0f7FC00000"
# A thread's number in its warpgroup is 32 w + t. A list's size lies at 4 * (64 w + t), that of the second row 128
# bytes behind.
_THREAD = "mov.u32 t, %tid.x; and.b32 t, t, 127; shr.u32 w, t, 5; and.b32 t, t, 31;"


def arrange(keys: jax.Array) -> jax.Array:
    """[B, S, I] keys → [B, I, S], in the column order that gives each pair of threads of a wgmma whole units of 8.

    In an accumulator, thread q of a quad holds columns 8i + 2q + b (b = 0, 1). With p = q ^ (tile % 4), it gets of each
    group of 32 keys four from 16 (p / 2) + 4 (p % 2) on and the four of the next unit: so whatever comes again after
    some power of two of keys does not all fall to one thread.
    """
    B, S, I = keys.shape  # noqa: E741
    # Pair, unit, parity, high and low bit of the place → unit, high bit, pair, parity, low bit.
    x = keys.reshape(B, S // 32, 2, 2, 2, 2, 2, I).transpose(0, 7, 1, 3, 5, 2, 4, 6)
    x = x.reshape(B, I, S // TILE, 16, 2, 2, 2)
    tile = jnp.arange(S // TILE).reshape(-1, 1, 1, 1, 1)
    for bit, axis in (1, 5), (2, 4):  # a gather of the columns takes 60 us at 128K
        x = jnp.where(tile & bit, jnp.flip(x, axis), x)
    return x.reshape(B, I, S)


def store(_: Any, scores: Any, key: Any, out: ir.Value) -> None:
    """Writes a [QUERIES, TILE] accumulator of the keys from `key` on."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def const(value: int) -> ir.Value:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def times(value: ir.Value, factor: int) -> ir.Value:
        return arith.muli(value, const(factor))

    stride = ir.MemRefType(out.type).get_strides_and_offset()[0][0]
    thread = arith.andi(mgpu.utils.thread_idx(), const(127))
    lane = arith.andi(thread, const(31))
    row = arith.addi(times(arith.shrui(thread, const(5)), 16), arith.shrui(lane, const(2)))
    p = arith.xori(lane, arith.shrui(key.registers.item(), const(7)))
    pair = arith.addi(times(arith.andi(p, const(2)), 8), times(arith.andi(p, const(1)), 4))
    # Generic stores would have to find out first that this is not shared memory.
    base = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(out))
    base = mgpu.utils.getelementptr(base, [arith.addi(times(row, stride), pair)], f32)
    for half, place in np.ndindex(2, TILE // 16):
        own = _registers(scores, half)[4 * place : 4 * place + 4]
        # Neighbours write a unit together, a sector at once.
        offset = half * 8 * stride + place // 2 * 32 + place % 2 * 8
        packed = vector.from_elements(ir.VectorType.get((len(own),), f32), own)
        llvm.store(packed, mgpu.utils.getelementptr(base, [offset], f32), alignment=16)


def clear(_: Any, sizes: Any) -> None:
    """Empties a thread's two lists."""
    code = f"{{ .reg .b32 t, w, x; {_THREAD} mad.lo.u32 x, w, 256, $0; mad.lo.u32 x, t, 4, x;"
    assembled(code + " st.shared.u32 [x], 0; st.shared.u32 [x + 128], 0; }", "r", address(sizes))


def copy_sizes(_: Any, sizes: Any, out: Any) -> None:
    """Writes how long they are: [QUERIES, QUAD] in shared memory → int32 of the same shape."""
    stride = 4 * ir.MemRefType(out.type).get_strides_and_offset()[0][0]
    code = f"""{{ .reg .b32 t, w, x, n; .reg .b64 at; {_THREAD}
        mad.lo.u32 x, w, 256, $0; mad.lo.u32 x, t, 4, x;
        shl.b32 w, w, 4; shr.u32 n, t, 2; add.u32 w, w, n; mad.wide.u32 at, w, {stride}, $1;
        and.b32 t, t, 3; mad.wide.u32 at, t, 4, at;
        ld.shared.u32 n, [x]; st.global.u32 [at], n; ld.shared.u32 n, [x + 128]; st.global.u32 [at + {8 * stride}], n;
    }}"""
    assembled(code, "r,l", address(sizes), address(out))


def append(_: Any, scores: Any, key: Any, known: Any, bounds: Any, sizes: Any, lists: Any) -> None:
    """Lists the scores of an accumulator that reach their row's bound.

    Args:
        scores: [QUERIES, TILE] float32 in registers.
        key: the tile's first key.
        known: how many of the tile's keys the first row sees; each row sees one more.
        bounds: [QUERIES] float32 in shared memory.
        sizes: [QUERIES, QUAD] int32 in shared memory, FULL from where a tile might not have found room.
        lists: [QUERIES, QUAD, room, 2] int32.
    """
    room = ir.MemRefType(lists.type).shape[2]
    row_bytes, list_bytes, *_ = (4 * stride for stride in ir.MemRefType(lists.type).get_strides_and_offset()[0])
    # Of a thread's own registers, relative to its first key.
    offsets = [32 * (i // 4) + 8 * (i % 4 // 2) + 2 * (i % 2) + b for i in range(TILE // 8) for b in range(2)]
    n = len(offsets)
    at, first, ahead, bound, size = (f"${n + i}" for i in range(5))
    for half in range(2):
        code = [
            f"{{ .reg .pred p; .reg .b32 t, w, x, n, own, size, bound, v<{n}>; .reg .b64 list, at;",
            _THREAD,
            f"mad.lo.u32 x, w, 256, {size}; mad.lo.u32 size, t, 4, x; add.u32 size, size, {half * 128};",
            f"shr.u32 x, t, 2; mad.lo.u32 w, w, 16, x; add.u32 w, w, {half * 8};",
            f"mad.lo.u32 x, w, 4, {bound}; ld.shared.f32 bound, [x]; ld.shared.u32 n, [size];",
            f"mad.wide.u32 list, w, {row_bytes}, {at}; and.b32 x, t, 3; mad.wide.u32 list, x, {list_bytes}, list;",
            f"shr.u32 x, {first}, 7; xor.b32 x, x, t; and.b32 own, x, 2; shl.b32 own, own, 3;",
            "and.b32 x, x, 1; mad.lo.u32 own, x, 4, own;",
            f"setp.gt.u32 p, n, {room - n}; selp.b32 n, {FULL}, n, p; selp.f32 bound, {_NAN}, bound, p;",
            "mad.wide.u32 at, n, 8, list;",
            *(f"mov.f32 v{i}, ${i};" for i in range(n)),
            # On the diagonal.
            f"setp.ge.s32 p, {ahead}, {TILE}; @p bra seen; add.s32 x, {ahead}, w; sub.s32 x, x, own;",
            *(f"setp.gt.s32 p, x, {offset}; selp.f32 v{i}, v{i}, {_NAN}, p;" for i, offset in enumerate(offsets)),
            f"seen: add.s32 own, own, {first};",
        ]
        for i, offset in enumerate(offsets):
            code += [
                f"setp.ge.f32 p, v{i}, bound; add.u32 x, own, {offset};",
                f"@p st.global.v2.b32 [at], {{v{i}, x}}; @p add.u64 at, at, 8;",
            ]
        code += ["sub.u64 at, at, list; shr.u64 at, at, 3; cvt.u32.u64 n, at; st.shared.u32 [size], n; }"]
        scalars = [x.registers.item() for x in (key, known)]
        operands = [*_registers(scores, half), address(lists), *scalars, address(bounds), address(sizes)]
        assembled("\n".join(code), ",".join([*("f" * n), *"lrrrr"]), *operands)


def append_plainly(
    scores: jax.Array, key: jax.Array, known: jax.Array, bounds: Any, sizes: Any, lists: Any
) -> None:  # fmt: skip
    """As `append`, in interpret mode: the tile's keys in their own order, a quarter of them for each thread."""
    room, own = lists.shape[2], TILE // QUAD
    n, place = sizes[...], jnp.arange(TILE)
    full = n > room - own
    bound = jnp.where(full, jnp.nan, bounds[...][:, None])
    scores = jnp.where(place < known + jnp.arange(QUERIES)[:, None], scores, jnp.nan).reshape(QUERIES, QUAD, own)
    hit = scores >= bound[..., None]
    at = n[..., None] + jnp.cumsum(hit, axis=2) - 1
    keys = jnp.broadcast_to((key + place).reshape(QUAD, own), hit.shape)
    pairs = jnp.stack([lax.bitcast_convert_type(scores, jnp.int32), keys], axis=-1)
    kept = lists[...]
    for i in range(own):
        here = (jnp.arange(room) == at[:, :, i, None]) & hit[:, :, i, None]
        kept = jnp.where(here[..., None], pairs[:, :, i, None], kept)
    lists[...] = kept
    sizes[...] = jnp.where(full, FULL, n + jnp.sum(hit, axis=2))


def address(ref: Any) -> Any:
    """Of a reference in global (64 bits) or shared memory (32 bits)."""
    pointer = mgpu.utils.memref_ptr(ref)
    shared = str(pointer.type) == "!llvm.ptr<3>"
    return llvm.ptrtoint(ir.IntegerType.get_signless(32 if shared else 64), pointer)


def assembled(code: str, operands: str, *args: Any) -> None:
    """PTX in its place."""
    llvm.inline_asm(None, args, code, operands, has_side_effects=True)


def _registers(scores: Any, half: int) -> list[ir.Value]:
    """A thread's scores of one of its rows."""
    registers = scores.registers.reshape(TILE // 8, 2)[:, half]
    return [vector.extract(pair, dynamic_position=[], static_position=[b]) for pair in registers for b in range(2)]
