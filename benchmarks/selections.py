"""Selections for timing sparse attention where weights are random: which keys each query of a prefill chunk attends to.

Random weights select keys without any locality, which trained ones do not: Keye-VL-2.0's report finds that 16
neighbouring queries together select about 8K of the 32K keys that they could at 128K. Both are made here, exactly
`topk` distinct visible keys a query (all of them where there are fewer), as the bits that `select_bits` returns:

- `random_bits`: each query draws from all keys that it sees; 16 neighbours share no more than chance has it.
- `local_bits`: each group of 16 queries has a pool of 8,192 keys, the 1,024 most recent and 28 runs of 256 at random
  places of the rest, and each query draws from the pool. Pools of different groups are independent, and within a group
  neighbours are no more alike than distant ones, so that 2, 4 and 8 queries share as little as 16 of them sharing 8K
  allows (3.6K, 5.6K and 7.4K distinct keys).
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.common import WORD

GROUP, POOL, RECENT, RUN = 16, 8192, 1024, 256
RUNS = (POOL - RECENT) // RUN


@partial(jax.jit, static_argnames=("queries", "capacity", "topk"))
def random_bits(key: jax.Array, start: jax.Array | int, *, queries: int, capacity: int, topk: int) -> jax.Array:
    """Uniformly random visible keys, one from each of `topk` equal strata.

    Args:
        key: random key.
        start: int32, sequence index of the chunk's first query; query start + i sees keys 0 .. start + i.
        queries: C, queries in the chunk.
        capacity: S, slots of the cache, a multiple of 32.
        topk: keys a query.

    Returns:
        [C, S // 32] uint32, key s at bit s % 32 of word s // 32.
    """
    visible = start + jnp.arange(queries, dtype=jnp.int32) + 1
    ids, used = _draw(key, visible, topk)
    return _bits(ids, used, capacity)


@partial(jax.jit, static_argnames=("queries", "capacity", "topk"))
def local_bits(key: jax.Array, start: jax.Array | int, *, queries: int, capacity: int, topk: int) -> jax.Array:
    """Keys from a pool that 16 neighbouring queries share. Arguments and result as in `random_bits`."""
    pools, draws = jax.random.split(key)
    groups = -(-queries // GROUP)
    known = start + jnp.arange(groups, dtype=jnp.int32) * GROUP + 1
    older = known[:, None] - RECENT
    run = jnp.arange(RUNS, dtype=jnp.int32)
    low, high = run * older // RUNS, (run + 1) * older // RUNS
    places = low + (jax.random.uniform(pools, low.shape) * (high - low - RUN + 1)).astype(jnp.int32)

    group = jnp.arange(queries, dtype=jnp.int32) // GROUP
    visible = start + jnp.arange(queries, dtype=jnp.int32) + 1
    everything = known[group] <= POOL
    slots, used = _draw(draws, jnp.where(everything, visible, POOL), topk)
    in_run = jnp.take_along_axis(places[group], jnp.minimum(slots // RUN, RUNS - 1), axis=1) + slots % RUN
    recent = known[group, None] - POOL + slots
    ids = jnp.where(everything[:, None], slots, jnp.where(slots < POOL - RECENT, in_run, recent))
    return _bits(ids, used, capacity)


def _draw(key: jax.Array, population: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
    """[C, topk] distinct numbers below population [C], ascending, and which of them count: a stratum may be empty."""
    slot = jnp.arange(topk, dtype=jnp.int32)
    low, high = slot * population[:, None] // topk, (slot + 1) * population[:, None] // topk
    offset = (jax.random.uniform(key, low.shape) * (high - low)).astype(jnp.int32)
    return low + offset, high > low


def _bits(ids: jax.Array, used: jax.Array, capacity: int) -> jax.Array:
    # Adding distinct bits is setting them.
    bit = jnp.where(used, jnp.uint32(1) << (ids % WORD).astype(jnp.uint32), jnp.uint32(0))
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), capacity // WORD), jnp.uint32).at[rows, ids // WORD].add(bit)
