"""The mixture of experts of a decode step on a TPU: one call streams the chosen experts past all rows.

out[m] = h[m] + sum over the experts e of row m of weight[m, e] * (silu(gate_e) * up_e) @ down_e.

Schedule. A first call norms the rows, chooses experts and lists the distinct ones, or lists those that somebody else
has chosen, as where a device has a part of the experts: -1, another device's, is not listed. The grid walks that list;
per expert it walks tiles of F: columns of gate and of up, rows of down, fetched from the stacks by prefetched (layer,
expert) while the tiles before are multiplied. Every step multiplies all rows: up to 128 of them cost the matrix unit
little more than one, because loading the weights is what takes time there, so rows that share an expert need no sorting
and no gathers, and no expert is read twice. Rows that did not choose an expert drop its result. Two halves of the list,
every other expert, go to the two cores of a v5p; each leaves a float32 sum, and XLA adds both to the residual. A device
that has none of the chosen experts reads one tile, which the pipeline asks for before anybody knows.

Cost at the published sizes: 9.44 MB per distinct expert. One row, 8 experts, 75.5 MB a layer: 92 us (v5e), 46 (v6e),
27 (v5p), 20 (tpu7x) at datasheet rates; 64 rows, 128 experts, 1.21 GB: 1.47, 0.74, 0.44 and 0.33 ms. The compiler
schedules 1,290 cycles a step for one row on a v5e and 2,320 for 64: at 1.5 GHz 0.9 and 1.5 us, of the 5.8 that copying
the step's 4.7 MB takes; on a tpu7x 1,020 and 1,320.

Experts of 8 bits are widened to the rows' dtype after the copy: half the bytes. The scales multiply the float32 sums.

Lost: rows that do not fill registers. One row was laid out across sublanes, and rearranging it took 2,900 cycles an
expert.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kernels_pallas.common import einsum_f32
from kernels_pallas.grouped_matmul.decode_tpu_router import LISTS, MAX_EXPERTS, MAX_ROWS, arrange, route
from kernels_pallas.grouped_matmul.tpu_scales import scale_row, scale_spec
from kernels_pallas.quantized import Quantized, Weights, multiplies

LANES = 128
MAX_ROW_BYTES = 2**14
"""Of the residual stream; more would take tiles of less than 384 columns to fit the 64 MiB of a v5p or tpu7x."""


@dataclass(frozen=True)
class Tuning:
    """Columns of gate and up, and rows of down, a step: the widest of F's divisors up to this."""

    tile: int = 384


def supports(h: jax.Array, gate_up: Weights, down: Weights) -> bool:
    """Whether the kernel takes rows h [M, D] and these stacks of expert matrices."""
    _, E, F, D = down.shape
    return (
        0 < h.shape[0] <= MAX_ROWS
        and h.dtype in (jnp.float32, jnp.bfloat16)
        and multiplies(gate_up, h.dtype)
        and multiplies(down, h.dtype)
        and D % LANES == 0
        and F % LANES == 0
        and E <= MAX_EXPERTS
        and D * h.dtype.itemsize <= MAX_ROW_BYTES
    )


