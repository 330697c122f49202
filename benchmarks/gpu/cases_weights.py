"""What `checks` runs of products with 8-bit weights: the experts of a chunk and of a decode step, its projections."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import cases_products as products
from benchmarks.gpu.cases import Sizes
from benchmarks.gpu.checks import BF16, Case, rounding
from kernels_pallas import grouped_matmul, skinny_matmul
from kernels_pallas.decode_inputs import decode_inputs
from kernels_pallas.quantized import Quantized
from keye_jax.config import KeyeConfig
from keye_jax.params import WEIGHT_DTYPES, WeightFormat


def quantised(w: jax.Array, contracted: tuple[int, ...], dtype: Any) -> Quantized:
    """As `keye_jax.quantise` does on the host, on the device.

    Args:
        contracted: axes that a product sums over, counted from the last (-1).
        dtype: int8 or float8_e4m3fn.
    """
    wide = w.astype(jnp.float32)
    amax = jnp.max(jnp.abs(wide), axis=contracted, keepdims=True)
    scale = jnp.where(amax > 0, amax / float(jnp.finfo(dtype).max if dtype != jnp.int8 else 127), 1.0)
    values = wide / scale
    return Quantized((jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scale.squeeze(contracted))


def weight_cases(config: KeyeConfig, sizes: Sizes, weights: WeightFormat) -> Iterator[Case]:
    """For a model's sizes."""
    t, dtype = config.text, WEIGHT_DTYPES[weights]
    D, F, E, k = t.hidden_size, t.moe_intermediate_size, t.num_experts, t.num_experts_per_tok
    matrix = partial(quantised, contracted=(-2,), dtype=dtype)
    for kind, rows in (("even", sizes.rows), ("few", sizes.rows), ("even", 8 * k + 3)):
        up = partial(products.group_inputs, kind, 300, rows, (D, 2 * F), E)
        make = partial(_second, up, matrix)
        yield Case(f"grouped_swiglu {weights} {kind} {rows} rows", grouped_matmul.grouped_swiglu, make, rounding, 1)
        down = partial(products.group_inputs, kind, 310, rows, (F, D), E, scaled=True)
        make, function = partial(_second, down, matrix), products.grouped(jnp.bfloat16)
        yield Case(f"grouped_matmul {weights} down {kind} {rows} rows", function, make, rounding, 1)
    out = partial(quantised, contracted=(-3, -2), dtype=dtype)
    for rows in (1, 3, 8):
        make = partial(_second, partial(products.project_add_inputs, 320 + rows, rows, config), out)
        yield Case(f"project_add {weights} {rows} rows", skinny_matmul.project_add, make, rounding, 1)
        make = partial(_moe_inputs, 330 + rows, rows, config, dtype)
        step = products.moe_step_for(k, t.norm_topk_prob, t.rms_norm_eps)
        # Hidden values, rows of experts and their sum are rounded, one after the other.
        yield Case(f"moe_step {weights} {rows} rows", step, make, rounding, 2)
    function, S = partial(decode_inputs, eps=t.rms_norm_eps), sizes.short
    # Three roundings to bfloat16 on the way, which float32 results come from too: projection, norm, rotation.
    compare = partial(rounding, float32=BF16)
    for slots in ((S - 1,), (0, S, S // 2 + 3)):
        make = partial(_step_inputs, 340, slots, S, config, dtype)
        yield Case(f"decode_inputs {weights} {len(slots)} rows", function, make, compare, 1)


def _second(make: Any, quantise: Any) -> tuple[Any, ...]:
    x, w, *rest = make()
    return x, quantise(w), *rest


def _moe_inputs(seed: int, rows: int, config: KeyeConfig, dtype: Any) -> tuple[Any, ...]:
    *routed, gate_up, down, layer = products.moe_inputs(seed, rows, config)
    return *routed, *(quantised(w, (-2,), dtype) for w in (gate_up, down)), layer


def _step_inputs(seed: int, slots: tuple[int, ...], S: int, config: KeyeConfig, dtype: Any) -> tuple[Any, ...]:
    h, w, *rest = products.step_inputs(seed, slots, S, jnp.float8_e4m3fn, config)
    q, k, v = (quantised(matrix, (-3,), dtype) for matrix in (w.q, w.k, w.v))
    return h, w._replace(q=q, k=k, v=v), *rest
