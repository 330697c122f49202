"""The library against golden.npz: every array, at the stage it describes, in float32, with the indexer in float32
(`fp8_off`) and quantised (`fp8_on`)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import unpack_bits
from kernels_pallas.index_select import select_bits
from kernels_pallas.index_select.reference import index_scores, select_mask, topk_mask
from kernels_pallas.numerics import hadamard, quantise, round_e4m3
from keye_jax import KeyeVL, graphs
from keye_jax.decoder import decoder_layer, embed, lm_head, rope_tables
from keye_jax.indexer import index_inputs
from keye_jax.moe import route
from keye_jax.ops import plain_layer_norm as layer_norm
from keye_jax.ops import rms_norm, rotate
from keye_jax.rope import mrope_tables, vision_tables
from keye_jax.vision import embed_patches, interpolate_positions, patch_layout, project_rows, vision_block
from tests.keye_jax.golden_prompts import CASES, KINDS, MODES
from tests.keye_jax.tiny import decode, empty_cache, empty_logits, greedy_state, prefill, steps

# Relative to an array's largest magnitude. Golden's own float32 logits lie within 1.6e-6 of a float64 run
# (rounding_error in margins.json); another order of summation errs as much again, the rest is headroom for other
# platforms. A tenth of what the data's README asks for.
BOUND = 1e-5

each_case = pytest.mark.parametrize("case", CASES)
each_mode = pytest.mark.parametrize("mode", MODES)
each_medium = pytest.mark.parametrize(("case", "kind"), [(case, kind) for case in KINDS for kind in KINDS[case]])


def assert_close(actual: Any, expected: np.ndarray, bound: float = BOUND) -> None:
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


def test_e4m3_rounding(golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(round_e4m3(jnp.asarray(golden["unit/e4m3_in"])), golden["unit/e4m3_out"])


def test_block_quantisation(golden: dict[str, np.ndarray]) -> None:
    values, scale = quantise(jnp.asarray(golden["unit/fp8_block_in"]))
    np.testing.assert_array_equal(scale, golden["unit/fp8_block_scale"])
    np.testing.assert_array_equal(values.astype(jnp.float32) * scale[:, None], golden["unit/fp8_block_out"])


def test_hadamard(golden: dict[str, np.ndarray]) -> None:
    assert_close(hadamard(jnp.asarray(golden["unit/hadamard_in"])), golden["unit/hadamard_out"], 1e-6)


def test_tied_topk(golden: dict[str, np.ndarray]) -> None:
    scores = jnp.asarray(golden["unit/tied_scores"])
    visible = jnp.tril(jnp.ones(scores.shape, bool))
    mask = topk_mask(scores, visible, int(golden["unit/tied_topk"]))
    np.testing.assert_array_equal(mask, golden["unit/tied_mask"])


@pytest.mark.parametrize(("rows", "columns"), [(2, 9), (7, 4)])
def test_position_table_resizing(golden: dict[str, np.ndarray], rows: int, columns: int) -> None:
    layout = patch_layout(jnp.array([[1, rows, columns]], jnp.int32), rows * columns)
    resized = interpolate_positions(jnp.asarray(golden["unit/table_in"]), layout, side=5)
    assert_close(resized, golden[f"unit/table_{rows}x{columns}"], 1e-6)


def test_mrope(golden: dict[str, np.ndarray]) -> None:
    positions = jnp.asarray(golden["unit/mrope_positions"])[:, None]
    cos, sin = mrope_tables(positions, 10000.0, (4, 6, 6), False, jnp.float32)
    assert_close(rotate(jnp.asarray(golden["unit/mrope_in"])[None], cos, sin)[0], golden["unit/mrope_out"], 1e-6)


@partial(jax.jit, static_argnames="config")
def _tower_stages(params: dict[str, Any], patches: jax.Array, grid: jax.Array, config: Any) -> dict[str, Any]:
    """What `vision_tokens` computes, with every stage kept."""
    vision = params["vision"]
    layout = patch_layout(grid, patches.shape[0])
    tables = vision_tables(layout.row, layout.column, config.head_dim, config.rope_theta)
    x = embed_patches(vision, patches, layout, config)
    stages = {"patch_embeddings": x, "encoder_layers": []}
    for layer in range(config.num_hidden_layers):
        block = jax.tree.map(lambda w, layer=layer: w[layer], vision["layers"])
        x = vision_block(block, x, tables, layout.spans, config)
        stages["encoder_layers"].append(x)
    post = vision["post_layernorm"]
    stages["tower"] = layer_norm(x, post["weight"], post["bias"], config.layer_norm_eps)
    stages["tokens"] = project_rows(params["projector"], stages["tower"], grid, config)
    return stages


@each_medium
def test_vision_stages(
    golden: dict[str, np.ndarray], golden_params: Any, golden_configs: Any, case: str, kind: str
) -> None:
    """Patch embeddings, each layer, the tower and the projector; packs are padded to one size."""
    patches = golden[f"{case}/pixel_values" + ("_videos" if kind == "video" else "")]
    grid = golden[f"{case}/{kind}_grid_thw"]
    N, M = len(patches), len(grid)
    stages = _tower_stages(
        {name: golden_params[name] for name in ("vision", "projector")},
        np.pad(patches, ((0, 96 - N), (0, 0), (0, 0), (0, 0))),
        np.pad(grid, ((0, 4 - M), (0, 0))),
        golden_configs["fp8_off"].vision,
    )
    assert_close(stages["patch_embeddings"][:N], golden[f"{case}/{kind}_patch_embeddings"])
    assert_close(jnp.stack(stages["encoder_layers"])[:, :N], golden[f"{case}/{kind}_encoder_layers"])
    assert_close(stages["tower"][:N], golden[f"{case}/{kind}_tower"])
    assert_close(stages["tokens"][: N // 4], golden[f"{case}/{kind}_tokens"])


def test_encode_vision(golden: dict[str, np.ndarray], golden_params: Any, golden_configs: Any) -> None:
    """The library call, on an image and the frames of a video in one pack."""
    model = KeyeVL(golden_configs["fp8_off"], golden_params)
    patches = np.concatenate([golden["mixed/pixel_values"], golden["mixed/pixel_values_videos"]])
    grid = np.concatenate([golden["mixed/image_grid_thw"], golden["mixed/video_grid_thw"]])
    rows = np.asarray(model.encode_vision(jnp.asarray(patches), jnp.asarray(grid)))
    images = len(golden["mixed/image_tokens"])
    assert_close(rows[:images], golden["mixed/image_tokens"])
    assert_close(rows[images:], golden["mixed/video_tokens"])


@partial(jax.jit, static_argnames="config")
def _layer(
    stack: Any, layer: jax.Array, h: jax.Array, cache: Any, positions: jax.Array, valid: jax.Array, config: Any
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """`decoder_layer`, and the choices its attention makes, from the same public functions."""
    tables = rope_tables(positions, config, h.dtype)
    out, after = decoder_layer(stack, layer, h, cache, tables, valid, config)
    indexer = jax.tree.map(lambda w: w[layer], stack["indexer"])
    a = rms_norm(h, stack["input_layernorm"][layer], config.text.rms_norm_eps)
    index = index_inputs(indexer, a, *tables[1], config)
    query = (index.q, index.weights, after["idx_k"], after.get("idx_scale"), layer, cache["length"])
    choices = {
        "scores": index_scores(*query),
        "mask": select_mask(*query, config.sparse.topk),
        "bits": select_bits(*query, config.sparse.topk),
    }
    return out, after, choices


@partial(jax.jit, static_argnames="config")
def _experts(stack: Any, layer: jax.Array, middle: jax.Array, config: Any) -> jax.Array:
    """The experts [B, C, k] chosen for a residual stream [B, C, D] that attention has been added to."""
    m = rms_norm(middle, stack["post_attention_layernorm"][layer], config.text.rms_norm_eps)
    _, experts = route(stack["moe"]["router"][layer], m.reshape(-1, m.shape[-1]), config.text)
    return experts.reshape(*m.shape[:2], -1)


@pytest.fixture(scope="module")
def traces(golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Per mode, all stages of the six prompts as one padded batch, each layer fed with what the library's own layer
    before it gave."""
    text, traces = golden_params["text"], {}
    # Experts that add nothing leave the residual stream as attention left it: the router's input.
    layers = text["layers"]
    silent = {**layers, "moe": {**layers["moe"], "down_proj": jnp.zeros_like(layers["moe"]["down_proj"])}}
    for mode, config in golden_configs.items():
        h = embed(text, golden_batch["tokens"], golden_batch["vision_rows"], golden_batch["is_vision"])
        cache = empty_cache(config, len(CASES))
        trace: dict[str, Any] = {"embeddings": h, "hidden_states": [], "experts": [], "choices": []}
        for number in range(config.text.num_hidden_layers):
            layer, rest = jnp.int32(number), (golden_batch["positions"], golden_batch["valid"], config)
            middle, _, _ = _layer(silent, layer, h, cache, *rest)
            h, cache, choices = _layer(layers, layer, h, cache, *rest)
            trace["hidden_states"].append(h)
            trace["experts"].append(np.sort(_experts(layers, layer, middle, config), axis=-1))
            trace["choices"].append(choices)
        trace["final_hidden"] = rms_norm(h, text["norm"], config.text.rms_norm_eps)
        trace["logits"] = lm_head(text, trace["final_hidden"])
        traces[mode] = trace
    return traces


