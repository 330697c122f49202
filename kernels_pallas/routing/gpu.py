"""The routing of a chunk on NVIDIA GPUs, three Triton launches.

Schedule. `choose_experts` holds the probabilities of some tokens in registers and takes their maximum k times. `place`
counts: one launch leaves each pair's rank among its expert's pairs of a block of tokens (a triangle of ones times the
one-hot choices) and the block's counts; the next adds the counts of earlier blocks and lower experts.

8,192 tokens, 128 experts, one H200: 6.5, 5.5 and 7.6 us, where XLA sorts whole rows (29 us) and takes 58 us in twelve
launches. Blocks of 128 tokens spill registers (29 us), of 32 double the counts that a program adds up (12 us).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import MMA

ROWS = 16
"""Tokens a program of `choose_experts`."""
BLOCK = 64
"""Tokens counted together: below 256, so that bfloat16 operands are exact."""
MOST_BLOCKS = 256
"""A program holds the counts of them all."""
MOST_EXPERTS = 256


def chooses(logits: jax.Array) -> bool:
    """Whether `choose_experts` takes such logits."""
    return logits.size > 0 and logits.dtype in (jnp.float32, jnp.bfloat16) and logits.shape[1] <= MOST_EXPERTS


def places(experts: jax.Array, E: int) -> bool:
    """Whether `place` takes these sizes."""
    return experts.size > 0 and E <= MOST_EXPERTS and experts.shape[0] <= BLOCK * MOST_BLOCKS


def choose_experts(
    logits: jax.Array, k: int, renormalise: bool, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.routing.choose_experts`."""
    N = logits.shape[0]
    weights, experts = pl.pallas_call(
        partial(_choose_body, k=k, renormalise=renormalise),
        out_shape=(jax.ShapeDtypeStruct((N, k), jnp.float32), jax.ShapeDtypeStruct((N, k), jnp.int32)),
        grid=(pl.cdiv(N, ROWS),),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(logits)
    return weights, experts


def place(
    experts: jax.Array, weights: jax.Array, E: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels_pallas.routing.place`."""
    N, k = experts.shape
    blocks = pl.cdiv(N, BLOCK)
    params = plt.CompilerParams(num_warps=8, num_stages=1)
    ranks, counts = pl.pallas_call(
        _count_body,
        out_shape=(
            jax.ShapeDtypeStruct((N, k), jnp.int32),
            jax.ShapeDtypeStruct((blocks, max(MMA, pl.next_power_of_2(E))), jnp.int32),
        ),
        grid=(blocks,),
        compiler_params=params,
        interpret=interpret,
        name="count_experts",
    )(experts)
    positions, sizes, scattered = pl.pallas_call(
        _place_body,
        out_shape=(
            jax.ShapeDtypeStruct((N, k), jnp.int32),
            jax.ShapeDtypeStruct((E,), jnp.int32),
            jax.ShapeDtypeStruct((N * k,), jnp.float32),
        ),
        grid=(blocks,),
        compiler_params=params,
        interpret=interpret,
        name="place_experts",
    )(experts, weights, ranks, counts)
    return positions, sizes, scattered


def _choose_body(logits_ref: Any, weights_ref: Any, experts_ref: Any, *, k: int, renormalise: bool) -> None:
    N, E = logits_ref.shape
    token = pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    ids = jnp.arange(pl.next_power_of_2(E), dtype=jnp.int32)[None]
    live = token < N
    logits = plt.load(logits_ref.at[token[:, None], ids], mask=live[:, None] & (ids < E), other=0.0)
    logits = jnp.where(ids < E, logits.astype(jnp.float32), -jnp.inf)
    p = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    p = p / jnp.sum(p, axis=1, keepdims=True)
    weights, total = [], jnp.zeros(ROWS)
    for j in range(k):
        best = jnp.max(p, axis=1)
        # Of NaNs none is the largest: an expert that there is keeps what follows in its bounds.
        expert = jnp.minimum(jnp.min(jnp.where(p == best[:, None], ids, E), axis=1), E - 1)
        plt.store(experts_ref.at[token, jnp.full_like(token, j)], expert, mask=live)
        p = jnp.where(ids == expert[:, None], -1.0, p)
        weights.append(best)
        total = total + best
    for j, weight in enumerate(weights):
        weight = weight / total if renormalise else weight
        plt.store(weights_ref.at[token, jnp.full_like(token, j)], weight, mask=live)


def _count_body(experts_ref: Any, ranks_ref: Any, counts_ref: Any) -> None:
    (N, k), E = experts_ref.shape, counts_ref.shape[1]
    block = pl.program_id(0)
    token, ids = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32), jnp.arange(E, dtype=jnp.int32)
    live = token < N
    experts = [plt.load(experts_ref.at[token, jnp.full_like(token, j)], mask=live, other=E) for j in range(k)]
    chosen = jnp.zeros((BLOCK, E), bool)
    for expert in experts:
        chosen |= expert[:, None] == ids[None]
    step = jnp.arange(BLOCK, dtype=jnp.int32)
    earlier = (step[None] < step[:, None]).astype(jnp.bfloat16)
    dims = (((1,), (0,)), ((), ()))
    ranks = lax.dot_general(earlier, chosen.astype(jnp.bfloat16), dims, preferred_element_type=jnp.float32)
    for j, expert in enumerate(experts):
        rank = jnp.sum(jnp.where(expert[:, None] == ids[None], ranks, 0.0), axis=1).astype(jnp.int32)
        plt.store(ranks_ref.at[token, jnp.full_like(token, j)], rank, mask=live)
    plt.store(counts_ref.at[jnp.full_like(ids, block), ids], jnp.sum(chosen.astype(jnp.int32), axis=0))


def _place_body(
    experts_ref: Any,
    weights_ref: Any,
    ranks_ref: Any,
    counts_ref: Any,
    positions_ref: Any,
    sizes_ref: Any,
    scattered_ref: Any,
) -> None:
    (N, k), (blocks, E) = experts_ref.shape, counts_ref.shape
    block = pl.program_id(0)
    token, ids = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32), jnp.arange(E, dtype=jnp.int32)
    live = token < N
    number = jnp.arange(pl.next_power_of_2(blocks), dtype=jnp.int32)[:, None]
    counts = plt.load(
        counts_ref.at[number, ids[None]], mask=jnp.broadcast_to(number < blocks, (number.size, E)), other=0
    )
    sizes = jnp.sum(counts, axis=0)
    lower = jnp.sum(jnp.where(ids[:, None] < ids[None], sizes[:, None], 0), axis=0)
    first = lower + jnp.sum(jnp.where(number < block, counts, 0), axis=0)
    for j in range(k):
        at = (token, jnp.full_like(token, j))
        expert, rank = (plt.load(ref.at[at], mask=live, other=0) for ref in (experts_ref, ranks_ref))
        position = rank + jnp.sum(jnp.where(expert[:, None] == ids[None], first[None], 0), axis=1)
        position = jnp.where(live, position, N * k)  # beyond the end: no masked token stands at another's place
        plt.store(positions_ref.at[at], position, mask=live)
        plt.store(scattered_ref.at[position], plt.load(weights_ref.at[at], mask=live, other=0.0), mask=live)

    @pl.when(block == 0)
    def _() -> None:
        plt.store(sizes_ref.at[ids], sizes, mask=ids < sizes_ref.shape[0])
