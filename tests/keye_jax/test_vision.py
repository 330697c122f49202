"""The vision tower against the dense numpy model, one frame at a time."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from keye_jax import graphs, sharding
from keye_jax.config import VisionConfig
from keye_jax.vision import interpolate_positions, patch_layout, project_rows, vision_tokens
from runtime.aot import collectives
from tests.keye_jax import dense_numpy as dense
from tests.keye_jax.tiny import TINY, random_params

encode = jax.jit(vision_tokens, static_argnames="config")
layout_of = jax.jit(patch_layout, static_argnums=1)


def weights(config: VisionConfig = TINY.vision) -> dict[str, Any]:
    params = random_params(dataclasses.replace(TINY, vision=config))
    return {name: params[name] for name in ("vision", "projector")}


def random_patches(count: int, config: VisionConfig = TINY.vision, seed: int = 0) -> np.ndarray:
    shape = (count, config.num_channels, config.patch_size, config.patch_size)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def plain_rows(
    params: dict[str, Any], patches: np.ndarray, grid: list[tuple[int, int, int]], config: VisionConfig
) -> np.ndarray:
    rows, start = [], 0
    for frames, height, width in grid:
        for _ in range(frames):
            rows.append(dense.encode_frame(params, patches[start : start + height * width], height, width, config))
            start += height * width
    return np.concatenate(rows)


def assert_close(actual: Any, expected: np.ndarray) -> None:
    # float32 against float64: measured up to 2e-6 of the largest value; the rest is headroom for other platforms.
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-5 * np.abs(expected).max()


GRIDS = [
    [(1, 2, 2)],
    [(1, 4, 6), (1, 2, 2), (1, 6, 4)],
    [(3, 2, 4), (1, 4, 4)],  # a video as one grid row: its frames do not see each other
    [(1, 2, 20)],  # far longer than the table
]


@pytest.mark.parametrize("grid", GRIDS)
def test_any_mix_of_sizes_equals_the_dense_model(grid: list[tuple[int, int, int]]) -> None:
    """One compiled program for all of them: patches and grids behind the last image are padding."""
    count = sum(t * h * w for t, h, w in grid)
    patches, params = random_patches(52), weights()
    table = np.zeros((3, 3), np.int32)
    table[: len(grid)] = grid
    rows = encode(params, jnp.asarray(patches), jnp.asarray(table), config=TINY.vision)
    assert_close(rows[: count // 4], plain_rows(params, patches, grid, TINY.vision))


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 84},  # heads of 12, a 6x6 table
        {"hidden_size": 40, "num_attention_heads": 1, "patch_size": 8, "layer_norm_eps": 1e-3, "rope_theta": 100.0},
        {"spatial_merge_size": 1, "num_channels": 1, "image_size": 14},  # a table of one position
        {"spatial_merge_size": 3},
    ],
)
def test_other_sizes_equal_the_dense_model(change: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY.vision, **change)
    side = 2 * config.spatial_merge_size
    grid = [(1, side, side), (1, side, config.spatial_merge_size)]
    patches, params = random_patches(sum(h * w for _, h, w in grid), config), weights(config)
    rows = encode(params, jnp.asarray(patches), jnp.asarray(grid, jnp.int32), config=config)
    assert_close(rows, plain_rows(params, patches, grid, config))


def test_projector_on_small_values() -> None:
    """Where the epsilon of its norm, 1e-5 and not the tower's, weighs as much as the variance."""
    hidden = (3e-3 * np.random.default_rng(0).standard_normal((16, TINY.vision.hidden_size))).astype(np.float32)
    params = weights()["projector"]
    rows = project_rows(params, jnp.asarray(hidden), jnp.asarray([[1, 4, 4]], jnp.int32), TINY.vision)
    assert_close(rows, dense.project_frame(dense.as_numpy(params), hidden.astype(np.float64).reshape(4, 4, -1), 2))


def test_frames_do_not_interact() -> None:
    """Each frame's rows are the same, to the last bit, whatever the frame before it shows."""
    params, grid = weights(), jnp.asarray([[1, 4, 4], [1, 4, 4], [0, 0, 0]], jnp.int32)
    patches = random_patches(52)
    before = np.asarray(encode(params, jnp.asarray(patches), grid, config=TINY.vision))
    patches[:16] = -1
    after = np.asarray(encode(params, jnp.asarray(patches), grid, config=TINY.vision))
    np.testing.assert_array_equal(before[4:8], after[4:8])
    assert np.abs(before[:4] - after[:4]).max() > 0.1