@each_case
def test_decoder_input(golden: dict[str, np.ndarray], traces: Any, case: str) -> None:
    expected = golden[f"{case}/embeddings"]
    assert_close(traces["fp8_off"]["embeddings"][CASES.index(case), : len(expected)], expected)


@each_mode
@each_case
def test_hidden_states(golden: dict[str, np.ndarray], traces: Any, case: str, mode: str) -> None:
    """After each decoder layer, after the final norm, and the logits of every position."""
    row, trace = CASES.index(case), traces[mode]
    T = len(golden[f"{case}/input_ids"])
    assert_close(jnp.stack(trace["hidden_states"])[:, row, :T], golden[f"{case}/{mode}/hidden_states"])
    assert_close(trace["final_hidden"][row, :T], golden[f"{case}/{mode}/final_hidden"])
    assert_close(trace["logits"][row, :T], golden[f"{case}/{mode}/logits"])


@each_mode
@each_case
def test_selected_sets(golden: dict[str, np.ndarray], traces: Any, case: str, mode: str) -> None:
    """Identical sets, both as the boolean mask and as the packed bits that attention reads."""
    row, choices = CASES.index(case), traces[mode]["choices"]
    expected = golden[f"{case}/{mode}/selected_mask"]
    T = expected.shape[-1]
    for layer, chosen in enumerate(choices):
        mask = np.asarray(chosen["mask"])[row, :T]
        np.testing.assert_array_equal(mask[:, :T], expected[layer])
        assert not mask[:, T:].any()
        np.testing.assert_array_equal(unpack_bits(chosen["bits"])[row, :T], mask)
        ids = [np.flatnonzero(r) for r in mask]
        listed = golden[f"{case}/{mode}/selected_indices"][layer]
        assert all((a == b[b >= 0]).all() for a, b in zip(ids, listed, strict=True))


