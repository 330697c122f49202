"""Index recall, the locality of selections, and the table of variants."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import precision, selection_locality, sparsity_quality
from benchmarks.prompts import dense, index_recall
from benchmarks.selection_locality import BLOCKS, PAGE, locality
from examples.tiny_checkpoint import write_tiny_checkpoint
from examples.train_tiny.model import forward
from examples.train_tiny.objectives import initial_params
from keye_jax import KeyeVL
from runtime.processor import Prompt
from tests.examples.test_train_tiny_model import CONFIG, inputs
from tests.keye_jax.tiny import TINY, random_params, text_prompt
from tests.runtime.media import numbered_picture, write_video


def text(tokens: int) -> Prompt:
    ids, positions = text_prompt(TINY, tokens)
    settings: Any = None
    return Prompt(ids, positions, 0, (), False, (), settings)


@pytest.fixture(scope="module")
def model() -> KeyeVL:
    return KeyeVL(TINY, random_params(TINY))


@pytest.mark.slow
def test_recall_is_that_of_training() -> None:
    """The library's layers and training's own, on the same frames and one question."""
    params = initial_params(CONFIG, 3)
    batch = inputs()
    count = int((np.asarray(batch.segment[0]) == 0).sum())
    only = batch._replace(
        tokens=batch.tokens[:, :count], positions=batch.positions[..., :count], segment=batch.segment[:, :count]
    )
    expected = jax.jit(forward, static_argnames=("config", "mode"))(params, only, CONFIG, "warm-up").recall

    class Given(Prompt):
        def patch_batches(self, max_patches: int) -> Any:
            frames, patches = only.patches.shape[1:3]
            side = round(patches**0.5)
            size = CONFIG.vision.patch_size
            pixels = np.asarray(only.patches).reshape(frames * patches, 3, size, size)
            yield pixels, np.array([[1, side, side]] * frames, np.int32)

    nothing: Any = None
    prompt = Given(np.asarray(only.tokens[0]), np.asarray(only.positions[:, 0]), 0, (nothing,), False, (), nothing)
    found = index_recall(KeyeVL(CONFIG, params), prompt)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (found < 0.999).all()


@pytest.mark.slow
def test_recall_is_whole_where_everything_is_selected(model: KeyeVL) -> None:
    whole = KeyeVL(dense(TINY, 512), model.arrays())
    np.testing.assert_allclose(index_recall(whole, text(300)), 1, atol=1e-5)
    assert (index_recall(model, text(300)) < 0.9).all()


@pytest.mark.slow
def test_unions_are_those_of_the_selected_sets(model: KeyeVL) -> None:
    tokens, topk = 700, TINY.sparse.topk
    prompt = text(tokens)
    _, sets = precision.run(model, precision.Prompt("x", prompt.token_ids, prompt.position_ids))
    found = locality(model, prompt)
    assert (found["tokens"], found["topk"]) == (tokens, topk)
    for size in BLOCKS:
        firsts = [first for first in range(0, tokens - size + 1, size) if first + 1 > topk]
        unions = np.stack([sets[:, first : first + size].any(axis=1) for first in firsts], axis=1)  # [L, blocks, T]
        paged = np.pad(unions, ((0, 0), (0, 0), (0, -tokens % PAGE))).reshape(*unions.shape[:2], -1, PAGE).any(-1)
        figures = found["blocks"][size]
        assert figures["blocks"] == len(firsts) > 0
        np.testing.assert_allclose(figures["union_by_layer"], unions.sum(-1).mean(1), atol=0.01)
        assert figures["pages"] == pytest.approx(paged.sum(-1).mean(), abs=0.01)
        assert topk < figures["union"] <= figures["visible"]


def test_an_even_choice_has_the_union_that_drawing_shows() -> None:
    rng, first, size, topk = np.random.default_rng(0), 40, 16, 12
    drawn = []
    for _ in range(400):
        chosen = set()
        for query in range(first, first + size):
            chosen |= set(rng.choice(query + 1, topk, replace=False).tolist())
        drawn.append(len(chosen))
    figures = selection_locality._figures(np.zeros((1, 1, 2)), np.array([first]), size, topk)
    assert figures["even"] == pytest.approx(np.mean(drawn), rel=0.01)


def test_short_prompts_have_no_figures(model: KeyeVL) -> None:
    assert locality(model, text(14))["blocks"][16] == {"blocks": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, a clip of a second and three questions about it."""
    folder = tmp_path_factory.mktemp("small")
    one_layer = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}}
    write_tiny_checkpoint(folder / "checkpoint", seed=3, overrides=one_layer)
    write_video(folder / "a.mp4", [numbered_picture(n) for n in range(30)])
    questions = [{"kind": "colour", "question": "Which colour?", "answer": "red"}]
    entry = {"duration": 1.0, "queries": ["It moves."], "spans": [[0, 1]], "questions": questions}
    (folder / "annotations.json").write_text(json.dumps({"a": entry}))
    return folder


@pytest.mark.slow
def test_the_table_has_a_row_for_every_variant(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, quantised, _, eight_bits = sparsity_quality.VARIANTS
    monkeypatch.setattr(sparsity_quality, "VARIANTS", (first, quantised, eight_bits))
    options = ["--videos", str(small), "--out", str(small / "out.json"), "--max-new-tokens", "4"]
    command = ["sparsity_quality", str(small / "checkpoint"), str(small / "annotations.json"), *options]
    monkeypatch.setattr(sys, "argv", command)
    assert sparsity_quality.main() == 0
    report = json.loads((small / "out.json").read_text())
    dense, sparse, small_weights = report["variants"]
    assert dense["topk"] == 32768
    assert sparse["topk"] == 24
    assert "all-keys" in dense["figures"]["attention paths"][0]
    assert "top-24" in sparse["figures"]["attention paths"][0]
    assert 0 < sparse["index_recall"]["mean"] < 1
    assert small_weights["weights"] == "int8"
    assert small_weights["index_recall"]["mean"] == pytest.approx(sparse["index_recall"]["mean"], abs=0.02)
    assert "mIoU" in small_weights["figures"]
    assert capsys.readouterr().out.count("| ") == 5 * 7


@pytest.mark.slow
def test_locality_of_a_clip_is_written_and_drawn(
    tiny_bundle: Path, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = ["selection_locality", str(tiny_bundle), str(small / "a.mp4"), "--out", str(out), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", command)
    assert selection_locality.main() == 0
    (record,) = json.loads(out.read_text())["records"]
    assert record["video"] == "a.mp4"
    assert record["blocks"]["64"]["union"] > record["topk"]
    assert picture.stat().st_size > 1000