@settings(max_examples=40)
@given(
    items=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)).filter(lambda i: i[0] * i[1] * i[2] <= 40),
        min_size=1,
        max_size=4,
    )
)
def test_patch_layout_equals_walking(items: list[tuple[int, int, int]]) -> None:
    """Coordinates, grid sizes and the frame each patch belongs to; every patch of padding is a segment of its own."""
    total, N = sum(t * h * w for t, h, w in items), 170
    table = np.zeros((5, 3), np.int32)
    table[: len(items)] = items
    layout = jax.device_get(layout_of(jnp.asarray(table), N))
    patch = 0
    for frames, height, width in items:
        for _ in range(frames):
            first = patch
            for row in range(height):
                for column in range(width):
                    assert (layout.row[patch], layout.column[patch]) == (row, column)
                    assert (layout.grid_rows[patch], layout.grid_columns[patch]) == (height, width)
                    assert layout.segment[patch] == first
                    patch += 1
    assert patch == total
    np.testing.assert_array_equal(layout.segment[total:], np.arange(total, N))
    assert (np.diff(layout.segment) >= 0).all()


@settings(max_examples=25)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), side=st.sampled_from([1, 2, 5]))
def test_position_table_resizes_like_the_definition(rows: int, columns: int, side: int) -> None:
    table = np.random.default_rng(side).standard_normal((side**2, 3)).astype(np.float32)
    layout = layout_of(jnp.asarray([[1, rows, columns]], jnp.int32), 144)
    actual = _interpolate(jnp.asarray(table), layout, side=side)[: rows * columns]
    expected = dense.resize_table(table.astype(np.float64), side, rows, columns).reshape(-1, 3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6)


@partial(jax.jit, static_argnames="side")
def _interpolate(table: jax.Array, layout: Any, side: int) -> jax.Array:
    return interpolate_positions(table, layout, side)


SHARE = 96
"""Patches of the program on each device."""


@cache
def over(devices: int) -> Any:
    """The vision program spread over that many devices."""
    if devices == 1:
        return jax.jit(partial(graphs.vision, config=TINY))
    layout, frames = sharding.layout("context", devices), sharding.FRAMES
    mesh: Any = Mesh(np.array(jax.devices()[:devices]), ("model",))
    program = partial(graphs.vision, config=TINY, layout=layout)
    return jax.jit(sharding.spread(program, mesh, (sharding.WHOLE, frames, frames), sharding.WHOLE))


@settings(max_examples=8)
@given(
    devices=st.sampled_from([2, 4, 8]),
    shares=st.lists(
        st.lists(st.sampled_from([(1, 2, 2), (1, 2, 8), (1, 4, 6), (2, 2, 4)]), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 99),
)
@example(devices=8, shares=[[(1, 4, 6)]], seed=0)
@example(devices=8, shares=[[(3, 2, 4)], [(1, 2, 20)], [(1, 2, 2), (1, 6, 4)]], seed=0)
@example(devices=2, shares=[[(1, 4, 6)] * 4, [(1, 2, 2)]], seed=0)
def test_each_device_encodes_its_share_as_it_would_alone(
    devices: int, shares: list[list[tuple[int, int, int]]], seed: int
) -> None:
    """To the last bit, for several sizes of images, uneven shares and devices without any."""
    shares, tower = shares[:devices], weights()
    pixels = random_patches(devices * SHARE, seed=seed)
    grids = np.zeros((devices, SHARE // 4, 3), np.int32)
    for device, items in enumerate(shares):
        grids[device, : len(items)] = items
    rows = np.asarray(over(devices)(tower, pixels, grids.reshape(-1, 3)))
    for grid, own, found in zip(grids, np.split(pixels, devices), np.split(rows, devices), strict=True):
        np.testing.assert_array_equal(found, over(1)(tower, own, grid))
    first = sum(t * h * w for t, h, w in shares[0])
    assert_close(rows[: first // 4], plain_rows(tower, pixels[:first], shares[0], TINY.vision))


def test_devices_exchange_nothing_but_the_rows() -> None:
    grids = jax.ShapeDtypeStruct((8 * SHARE // 4, 3), jnp.int32)
    pixels = jax.ShapeDtypeStruct((8 * SHARE, *random_patches(1).shape[1:]), jnp.float32)
    found = collectives(over(8).lower(weights(), pixels, grids).compile().as_text())
    assert [one.kind for one in found] == ["all-gather"]
    assert found[0].bytes == 8 * SHARE // 4 * TINY.text.hidden_size * 4
