"""Bits of the selected candidates of each row, for `gpu_bits`. Mosaic GPU body, one program of a warpgroup a row.

The row's words are put together in shared memory, by an atomic or for every candidate that `gpu_kth` selects, and
written once: 27 KB of candidates and 16 KB of words a row of 128K keys, for 8,192 rows 84 us at 4.2 TB/s. Measured: 97
to 100 us, at 8K 38. In which order bits arrive is no matter. (Triton cannot scatter to shared memory, and has no
atomics without fences.)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from kernels_pallas.common import WORD
from kernels_pallas.index_select.gpu_filter import address, assembled
from kernels_pallas.index_select.gpu_pieces import place_of

LANES = 128
_PIECE = 16
"""Bytes that a thread clears or writes at once."""


def emit(
    lists: jax.Array,
    sizes: jax.Array,
    kth: jax.Array,
    cut: jax.Array,
    start: jax.Array,
    first: jax.Array,
    total: int,
    chunk: int,
    capacity: int,
    topk: int,
    interpret: Any = None,
) -> jax.Array:
    """Bits of a block of rows.

    Args:
        lists, sizes: as `gpu_score.candidates` leaves them, at most LANES lists a row.
        kth, cut: as `gpu_kth.thresholds` leaves them.
        start, first, total, chunk, capacity, topk: as in `gpu_bound.bounds`.
        interpret: parameters of Pallas' interpret mode for GPUs, or None.

    Returns:
        [rows, capacity // 32] uint32, undefined for rows that are left and for those past the end.
    """
    kernel = plgpu.kernel(
        partial(_body, total=total, chunk=chunk, topk=topk, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((lists.shape[0], capacity // WORD), jnp.uint32),
        scratch_types=(plgpu.SMEM((capacity // WORD,), jnp.uint32),),
        grid=(lists.shape[0],),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="index_select_emit",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # the inline parts have their own
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
    return kernel(lists, sizes, kth, cut, start, first)


def _body(
    lists: Any, sizes: Any, kth: Any, cut: Any, start: Any, first: Any, out: Any, words: Any,
    *, total: int, chunk: int, topk: int, interpret: bool,
) -> None:  # fmt: skip
    r = lax.axis_index("row")
    _, seen = place_of(start, first, r, total, chunk, out.shape[1] * WORD)
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    @pl.when((seen > 0) & (seen <= topk))
    def _take_all() -> None:
        if interpret:
            out[r] = _first_bits(seen, out.shape[1])
        else:
            plgpu.inline_mgpu(arg_types=(ref, scalar))(_write_first)(out.at[r], seen)

    @pl.when((seen > topk) & (cut[r] >= 0))
    def _take_some() -> None:
        row = lists.at[r], sizes.at[r], out.at[r], words, kth[r], cut[r]
        if interpret:
            _scatter_plainly(*row)
        else:
            plgpu.inline_mgpu(arg_types=(ref, ref, ref, ref, scalar, scalar))(_scatter)(*row)


def _first_bits(seen: jax.Array, width: int) -> jax.Array:
    keys = jnp.clip(seen - jnp.arange(width) * WORD, 0, WORD).astype(jnp.uint32)
    return jnp.where(keys == WORD, jnp.uint32(2**WORD - 1), (jnp.uint32(1) << (keys % WORD)) - 1)


def _write_first(_: Any, out: Any, seen: Any) -> None:
    code = f"""{{ .reg .pred p; .reg .b32 t, v; .reg .b64 at;
        mov.u32 t, %tid.x;
        fill: setp.ge.s32 p, t, {ir.MemRefType(out.type).shape[0]}; @p bra filled;
        shl.b32 v, t, 5; sub.s32 v, $1, v; min.s32 v, v, {WORD}; max.s32 v, v, 0;
        shl.b32 v, 1, v; sub.s32 v, v, 1;
        mad.wide.s32 at, t, 4, $0; st.global.u32 [at], v; add.s32 t, t, {LANES}; bra fill;
        filled: }}"""
    assembled(code, "l,r", address(out), seen.registers.item())


def _scatter_plainly(lists: Any, sizes: Any, out: Any, _: Any, kth: jax.Array, cut: jax.Array) -> None:
    score, key = lax.bitcast_convert_type(lists[:, :, 0], jnp.float32), lists[:, :, 1]
    take = (jnp.arange(lists.shape[1]) < sizes[...][:, None]) & ((score > kth) | ((score == kth) & (key < cut)))
    bit = jnp.where(take, jnp.uint32(1) << (key % WORD).astype(jnp.uint32), jnp.uint32(0))
    here = (key // WORD)[..., None] == jnp.arange(out.shape[0])
    out[...] = jnp.sum(jnp.where(here, bit[..., None], jnp.uint32(0)), axis=(0, 1), dtype=jnp.uint32)


def _scatter(_: Any, lists: Any, sizes: Any, out: Any, words: Any, kth: Any, cut: Any) -> None:
    """A few threads a list, two pairs of 16 bytes a step. Operands: lists, sizes, out, words, kth, cut."""
    (n, room, _), (width,) = (ir.MemRefType(ref.type).shape for ref in (lists, out))
    row_bytes = width * WORD // 8
    share = LANES // n
    code = [
        f"""{{ .reg .pred p; .reg .b32 t, i, n, w, m, x<4>, k<4>; .reg .b64 at, l;
        mov.u32 t, %tid.x; mul.lo.s32 i, t, {_PIECE}; add.s32 w, $3, i;
        clear: setp.ge.s32 p, i, {row_bytes}; @p bra cleared;
        st.shared.v4.b32 [w], {{0, 0, 0, 0}};
        add.s32 i, i, {LANES * _PIECE}; add.s32 w, w, {LANES * _PIECE}; bra clear;
        cleared: div.u32 m, t, {share}; rem.u32 i, t, {share}; shl.b32 i, i, 2;
        mad.wide.s32 at, m, 4, $1; ld.global.u32 n, [at];
        mad.wide.s32 l, m, {8 * room}, $0; mad.wide.s32 l, i, 8, l;
        bar.sync 1, {LANES};
        next: setp.ge.s32 p, i, n; @p bra done;
        ld.global.v4.b32 {{x0, k0, x1, k1}}, [l]; ld.global.v4.b32 {{x2, k2, x3, k3}}, [l + 16];""",
        *(
            f"""setp.lt.s32 p, k{e}, $5; setp.eq.and.f32 p, x{e}, $4, p; setp.gt.or.f32 p, x{e}, $4, p;
        add.s32 m, i, {e}; setp.lt.and.s32 p, m, n, p;
        shr.u32 w, k{e}, 5; mad.lo.s32 w, w, 4, $3; and.b32 m, k{e}, 31; shl.b32 m, 1, m;
        @p red.shared.or.b32 [w], m;"""
            for e in range(4)
        ),
        f"""add.s32 i, i, {4 * share}; add.u64 l, l, {32 * share}; bra next;
        done: bar.sync 1, {LANES};
        mul.lo.s32 i, t, {_PIECE}; add.s32 w, $3, i; mad.wide.s32 at, i, 1, $2;
        copy: setp.ge.s32 p, i, {row_bytes}; @p bra copied;
        ld.shared.v4.b32 {{x0, x1, x2, x3}}, [w]; st.global.v4.b32 [at], {{x0, x1, x2, x3}};
        add.s32 i, i, {LANES * _PIECE}; add.s32 w, w, {LANES * _PIECE}; add.u64 at, at, {LANES * _PIECE}; bra copy;
        copied: }}""",
    ]
    refs = (address(ref) for ref in (lists, sizes, out, words))
    assembled("\n".join(code), "l,l,l,r,f,r", *refs, kth.registers.item(), cut.registers.item())
