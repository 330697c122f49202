"""Emit."""

from functools import partial
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental import pallas as pl
from jaxlib.mlir.dialects import llvm

from kernels_pallas.index_select.gpu_score import _address
from kernels_pallas.index_select.gpu_pieces import place_of

LANES = 128


def emit(
    lists: jax.Array, sizes: jax.Array, kth: jax.Array, cut: jax.Array, start: jax.Array, first: jax.Array,
    total: int, chunk: int, capacity: int, topk: int, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    rows = lists.shape[0]
    kernel = plgpu.kernel(
        partial(_body, total=total, chunk=chunk, topk=topk, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((rows, capacity // 32), jnp.uint32),
        scratch_types=(plgpu.SMEM((capacity // 32,), jnp.uint32),),
        grid=(rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="index_select_emit",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
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
    width = out.shape[1]
    _, seen = place_of(start, first, r, total, chunk, width * 32)
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    threshold, last = kth[r], cut[r]
    _, segments, room, _ = lists.shape

    @pl.when((seen > 0) & (seen <= topk))
    def _fill() -> None:
        if interpret:
            keys = jnp.clip(seen - jnp.arange(width) * 32, 0, 32)
            out[r] = jnp.where(keys == 32, jnp.uint32(2**32 - 1), (jnp.uint32(1) << keys.astype(jnp.uint32)) - 1)
        else:
            plgpu.inline_mgpu(arg_types=(ref, scalar))(partial(_fill_row, width))(out.at[r], seen)

    @pl.when((seen > topk) & (last >= 0))
    def _scatter() -> None:
        if interpret:
            score = lax.bitcast_convert_type(lists[r, :, :, 0], jnp.float32)
            key = lists[r, :, :, 1]
            take = jnp.arange(room) < sizes[r][:, None]
            take &= (score > threshold) | ((score == threshold) & (key < last))
            bit = jnp.where(take, jnp.uint32(1) << (key & 31).astype(jnp.uint32), jnp.uint32(0))
            out[r] = jnp.sum(jnp.where((key >> 5)[..., None] == jnp.arange(width), bit[..., None], 0), axis=(0, 1), dtype=jnp.uint32)
        else:
            types = ref, ref, ref, ref, scalar, scalar
            plgpu.inline_mgpu(arg_types=types)(partial(_scatter_row, segments, room, width))(
                lists.at[r], sizes.at[r], out.at[r], words, threshold, last
            )


def _fill_row(width: int, _: Any, out: Any, seen: Any) -> None:
    code = f"""
    {{ .reg .pred p; .reg .s32 t, v; .reg .u64 at;
    mov.u32 t, %tid.x;
    fill: setp.ge.s32 p, t, {width}; @p bra filled;
    shl.b32 v, t, 5; sub.s32 v, $1, v; min.s32 v, v, 32; max.s32 v, v, 0;
    shl.b32 v, 1, v; sub.s32 v, v, 1;
    mad.wide.s32 at, t, 4, $0; st.global.u32 [at], v; add.s32 t, t, {LANES}; bra fill;
    filled: }}"""
    llvm.inline_asm(None, [_address(out), seen.registers.item()], code, "l,r", has_side_effects=True)


def _scatter_row(
    segments: int, room: int, width: int, _: Any, lists: Any, sizes: Any, out: Any, words: Any, kth: Any, cut: Any
) -> None:
    share = LANES // segments
    code = [
        f"""
    {{ .reg .pred p, q; .reg .b32 t, i, n, w, m, x<4>, k<4>, v<4>; .reg .u64 at, l;
    mov.u32 t, %tid.x;
    shl.b32 i, t, 4; add.s32 w, $3, i;
    clear: setp.ge.s32 p, i, {width * 4}; @p bra cleared;
    st.shared.v4.b32 [w], {{0, 0, 0, 0}}; add.s32 i, i, {LANES * 16}; add.s32 w, w, {LANES * 16}; bra clear;
    cleared:
    div.u32 m, t, {share}; rem.u32 i, t, {share}; shl.b32 i, i, 2;
    mad.wide.s32 at, m, 4, $1; ld.global.u32 n, [at];
    mad.wide.s32 l, m, {8 * room}, $0; mad.wide.s32 l, i, 8, l;
    bar.sync 1, {LANES};
    next: setp.ge.s32 p, i, n; @p bra done;
    ld.global.v4.b32 {{x0, k0, x1, k1}}, [l]; ld.global.v4.b32 {{x2, k2, x3, k3}}, [l + 16];"""
    ]
    for e in range(4):
        code.append(f"""
    setp.lt.s32 p, k{e}, $5; setp.eq.and.f32 p, x{e}, $4, p; setp.gt.or.f32 p, x{e}, $4, p; add.s32 m, i, {e}; setp.lt.and.s32 p, m, n, p;
    shr.u32 w, k{e}, 5; mad.lo.s32 w, w, 4, $3; and.b32 m, k{e}, 31; shl.b32 m, 1, m;
    @p red.shared.or.b32 [w], m;""")
    code.append(f"""
    add.s32 i, i, {4 * share}; add.u64 l, l, {32 * share}; bra next;
    done: bar.sync 1, {LANES};
    shl.b32 i, t, 4; add.s32 w, $3, i; mad.wide.s32 at, i, 1, $2;
    copy: setp.ge.s32 p, i, {width * 4}; @p bra copied;
    ld.shared.v4.b32 {{v0, v1, v2, v3}}, [w]; st.global.v4.b32 [at], {{v0, v1, v2, v3}};
    add.s32 i, i, {LANES * 16}; add.s32 w, w, {LANES * 16}; add.u64 at, at, {LANES * 16}; bra copy;
    copied: }}""")
    operands = [
        *(_address(ref) for ref in (lists, sizes, out, words)),
        *(x.registers.item() for x in (kth, cut)),
    ]
    llvm.inline_asm(None, operands, "".join(code), "l,l,l,r,f,r", has_side_effects=True)
