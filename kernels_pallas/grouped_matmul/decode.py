"""The mixture of experts of a decode step: few rows, so that time is bytes of weights, each read straight from the
stacks of all layers. `moe_step` is a layer; the others are its parts. Experts that are stored with 8 bits have scales
[L, E, 2F] and [L, E, D]."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import dispatch
from kernels_pallas.grouped_matmul import decode_gpu as gpu
from kernels_pallas.grouped_matmul import decode_gpu_router as gpu_router
from kernels_pallas.grouped_matmul import decode_gpu_row as gpu_row
from kernels_pallas.grouped_matmul import decode_reference as reference
from kernels_pallas.grouped_matmul import decode_tpu as tpu
from kernels_pallas.grouped_matmul import decode_tpu_router as tpu_router
from kernels_pallas.quantized import Weights, check_scale


def moe_step(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array | int,
    k: int,
    renormalise: bool,
    eps: float,
) -> jax.Array:
    """The residual stream after a layer's mixture of experts: h + moe(rms_norm(h)).

    Arguments and roundings as in `norm_route`, `expert_swiglu` and `expert_down`; one row takes fewer launches here
    than in those three.

    Returns:
        [M, D] in the dtype of h.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_router(h, norm, router, k)
    _check_stacks(h, gate_up, down)
    if router.shape[2] != down.shape[1]:
        raise ValueError(f"router {router.shape} and down {down.shape} do not fit")
    static = {"k": k, "renormalise": renormalise, "eps": eps}
    cuda = None
    if gpu_router.supports(h, router) and gpu.supports(h, gate_up, down):
        cuda = partial(gpu_row.moe_row if h.shape[0] == 1 else gpu.moe_step, **static)
    on_tpu = None
    if tpu_router.supports(h, router) and tpu.supports(h, gate_up, down):
        on_tpu = partial(tpu.moe_step, **static)
    arguments = h, norm, router, gate_up, down, jnp.asarray(layer, jnp.int32)
    return dispatch(partial(reference.moe_step, **static), *arguments, cuda=cuda, tpu=on_tpu)


