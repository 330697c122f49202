"""What a training run leaves behind: its state, and a checkpoint that the library reads."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.train_tiny import checkpoint
from examples.train_tiny.objectives import initial_params, optimizer
from examples.train_tiny.schedule import STAGES, scaled
from examples.train_tiny.state import load_state, save_state
from keye_jax import KeyeConfig, KeyeVL
from keye_jax.params import count_params, flatten


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KeyeConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    config = checkpoint.write_untrained(folder)
    params = initial_params(config, 1)
    size = checkpoint.write_trained(folder, config, params)
    assert size < 20e6
    return folder, config, params


def test_the_written_checkpoint_is_the_trained_weights_in_bfloat16(trained: Any):
    folder, config, params = trained
    assert 2e6 < count_params(config) < 9e6
    read = dict(flatten(KeyeVL.from_hf(folder, dtype="bfloat16", indexer_dtype="bf16").arrays()))
    for path, leaf in flatten(params):
        np.testing.assert_array_equal(read[path], leaf.astype(jnp.bfloat16).astype(read[path].dtype), str(path))


def test_the_configuration_uses_every_part_and_a_selection_far_below_the_context(trained: Any):
    _, config, _ = trained
    assert config.text.num_experts > config.text.num_experts_per_tok > 1
    assert config.sparse.topk * 4 < STAGES[-1].shape.tokens


def test_a_state_comes_back_as_it_was(tmp_path: Path, trained: Any):
    _, config, params = trained
    state = optimizer(config, "warm-up", 1e-3, 10).init(params)
    assert load_state(tmp_path / "state.npz", params) is None
    save_state(tmp_path / "state.npz", params, state, 7)
    loaded = load_state(tmp_path / "state.npz", params)
    assert loaded is not None
    assert loaded[2] == 7
    weights = dict(flatten(loaded[0]))
    for path, leaf in flatten(params):
        np.testing.assert_array_equal(weights[path], leaf, str(path))
    assert len(loaded[1]) == len(jax.tree.leaves(state))
    smaller = {**params, "text": {**params["text"], "norm": params["text"]["norm"][:3]}}
    with pytest.raises(ValueError, match="text/norm"):
        load_state(tmp_path / "state.npz", smaller)


def test_scaled_stages_follow_one_another():
    stages = scaled(STAGES, 0.01, 0.5)
    assert [stage.first for stage in stages[1:]] == [stage.end for stage in stages[:-1]]
    assert stages[0].steps == round(STAGES[0].steps * 0.01)
    assert stages[0].shape.clips == STAGES[0].shape.clips // 2
