"""Training's forward pass against the library's own, and the indexer's gradients."""

from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.train_tiny.attention import divergence, select
from examples.train_tiny.data import Batch
from examples.train_tiny.model import Inputs, Mode, forward, vision_rows
from examples.train_tiny.objectives import initial_params, is_indexer, objective, optimizer
from examples.train_tiny.scenes import States
from keye_jax import KeyeConfig, KeyeVL
from keye_jax.config import SparseConfig, TextConfig, VisionConfig
from keye_jax.params import flatten
from runtime.positions import position_ids

CONFIG = KeyeConfig(
    text=TextConfig(
        vocab_size=40,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        rope_theta=10000.0,
        mrope_section=(4, 2, 2),
    ),
    sparse=SparseConfig(indexer_num_heads=2, indexer_head_dim=8, topk=6, indexer_dtype="float32"),
    vision=VisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=56
    ),
    image_token_id=38,
    video_token_id=39,
)
FRAMES, PATCHES, GRID = 3, 16, (1, 4, 4)
FRAME = [1, 2, *[CONFIG.video_token_id] * 4]
QUESTIONS = ([3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14])
PADDING = 4

compiled = jax.jit(forward, static_argnames=("config", "mode"))


def inputs() -> Inputs:
    """One clip of three frames with three questions and some padding."""
    frames = FRAME * FRAMES
    tokens = [*frames, *(token for question in QUESTIONS for token in question), *[0] * PADDING]
    segment = [0] * len(frames)
    positions = [place(np.array(frames))]
    for number, question in enumerate(QUESTIONS, start=1):
        segment += [number] * len(question)
        positions.append(place(np.array([*frames, *question]))[:, len(frames) :])
    positions.append(np.zeros((3, PADDING), np.int32))
    segment += [-1] * PADDING
    patches = np.random.default_rng(0).standard_normal((1, FRAMES, PATCHES, CONFIG.vision.patch_dim), np.float32)
    rows: list[Any] = [patches, [tokens], np.concatenate(positions, 1)[:, None], [segment]]
    return Inputs(*map(jnp.asarray, rows))


def place(ids: np.ndarray) -> np.ndarray:
    pads = {"image_token_id": CONFIG.image_token_id, "video_token_id": CONFIG.video_token_id}
    return position_ids(ids, [GRID] * FRAMES, **pads)[0]


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return initial_params(CONFIG, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "topk"), [("dense", 1024), ("sparse", CONFIG.sparse.topk)])
def test_every_question_gets_the_logits_of_the_library_asked_alone(params: Any, mode: Mode, topk: int):
    given = inputs()
    config = replace(CONFIG, sparse=replace(CONFIG.sparse, topk=topk))
    logits = compiled(params, given, config, mode).logits
    model = KeyeVL(config, params)
    patches = given.patches[0].reshape(-1, 3, 14, 14)
    rows = model.encode_vision(patches, jnp.array([GRID] * FRAMES))
    np.testing.assert_allclose(
        vision_rows(params, given.patches, config.vision)[0].reshape(rows.shape), rows, atol=2e-5
    )
    for number in range(1, len(QUESTIONS) + 1):
        own = np.flatnonzero(np.isin(given.segment[0], (0, number)))
        alone = model(given.tokens[:, own], given.positions[:, :, own], rows)
        # float32 throughout; logits reach 4, sums are of other order.
        np.testing.assert_allclose(logits[:, own], alone, atol=5e-5)


@pytest.mark.slow
def test_sparse_attention_is_another_model_than_dense_and_warm_up_is_the_dense_one(params: Any):
    dense, warm, sparse = (compiled(params, inputs(), CONFIG, mode) for mode in ("dense", "warm-up", "sparse"))
    # Written differently; float32 rounding is all that differs.
    np.testing.assert_allclose(dense.logits, warm.logits, atol=1e-5)
    assert float(jnp.abs(dense.logits - sparse.logits).max()) > 0.1
    assert (np.asarray(warm.divergence) > 0).all()
    assert ((np.asarray(warm.recall) > 0) & (np.asarray(warm.recall) < 1)).all()


def test_selection_takes_the_largest_and_of_equal_ones_the_first():
    scores = jnp.array([[0.0, 2.0, -0.0, 1.0, 9.0], [5.0, 5.0, 5.0, 5.0, 5.0], [3.0, 1.0, 2.0, 0.0, 0.0]])
    visible = jnp.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    expected = [[1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(select(scores, visible, 3), np.array(expected, bool))


def test_divergence_is_zero_for_the_distribution_itself_and_counts_seen_keys_only():
    seen = jnp.array([[[True, True, False]]])
    share = jnp.array([0.25, 0.75, 0.0]).reshape(1, 1, 1, 3)
    index = jnp.log(jnp.array([[[0.25, 0.75, 1e9]]]))
    assert abs(float(divergence(share, index, seen)[0, 0])) < 1e-6
    assert float(divergence(share, -index, seen)[0, 0]) == pytest.approx(0.5 * np.log(3), rel=1e-5)


@pytest.mark.slow
def test_warm_up_has_gradients_for_the_indexer_alone(params: Any):
    given = inputs()
    states = States(*np.zeros((6, 1, FRAMES, 1), np.int16))
    learned = np.asarray(given.segment) > 0
    batch = Batch(states, np.zeros(1, np.uint8), *map(np.asarray, given[1:]), learned, np.zeros((1, 1), np.int8))
    slope = jax.jit(jax.grad(lambda p: objective(forward(p, given, CONFIG, "warm-up"), batch, "warm-up")[0]))
    steep = {path for path, gradient in flatten(slope(params)) if float(jnp.abs(gradient).max()) > 0}
    assert steep == {path for path, flag in flatten(is_indexer(CONFIG)) if flag}


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_phase_moves_its_own_weights_only(mode: Mode, params: Any):
    rule = optimizer(CONFIG, mode, 1e-3, 10)
    slope = jax.tree.map(np.ones_like, params)

    @jax.jit
    def second_update(params: Any) -> Any:
        # The first step has rate 0.
        state = rule.update(slope, rule.init(params), params)[1]
        return rule.update(slope, state, params)[0]

    updates = second_update(params)
    moved = {path for path, update in flatten(updates) if float(jnp.abs(update).max()) > 0}
    indexer = {path for path, flag in flatten(is_indexer(CONFIG)) if flag}
    everything = {path for path, _ in flatten(params)}
    assert moved == {"dense": everything - indexer, "warm-up": indexer, "sparse": everything}[mode]
