"""The model with 8-bit weights: the same function as with the weights that they stand for, in prefill, in decoding and
on several devices, and as near to the original as rounding can be."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import KeyeVL
from keye_jax.layers import project, weights_of
from keye_jax.ops import Quantized
from keye_jax.params import SCALE, VALUES, Path, WeightFormat, flatten, param_specs, unflatten
from tests.conftest import GOLDEN
from tests.keye_jax.golden_prompts import CASES
from tests.keye_jax.test_distributed import answer

FORMATS: tuple[WeightFormat, ...] = ("int8", "fp8")
each_format = pytest.mark.parametrize("weights", FORMATS)


def load(weights: WeightFormat, dtype: str = "float32") -> KeyeVL:
    return KeyeVL.from_hf(GOLDEN / "checkpoint", dtype=dtype, indexer_dtype="float32", weights=weights)


@pytest.fixture(scope="module")
def models() -> dict[str, KeyeVL]:
    return {weights: load(weights) for weights in FORMATS}


def widened(model: KeyeVL) -> dict[Path, Any]:
    """The weights that 8-bit ones stand for, in float32, by full path."""
    leaves, wide = dict(flatten(model.arrays())), {}
    for path, spec in flatten(param_specs(model.config)):
        if path in leaves:
            wide[path] = leaves[path]
        else:
            scale = jnp.expand_dims(leaves[*path, SCALE], spec.contracted)
            wide[path] = leaves[*path, VALUES].astype(jnp.float32) * scale
    return wide


def logits(model: KeyeVL, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[T, V] of text: ids [T], positions [3, T]."""
    return np.asarray(model(jnp.asarray(ids)[None], jnp.asarray(positions)[:, None]))[0]


def logits_of(model: KeyeVL, batch: dict[str, Any]) -> np.ndarray:
    """[B, T, V] of all golden prompts."""
    return np.asarray(model(batch["tokens"], batch["positions"], batch["vision_rows"][batch["is_vision"]]))


@each_format
def test_a_product_is_that_of_the_weights_rounded_once(weights: WeightFormat) -> None:
    """Against float64, for every layout: the sum is float32, and the scale multiplies it before it is rounded."""
    rng = np.random.default_rng(0)
    for subscripts, shapes, scale_shape in (
        ("bcd,dhk->bchk", ((2, 3, 64), (64, 4, 8)), (4, 8)),
        ("bchk,hkd->bcd", ((2, 3, 4, 16), (4, 16, 32)), (32,)),
        ("...d,vd->...v", ((2, 3, 64), (40, 64)), (40,)),
    ):
        x, w = (rng.standard_normal(shape) for shape in shapes)
        values = jnp.asarray(40 * w, jnp.int8 if weights == "int8" else jnp.float8_e4m3fn)
        scale = jnp.asarray(rng.uniform(0.001, 0.002, scale_shape), jnp.float32)
        for dtype, rounding in ((jnp.float32, 2**-24), (jnp.bfloat16, 2**-8)):
            rows = jnp.asarray(x, dtype)
            exact = np.asarray(values, np.float64), np.asarray(scale, np.float64), np.asarray(rows, np.float64)
            product = project(subscripts, rows, Quantized(values, scale))
            terms = np.einsum(subscripts, np.abs(exact[2]), np.abs(exact[0])) * exact[1]
            expected = np.einsum(subscripts, exact[2], exact[0]) * exact[1]
            assert product.dtype == dtype
            # float32 sums of 64 terms err by 1e-6 of their magnitudes' sum at most, rounding by half a unit.
            error = np.abs(np.asarray(product, np.float64) - expected)
            assert np.all(error <= 1e-6 * terms + rounding * np.abs(expected))


def test_only_dictionaries_of_values_and_scale_are_weights_of_8_bits() -> None:
    array = jnp.zeros(1)
    tree = {"a": {"values": array, "scale": array}, "b": {"values": array}, "c": {"d": array}, "e": array}
    assert weights_of(tree) == {**tree, "a": Quantized(array, array)}


@each_format
def test_the_model_is_that_of_the_weights_it_stands_for(
    models: dict[str, KeyeVL], golden_batch: dict[str, Any], weights: WeightFormat
) -> None:
    """All golden prompts; float32 multiplies scales and sums in another order, as in `test_golden.BOUND`."""
    model = models[weights]
    found = logits_of(model, golden_batch)
    expected = logits_of(KeyeVL(model.config, unflatten(widened(model))), golden_batch)
    for row, length in enumerate(np.asarray(golden_batch["valid"])):
        error = np.abs(found[row, :length] - expected[row, :length]).max()
        assert error <= 1e-5 * np.abs(expected[row, :length]).max(), CASES[row]


