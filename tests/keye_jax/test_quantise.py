"""8-bit weights: how near they are, what never changes, and that loading keeps them as the declaration says."""

import math
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.numerics import round_e4m3
from keye_jax import checkpoint as checkpoint_module
from keye_jax import quantise as module
from keye_jax.checkpoint import load_params, open_checkpoint, read_group
from keye_jax.config import KeyeConfig
from keye_jax.params import SCALE, VALUES, WEIGHT_DTYPES, WeightFormat, flatten, param_specs, storage_groups
from keye_jax.quantise import quantise

CHECKPOINT = Path(__file__).parents[1] / "golden" / "checkpoint"
CONFIG = KeyeConfig.from_hf(CHECKPOINT)
FORMATS: tuple[WeightFormat, ...] = ("int8", "fp8")
each_format = pytest.mark.parametrize("weights", FORMATS)

# Shapes and contracted axes as the parameters have them: projections, output projection, experts, head.
LAYOUTS = [((6, 2, 4), (-3,)), ((2, 4, 6), (-3, -2)), ((3, 6, 5), (-2,)), ((7, 6), (-1,)), ((2, 6, 3, 5), (-3,))]


def run(array: np.ndarray, contracted: tuple[int, ...], weights: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the scales with the contracted axes kept."""
    values = np.full(array.shape, 77, WEIGHT_DTYPES[weights])
    kept = [extent for axis, extent in enumerate(array.shape) if axis - array.ndim not in contracted]
    scale = np.full(kept, np.nan, np.float32)
    quantise(array, contracted, values, scale)
    return values, np.expand_dims(scale, contracted)


@settings(max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    weights=st.sampled_from(FORMATS),
    exponent=st.integers(-100, 100),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_weights_come_back_within_half_a_step_of_their_channel(layout, weights, exponent, seed, dtype):
    """Whatever the channel's size: int8 steps are a scale wide; float8 steps an eighth of the weight at most, and 2**-9
    of the scale at least. Dividing by the scale in float32 moves a quotient by 2**-24 of itself."""
    shape, contracted = layout
    rng = np.random.default_rng(seed)
    array = np.ldexp(rng.standard_normal(shape), rng.integers(-6, 1, shape) + exponent).astype(dtype)
    values, scale = run(array, contracted, weights)
    exact, scale = array.astype(np.float64), scale.astype(np.float64)
    step = scale if weights == "int8" else np.maximum(np.abs(exact) * 2.0**-3, scale * 2.0**-9)
    error = np.abs(values.astype(np.float64) * scale - exact)
    assert np.all(error <= step / 2 + np.abs(exact) * 2.0**-24)
    # The largest of each channel is the format's largest number: no precision is left unused.
    largest = {"int8": 127, "fp8": 448}[weights]
    assert np.all(np.abs(values.astype(np.float64)).max(contracted) == largest)


@each_format
def test_a_channel_of_zeros_is_zero_and_no_scale_is(weights):
    """Nor subnormal, which accelerators read as zero."""
    array = np.zeros((4, 3), np.float32)
    array[:, 1], array[2, 2] = [1, -2, 3, 0], 1e-42
    values, scale = run(array, (-2,), weights)
    assert scale[0, 0] == 1
    assert np.all(values[:, 0] == 0)
    assert np.all(scale >= np.finfo(np.float32).tiny)
    assert np.all(np.isfinite(values.astype(np.float32)))


@each_format
def test_the_same_bits_in_pieces_of_any_size(weights, monkeypatch):
    for shape, contracted in LAYOUTS:
        array = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        whole = run(array, contracted, weights)
        for size in (1, 100, 300):
            monkeypatch.setattr(module, "_PIECE_BYTES", size)
            for found, expected in zip(run(array, contracted, weights), whole, strict=True):
                assert found.tobytes() == expected.tobytes()


def test_halves_go_to_the_even_neighbour():
    integers = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]], np.float32)
    values, scale = run(integers, (-1,), "int8")
    assert scale == 1
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, 126, -126]]


def test_float8_is_the_one_nearest_to_each_float32():
    """numpy's own conversion rounds once: at every middle between two float8 numbers, and next to it."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    points = np.concatenate([np.nextafter(middles, np.float32(-500)), middles, np.nextafter(middles, np.float32(500))])
    values, scale = run(np.append(points, np.float32(448))[None], (-1,), "fp8")
    assert scale == 1
    np.testing.assert_array_equal(values[0, :-1].astype(np.float32), np.asarray(round_e4m3(jnp.asarray(points))))


def quantised(path: tuple[str, ...]) -> bool:
    large = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    return path[0] == "text" and path[-1] in large and "indexer" not in path


@each_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_quantises_what_is_declared_and_nothing_else(weights, dtype, monkeypatch):
    wide = dict(flatten(load_params(CHECKPOINT, CONFIG, dtype)))
    tree = load_params(CHECKPOINT, CONFIG, dtype, weights=weights)
    found = dict(flatten(tree))
    specs = dict(flatten(param_specs(CONFIG, weights)))
    assert found.keys() == specs.keys()
    assert sum(path[-1] == VALUES for path in found) == sum(map(quantised, wide)) == 7
    for path, array in wide.items():
        if not quantised(path):
            assert np.asarray(found[path]).tobytes() == np.asarray(array).tobytes()
            continue
        values, scale = (np.asarray(found[*path, name]) for name in (VALUES, SCALE))
        assert (values.shape, values.dtype, scale.dtype) == (array.shape, WEIGHT_DTYPES[weights], np.float32)
        contracted = dict(flatten(param_specs(CONFIG)))[path].contracted
        expected, expected_scale = run(np.asarray(array), contracted, weights)
        assert values.tobytes() == expected.tobytes()
        assert scale.tobytes() == expected_scale.tobytes()
    monkeypatch.setattr(checkpoint_module, "_HOST_STACK_BYTES", 0)
    for path, array in flatten(load_params(CHECKPOINT, CONFIG, dtype, weights=weights)):
        assert np.asarray(array).tobytes() == np.asarray(found[path]).tobytes()


@each_format
def test_groups_hold_what_loading_gives(weights):
    """Read one after another into the same dirty memory."""
    whole = dict(flatten(load_params(CHECKPOINT, CONFIG, "bfloat16", weights=weights)))
    opened, groups = open_checkpoint(CHECKPOINT, CONFIG), storage_groups(CONFIG, weights)
    memory = np.full(max(checkpoint_module.group_bytes(group, "bfloat16") for group in groups.values()), 0xFF, np.uint8)
    sizes = [checkpoint_module.scratch_bytes(group, "bfloat16") for group in groups.values()]
    assert max(sizes) == 2 * math.prod(whole["text", "layers", "moe", "gate_up_proj", VALUES].shape[1:])
    scratch = np.full(max(sizes), 0xFF, np.uint8)
    seen: dict[Any, int] = {}
    for group in groups.values():
        for path, array in read_group(opened, group, "bfloat16", memory=memory, scratch=scratch).items():
            expected = np.asarray(whole[path] if group.layer is None else whole[path][group.layer])
            assert (array.shape, array.tobytes()) == (expected.shape, expected.tobytes()), path
            seen[path] = seen.get(path, 0) + 1
    assert seen == {path: len(array) if "layers" in path else 1 for path, array in whole.items()}


def test_the_published_model_takes_half_the_memory():
    """What it is for: one GPU of 80 GB, four chips of 16 GB, a host of 64 GB."""
    from benchmarks.published import CONFIG as published

    config = KeyeConfig.from_hf(published)
    sizes = {
        weights: sum(spec.nbytes("bfloat16") for _, spec in flatten(param_specs(config, weights)))
        for weights in get_args(WeightFormat)
    }
    assert sizes["none"] > 62e9
    assert sizes["int8"] == sizes["fp8"] < 32.5e9
