"""Rotary position embeddings: the decoder's three-axis MRoPE and the vision tower's two-axis form.

Angles are always computed in float32: positions reach 262,144, where bfloat16 has steps of 1,024.
"""

import jax
import jax.numpy as jnp


def inverse_frequencies(pairs: int, theta: float) -> jax.Array:
    """[pairs] float32: theta ** (-i / pairs)."""
    return theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)


def mrope_axis(sections: tuple[int, int, int], interleaved: bool) -> list[int]:
    """Which position axis (0 time, 1 row, 2 column) each rotary frequency follows.

    Chunked: the sections one after the other. Interleaved (Qwen3-VL): rows at i % 3 == 1 and columns at i % 3 == 2
    while i <= 3 * section, time elsewhere.
    """
    if not interleaved:
        return [axis for axis, size in enumerate(sections) for _ in range(size)]
    return [i % 3 if i % 3 and i <= 3 * sections[i % 3] else 0 for i in range(sum(sections))]


def mrope_tables(
    positions: jax.Array, theta: float, sections: tuple[int, int, int], interleaved: bool, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the decoder's positions.

    Args:
        positions: [3, B, T] int32, rows time, row, column.
        sections: frequencies that follow each axis; they sum to half of the head width.
        dtype: what the tables are rounded to (the model's dtype, as in the official code).

    Returns:
        Two arrays [B, T, sum(sections)].
    """
    axis = jnp.asarray(mrope_axis(sections, interleaved))
    chosen = jnp.moveaxis(positions, 0, -1)[..., axis].astype(jnp.float32)
    angles = chosen * inverse_frequencies(sum(sections), theta)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def vision_tables(rows: jax.Array, columns: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of patch coordinates: the first half of the frequencies follows rows, the second columns.

    Args:
        rows, columns: [N] patch coordinates before merging.

    Returns:
        Two float32 arrays [N, head_dim // 2].
    """
    frequencies = inverse_frequencies(head_dim // 4, theta)
    angles = jnp.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
