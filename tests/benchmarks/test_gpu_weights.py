"""The benchmark of 8-bit weights: its inputs are what conversion stores; every format that is asked for is timed."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import gpu_weights
from benchmarks.gpu.cases_weights import quantised
from benchmarks.gpu.model import TINY, random_model
from keye_jax.params import SCALE, VALUES, flatten, param_specs
from keye_jax.quantise import quantise


@given(st.integers(0, 1000), st.sampled_from([jnp.int8, jnp.float8_e4m3fn]), st.sampled_from([(-2,), (-3, -2), (-1,)]))
@settings(max_examples=20, deadline=None)
def test_weights_are_rounded_as_by_conversion(seed: int, dtype: type, contracted: tuple[int, ...]) -> None:
    w = np.random.default_rng(seed).normal(size=(2, 8, 4, 6)).astype(np.float32)
    found = quantised(jnp.asarray(w), contracted, dtype)
    values = np.empty(w.shape, jnp.dtype(dtype))
    scale = np.empty(found.scale.shape, np.float32)
    quantise(w, contracted, values, scale)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    # A device may multiply by a reciprocal, so that a value next to the middle of two falls to the other one.
    assert np.mean(np.asarray(found.values).view(np.int8) != values.view(np.int8)) < 0.02


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_random_weights_of_8_bits_are_as_large_as_others(weights: gpu_weights.WeightFormat) -> None:
    leaves = dict(flatten(random_model(TINY, weights=weights).params))
    quantised_paths = [path for path, spec in flatten(param_specs(TINY)) if spec.contracted]
    assert quantised_paths
    for path in quantised_paths:
        values, scale = (np.asarray(leaves[*path, name], np.float32) for name in (VALUES, SCALE))
        assert np.std(values) * scale.flat[0] == pytest.approx(0.02, rel=0.1)
        assert (scale == scale.flat[0]).all()


@pytest.mark.slow
def test_prefill_and_decode_are_timed_and_a_wrong_check_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(gpu_weights, "weight_cases", lambda *_: [])
    monkeypatch.setattr(gpu_weights, "Rounded", Wrong)
    assert gpu_weights.main(["--out", str(path), "--config", "tiny", "--formats", "int8", "--seconds", "900"]) == 1
    result = json.loads(path.read_text())
    assert result["prefill_s"]["256"]["int8"] > 0
    assert result["decode_ms"]["256"]["int8"] > 0
    assert result["weights_gib"]["int8"] >= 0
    assert result["checks"]["bfloat16 model int8"]["passed"] is False
    assert "failed" not in result


class Wrong:
    """In the place of a small model: one whose logits are off."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def outcome(self) -> gpu_weights.Outcome:
        return gpu_weights.Outcome(error=3, bound=2, repeats=True, custom_kernel=True)