@each_mode
@each_case
def test_indexer_scores(golden: dict[str, np.ndarray], margins: Any, traces: Any, case: str, mode: str) -> None:
    """Within BOUND of the layer's largest score. Quantised, a value next to the middle of two e4m3 values may round
    either way: a few entries may then be off by as much as noise moved them (`noisy_score_change`)."""
    row, choices = CASES.index(case), traces[mode]["choices"]
    expected = golden[f"{case}/{mode}/indexer_scores"]
    T = expected.shape[-1]
    actual = np.stack([np.asarray(c["scores"])[row, :T, :T] for c in choices])
    visible = np.tril(np.ones((T, T), bool))
    assert np.isneginf(actual[:, ~visible]).all()
    actual, expected = actual[:, visible], expected[:, visible]
    error = np.abs(actual - expected) / np.abs(expected).max(axis=-1, keepdims=True)
    if mode == "fp8_off":
        assert error.max() <= BOUND
    else:
        assert np.mean(error > BOUND) <= 0.01
        assert error.max() <= margins[case][mode]["noisy_score_change"]


@each_mode
@each_case
def test_experts(golden: dict[str, np.ndarray], traces: Any, case: str, mode: str) -> None:
    expected = golden[f"{case}/{mode}/experts"]
    actual = np.stack(traces[mode]["experts"])[:, CASES.index(case), : expected.shape[1]]
    np.testing.assert_array_equal(actual, expected)


@each_mode
def test_forward(
    golden: dict[str, np.ndarray],
    golden_params: Any,
    golden_configs: Any,
    golden_batch: dict[str, jax.Array],
    mode: str,
) -> None:
    """The library call on all prompts as one padded batch."""
    model = KeyeVL(golden_configs[mode], golden_params)
    rows = golden_batch["vision_rows"][golden_batch["is_vision"]]
    logits = np.asarray(model(golden_batch["tokens"], golden_batch["positions"], vision_rows=rows))
    for row, case in enumerate(CASES):
        expected = golden[f"{case}/{mode}/logits"]
        assert_close(logits[row, : len(expected)], expected)


@pytest.fixture(scope="module")
def prefilled(golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Per mode, cache and logits after the prompts."""
    chunk = graphs.Chunk(**{name: golden_batch[name] for name in graphs.Chunk.__annotations__})
    return {
        mode: prefill(
            golden_params["text"], empty_cache(config, len(CASES)), empty_logits(config, len(CASES)), chunk, config
        )
        for mode, config in golden_configs.items()
    }


@each_mode
@pytest.mark.parametrize("per_call", [1, 4, 16])
def test_greedy_decoding(
    golden: dict[str, np.ndarray],
    golden_params: Any,
    golden_configs: Any,
    golden_batch: dict[str, jax.Array],
    prefilled: Any,
    mode: str,
    per_call: int,
) -> None:
    """16 greedy tokens of every case, for any number of tokens a device loop; and the logits each was chosen from."""
    cache, logits = prefilled[mode]
    state, tokens, seen = greedy_state(golden_batch["delta"]), [], []
    for _ in range(16 // per_call):
        seen.append(np.asarray(logits))
        cache, logits, state, new, finite = decode(
            golden_params["text"], cache, logits, state, steps(per_call), golden_configs[mode]
        )
        assert finite.all()
        tokens.append(np.asarray(new)[:, :per_call])
    for row, case in enumerate(CASES):
        np.testing.assert_array_equal(np.hstack(tokens)[row], golden[f"{case}/{mode}/decode_tokens"])
        assert_close(np.stack(seen)[:, row], golden[f"{case}/{mode}/decode_logits"][::per_call])