def moe_step(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array,
    *,
    k: int,
    renormalise: bool,
    eps: float,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """`decode.moe_step` on a TPU."""
    routed = route(h, norm, router, layer, k=k, renormalise=renormalise, eps=eps, interpret=interpret)
    return _add(*routed, gate_up, down, layer, h, tuning, interpret)


def experts_add(
    m: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
    *,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """`decode.experts_add` on a TPU."""
    arranged = arrange(m, weights, experts, down.shape[1], interpret=interpret)
    return _add(*arranged, gate_up, down, layer, residual, tuning, interpret)


def _add(
    m: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    listed: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array,
    residual: jax.Array,
    tuning: Tuning,
    interpret: Any,
) -> jax.Array:
    """The first four as `route` returns them."""
    M = residual.shape[0]
    _, E, F, D = down.shape
    tile = max(c for c in range(LANES, max(tuning.tile, LANES) + 1, LANES) if F % c == 0)
    tiles = F // tile

    def current(core: Any, turn: Any, t: Any, layer: Any, listed: Any) -> tuple[Any, Any, Any]:
        # Behind the end of the list the last block is asked for again, which fetches nothing.
        slot = turn * LISTS + core
        return layer[0], listed[0, slot], jnp.where(slot < listed[1, 0], t, tiles - 1)

    def columns_from(first: int) -> Any:
        def part(*at: Any) -> tuple[Any, Any, Any]:
            stack, expert, t = current(*at)
            return stack, expert, first + t

        def index(*at: Any) -> tuple[Any, ...]:
            stack, expert, t = part(*at)
            return stack, expert, 0, t

        values: Any = pl.BlockSpec((None, None, D, tile), index)
        scale: Any = scale_spec(E, tile, part)
        return Quantized(values, scale) if isinstance(gate_up, Quantized) else values

    def rows() -> Any:
        values: Any = pl.BlockSpec((None, None, tile, D), lambda *at: (*current(*at), 0))
        scale: Any = scale_spec(E, D, lambda *at: (*current(*at)[:2], 0))
        return Quantized(values, scale) if isinstance(down, Quantized) else values

    def whole(x: jax.Array) -> Any:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    sums = pl.pallas_call(
        partial(_kernel, dtype=residual.dtype),
        out_shape=jax.ShapeDtypeStruct((LISTS, *m.shape), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(LISTS, listed.shape[1] // LISTS, tiles),
            in_specs=[
                whole(m),
                whole(experts),
                whole(weights),
                columns_from(0),
                columns_from(tiles),
                rows(),
            ],
            out_specs=pl.BlockSpec((None, *m.shape), lambda core, *_: (core, 0, 0)),
            scratch_shapes=[pltpu.VMEM(m.shape, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=8 * 2**20 + 8 * tile * D * m.dtype.itemsize,
        ),
        interpret=interpret,
        name="experts_add",
    )(jnp.asarray(layer, jnp.int32).reshape(1), listed, m, experts, weights, gate_up, gate_up, down)
    return residual + (sums[0, :M] + sums[1, :M]).astype(residual.dtype)


def _kernel(
    _layer: Any,
    listed: Any,
    m: Any,
    experts: Any,
    weights: Any,
    gate: Any,
    up: Any,
    down: Any,
    out: Any,
    product: Any,
    *,
    dtype: Any,
) -> None:
    core, turn, t = (pl.program_id(axis) for axis in range(3))
    slot = turn * LISTS + core

    @pl.when((turn == 0) & (t == 0))
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(slot < listed[1, 0])
    def _() -> None:
        expert = listed[0, slot]
        products = [_scaled(einsum_f32("md,df->mf", m[...], _tile(w, m.dtype)), w, expert) for w in (gate, up)]
        g, u = (product.astype(m.dtype).astype(jnp.float32) for product in products)
        hidden = (jax.nn.silu(g) * u).astype(m.dtype)
        # The first tile overwrites what the expert before has left.
        before = jnp.where(t == 0, 0.0, product[...])
        product[...] = before + einsum_f32("mf,fd->md", hidden, _tile(down, m.dtype))

        @pl.when(t == pl.num_programs(2) - 1)
        def _() -> None:
            chosen = experts[...] == expert
            weight = jnp.sum(jnp.where(chosen, weights[...], 0.0), axis=1, keepdims=True)
            rows = (_scaled(product[...], down, expert) * weight).astype(dtype).astype(jnp.float32)
            # Not by a weight of zero: another row's overflow must not become NaN.
            out[...] += jnp.where(jnp.any(chosen, axis=1, keepdims=True), rows, 0.0)


def _tile(w: Any, dtype: Any) -> jax.Array:
    """A block of matrices; 8-bit values are exact in `dtype`."""
    return w.values[...].astype(dtype) if isinstance(w, Quantized) else w[...]


def _scaled(product: jax.Array, w: Any, expert: Any) -> jax.Array:
    return product * scale_row(w.scale, expert) if isinstance(w, Quantized) else product