@each_format
def test_logits_move_no_more_than_half_a_step_in_every_weight_moves_them(
    models: dict[str, KeyeVL], golden_params: dict[str, Any], golden: dict[str, np.ndarray], weights: WeightFormat
) -> None:
    """Rounding moves a weight by half a step at most, by 0.58 of that on average over its square; so logits must move
    less than those of models each of whose weights was moved by all of half a step, up or down at random. (In a prompt
    that selects all keys: a key more or less would move them by more than rounding does.)"""
    model = models[weights]
    leaves, specs = dict(flatten(model.arrays())), dict(flatten(param_specs(model.config)))
    rng = np.random.default_rng(0)

    def moved() -> KeyeVL:
        tree = {}
        for path, array in flatten(golden_params):
            if path in leaves:
                tree[path] = array
                continue
            scale = np.expand_dims(np.asarray(leaves[*path, SCALE]), specs[path].contracted)
            binade = np.exp2(np.floor(np.log2(np.maximum(np.abs(array) / scale, 2.0**-6))))
            step = scale * (1 if weights == "int8" else binade * 2.0**-3)
            tree[path] = jnp.asarray(array + rng.choice([-0.5, 0.5], array.shape) * step, jnp.float32)
        return KeyeVL(model.config, unflatten(tree))

    ids, positions = golden["text_short/input_ids"], golden["text_short/position_ids"]
    exact = logits(KeyeVL(model.config, golden_params), ids, positions)

    def distance(other: KeyeVL) -> float:
        return float(np.sqrt(np.mean((logits(other, ids, positions) - exact) ** 2)))

    found, bound = distance(model), min(distance(moved()) for _ in range(4))
    assert 0 < found < bound


@pytest.fixture(scope="module")
def answered(models: dict[str, KeyeVL], golden_batch: dict[str, Any]) -> tuple[Any, Any]:
    """What the int8 model answers on one device."""
    model = models["int8"]
    return answer(model.config, "single", 1, model.arrays()["text"], golden_batch, "int8")


def test_decoding_gives_the_tokens_that_the_whole_forward_pass_finds_best(
    models: dict[str, KeyeVL], golden: dict[str, np.ndarray], answered: Any
) -> None:
    """Decoding has kernels of its own, which must read the same weights."""
    new = [token for token in answered[0][CASES.index("text_long")].tolist() if token >= 0]
    assert len(new) == 8
    ids, positions = golden["text_long/input_ids"], golden["text_long/position_ids"]
    ids = np.concatenate([ids, new])
    rest = positions.max() + 1 + np.arange(len(new))
    positions = np.concatenate([positions, np.tile(rest, (3, 1))], axis=1)
    found = logits(models["int8"], ids, positions)
    assert found[-len(new) - 1 : -1].argmax(-1).tolist() == new


def test_several_devices_answer_what_one_does(
    models: dict[str, KeyeVL], golden_batch: dict[str, Any], answered: Any
) -> None:
    """Prefill in chunks and decoding, with experts, heads and vocabulary spread."""
    model = models["int8"]
    tokens, last = answer(model.config, "context", 2, model.arrays()["text"], golden_batch, "int8")
    np.testing.assert_array_equal(tokens, answered[0])
    # Sums over devices round in another order.
    np.testing.assert_allclose(last, answered[1], atol=1e-5 * np.abs(answered[1]).max())


def test_weights_of_another_format_are_refused(golden_params: dict[str, Any], models: dict[str, KeyeVL]) -> None:
    config = models["int8"].config
    with pytest.raises(ValueError, match="missing or not declared"):
        KeyeVL(config, golden_params, "int8")
    with pytest.raises(ValueError, match="missing or not declared"):
        KeyeVL(config, models["int8"].arrays())
    with pytest.raises(ValueError, match="is int8, declared float8_e4m3fn"):
        KeyeVL(config, models["int8"].arrays(), "fp8")
    with pytest.raises(ValueError, match="weights 'int4' is not one of none, int8, fp8"):
        KeyeVL.from_hf(GOLDEN / "checkpoint", weights="int4")  # pyright: ignore[reportArgumentType]