def norm_route(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    layer: jax.Array | int,
    k: int,
    renormalise: bool,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """RMS norm of the residual stream and the choice of experts for it.

    Args:
        h: [M, D].
        norm: [L, D] weights of the norms of all layers.
        router: [L, D, E].
        layer: which layer, int32 scalar.
        k: experts a row.
        renormalise: whether the weights of the chosen experts sum to 1; otherwise they are softmax probabilities.
        eps: of the norm.

    Returns:
        The normed rows [M, D] in the dtype of h; weights [M, k] float32; experts [M, k] int32, best first, ties to
        the lower expert.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_router(h, norm, router, k)
    static = {"k": k, "renormalise": renormalise, "eps": eps}
    cuda = partial(gpu_router.norm_route, **static) if gpu_router.supports(h, router) else None
    on_tpu = partial(tpu_router.norm_route, **static) if tpu_router.supports(h, router) else None
    arguments = h, norm, router, jnp.asarray(layer, jnp.int32)
    return dispatch(partial(reference.norm_route, **static), *arguments, cuda=cuda, tpu=on_tpu)


def experts_add(
    m: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array | int,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
) -> jax.Array:
    """The residual stream after chosen experts: `expert_down` of `expert_swiglu`.

    For experts that are spread over devices: where an expert is -1, another device's, nothing is read or added.

    Args:
        m: [M, D] normed rows.
        gate_up: [L, E, D, 2F] matrices of all layers, gate in the first F columns.
        down: [L, E, F, D].
        layer: which layer, int32 scalar.
        experts: [M, k] int32, different ones in a row; -1 is none.
        weights: [M, k] float32.
        residual: [M, D].

    Returns:
        [M, D] in the dtype of `residual`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_stacks(m, gate_up, down)
    if residual.shape != m.shape or weights.shape != experts.shape:
        raise ValueError(f"m {m.shape}, residual {residual.shape}, weights {weights.shape} and experts do not fit")
    _check_experts(experts, m.shape[0])
    return dispatch(
        reference.experts_add,
        *(m, gate_up, down, jnp.asarray(layer, jnp.int32), experts, weights, residual),
        cuda=gpu.experts_add if gpu.supports(m, gate_up, down) else None,
        tpu=tpu.experts_add if tpu.supports(m, gate_up, down) else None,
    )


def expert_swiglu(m: jax.Array, gate_up: Weights, layer: jax.Array | int, experts: jax.Array) -> jax.Array:
    """silu(gate) * up of every row with each of its experts.

    Args:
        m: [M, D].
        gate_up: [L, E, D, 2F] matrices of all layers, gate in the first F columns.
        layer: which layer, int32 scalar.
        experts: [M, k] int32, different ones in a row; -1 is none.

    Returns:
        [M, k, F] in the dtype of m, zero where there is no expert. Products are rounded to it; silu and the product
        with `up` are float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if m.ndim != 2 or gate_up.ndim != 4 or gate_up.shape[2] != m.shape[1] or gate_up.shape[3] % 2:
        raise ValueError(f"m {m.shape} and gate_up {gate_up.shape} do not fit")
    check_scale(gate_up, 2)
    _check_experts(experts, m.shape[0])
    cuda = gpu.expert_swiglu if gpu.supports(m, gate_up) else None
    return dispatch(reference.expert_swiglu, m, gate_up, jnp.asarray(layer, jnp.int32), experts, cuda=cuda)


def expert_down(
    hidden: jax.Array,
    down: Weights,
    layer: jax.Array | int,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
) -> jax.Array:
    """The experts' outputs, weighted, summed and added to the residual stream.

    Args:
        hidden: [M, k, F] from `expert_swiglu`.
        down: [L, E, F, D] matrices of all layers.
        layer: which layer, int32 scalar.
        experts: [M, k] int32, different ones in a row; -1 is none.
        weights: [M, k] float32, multiply the float32 products.
        residual: [M, D].

    Returns:
        [M, D] in the dtype of `residual`. Each weighted row is rounded to it, their float32 sum once more.

    Raises:
        ValueError: shapes that do not fit together.
    """
    M, k, F = hidden.shape
    if down.ndim != 4 or down.shape[2] != F or residual.shape != (M, down.shape[3]) or weights.shape != (M, k):
        raise ValueError(
            f"hidden {hidden.shape}, down {down.shape}, weights {weights.shape}, residual {residual.shape} do not fit"
        )
    check_scale(down, 2)
    _check_experts(experts, M)
    cuda = gpu.expert_down if gpu.supports(hidden, down) else None
    return dispatch(
        reference.expert_down, hidden, down, jnp.asarray(layer, jnp.int32), experts, weights, residual, cuda=cuda
    )


def _check_router(h: jax.Array, norm: jax.Array, router: jax.Array, k: int) -> None:
    if h.ndim != 2 or router.ndim != 3 or h.shape[1] != router.shape[1] or norm.shape != router.shape[:2]:
        raise ValueError(f"h {h.shape}, norm {norm.shape} and router {router.shape} do not fit")
    if not 1 <= k <= router.shape[2]:
        raise ValueError(f"k={k} must be between 1 and the number of experts, {router.shape[2]}")


def _check_stacks(m: jax.Array, gate_up: Weights, down: Weights) -> None:
    if m.ndim != 2 or down.ndim != 4:
        raise ValueError(f"m {m.shape} and down {down.shape} do not fit")
    L, E, F, D = down.shape
    if m.shape[1] != D or gate_up.shape != (L, E, D, 2 * F):
        raise ValueError(f"m {m.shape}, gate_up {gate_up.shape} and down {down.shape} do not fit")
    check_scale(gate_up, 2)
    check_scale(down, 2)


def _check_experts(experts: jax.Array, rows: int) -> None:
    if experts.ndim != 2 or experts.shape[0] != rows or experts.dtype != jnp.int32:
        raise ValueError(f"experts {experts.shape} {experts.dtype} must be [{rows}, k] int32")
