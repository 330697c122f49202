"""Synthetic scenes, questions about them, and the sequences that training reads."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from examples.train_tiny.checkpoint import write_untrained
from examples.train_tiny.data import MOST_QUESTIONS, Shape, make_batch
from examples.train_tiny.evaluation import exact_answers
from examples.train_tiny.prompts import Prompts
from examples.train_tiny.questions import GROUNDING_PROMPT, KINDS, ask, sample_questions, seconds
from examples.train_tiny.render import render
from examples.train_tiny.scenes import COLOUR_NAMES, SHAPES, SPRITE, STEP, Scene, Track, sample_scene, states
from examples.train_tiny.timelines import Timeline, sample_timeline
from runtime.processor import Processor, ProcessorSettings
from runtime.tokenizer import Tokenizer

CIRCLE, STAR = SHAPES.index("circle"), SHAPES.index("star")
RED, BLUE = COLOUR_NAMES.index("red"), COLOUR_NAMES.index("blue")
TIMES = np.arange(8, dtype=np.float32)
SCENE = Scene(
    8.0,
    (
        Track(CIRCLE, 0.5, 6.5, ((0.5, RED), (3.5, BLUE)), ((0.5, 7), (2.5, 4)), ((0, 0), (140, 0))),
        Track(STAR, 2.5, 5.5, ((2.5, COLOUR_NAMES.index("green")),), (), ((7, 77), (7, 77))),
    ),
    30,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untrained")
    write_untrained(path)
    return path


def test_a_scene_is_what_its_tracks_say_at_every_time():
    seen = states(SCENE, TIMES)
    assert seen.visible.T.tolist() == [[0, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert seen.colour[1:7, 0].tolist() == [RED] * 3 + [BLUE] * 3
    assert seen.digit[1:7, 0].tolist() == [7, 7, 4, 4, 4, 4]
    assert (seen.digit[:, 1] == -1).all()
    assert (np.diff(seen.column[1:7, 0]) > 0).all()
    assert (seen.column % STEP == 0).all()


def test_sampled_scenes_keep_their_promises():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        timeline = sample_timeline(rng, 8, 16)
        times = timeline.times
        assert 8 <= len(times) <= 16
        scene = sample_scene(rng, times, timeline.duration)
        seen = states(scene, times)
        assert (seen.visible.sum(axis=0) >= 2).all()
        assert len({track.shape for track in scene.tracks}) == len(scene.tracks)
        colours = [colour for track in scene.tracks for _, colour in track.colours]
        assert len(set(colours)) == len(colours)
        corners = np.stack([seen.column, seen.row])[:, seen.visible > 0]
        assert corners.min() >= 0
        assert corners.max() <= 224 - SPRITE


def test_pixels_have_the_shape_its_colour_and_its_digit_and_are_the_same_in_jax():
    seen = states(SCENE, TIMES)
    frames = render(seen, SCENE.background)
    assert (frames[0] == SCENE.background).all()
    left = int(seen.column[1, 0])
    circle = frames[1, :SPRITE, left : left + SPRITE]
    assert circle[SPRITE // 2, 2].tolist() == [220, 40, 40]
    assert (circle[0, 0] == SCENE.background).all()
    assert {(0, 0, 0), (255, 255, 255)} <= {tuple(pixel) for pixel in circle.reshape(-1, 3).tolist()}
    traced = render(type(seen)(*map(jnp.asarray, seen)), jnp.uint8(SCENE.background), jnp)
    np.testing.assert_array_equal(traced, frames)


def test_answers_are_true():
    seen = states(SCENE, TIMES)
    answers: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for seed in range(400):
        for kind in KINDS:
            question = ask(kind, np.random.default_rng(seed), seen, TIMES)
            if question is not None:
                answers[kind].add(f"{question.text} {question.answer}")
    assert "When is the circle visible? From 1.0 to 6.0 seconds." in answers["when"]
    assert "When is the circle blue? From 4.0 to 6.0 seconds." in answers["when"]
    assert "When does the circle show the digit 7? From 1.0 to 2.0 seconds." in answers["when"]
    query = GROUNDING_PROMPT.format(query="the green star is visible")
    assert f"{query} From 3.0 to 5.0 seconds." in answers["when"]
    assert "Which colour is the circle at 3.0 seconds? Red." in answers["colour"]
    assert "Which colour does the circle turn into? Blue." in answers["colour"]
    assert "What is visible at 4.0 seconds? A blue circle with a 4 and a green star." in answers["what"]
    assert "Which shape is green? A star." in answers["what"]
    assert "How many shapes are visible at 0.0 seconds? 0." in answers["count"]
    assert "How many shapes appear in the video? 2." in answers["count"]
    assert "Which appears first, the circle or the star? The circle." in answers["order"]
    assert "Which disappears last, the star or the circle? The circle." in answers["order"]
    assert "Which digit does the circle show at 2.0 seconds? 7." in answers["digit"]
    described = (
        "A red circle with a 7 is visible from 1.0 to 6.0 seconds. A green star is visible from 3.0 to 5.0 seconds."
    )
    assert answers["describe"] == {f"What happens in this video? {described}", f"Describe the video. {described}"}


def test_a_question_has_exactly_the_ids_that_the_runtime_gives_it(folder: Path):
    tokenizer, settings = Tokenizer.from_folder(folder), ProcessorSettings.from_hf_folder(folder)
    times = Timeline(10, 48).times
    seen = states(SCENE, times)
    rng = np.random.default_rng(3)
    questions = [q for kind in KINDS if (q := ask(kind, rng, seen, times)) is not None]
    sample, taken = Prompts(folder).sequence(times, questions, 4000)
    assert taken == len(questions) >= 5
    frames = list(render(seen, SCENE.background))
    for number in (1, taken):
        video = {"type": "video", "video": frames, "timestamps": times.tolist()}
        content = [video, {"type": "text", "text": questions[number - 1].text}]
        prompt = Processor(settings, tokenizer).prepare([{"role": "user", "content": content}])
        own = np.flatnonzero(np.isin(sample.segment, (0, number)))
        asked = len(prompt.token_ids)
        np.testing.assert_array_equal(sample.tokens[own][:asked], prompt.token_ids)
        np.testing.assert_array_equal(sample.positions[:, own][:, :asked], prompt.position_ids)
        written = sample.tokens[own][asked:]
        np.testing.assert_array_equal(
            sample.positions[:, own][:, asked:], np.tile(np.arange(asked, len(own)) + prompt.delta, (3, 1))
        )
        question = questions[number - 1]
        assert tokenizer.decode(written.tolist()) == f"{question.thinking}\n</think>\n\n{question.answer}"
        assert written[-1] == tokenizer.control_ids["<|im_end|>"]
        np.testing.assert_array_equal(np.flatnonzero(sample.learned[own]), np.arange(asked - 1, len(own) - 1))


def test_digits_are_single_tokens_and_words_of_the_answers_few(folder: Path):
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer.encode("13.5")) == 4
    assert len(tokenizer.encode(" yellow triangle")) == 2


def test_a_batch_depends_on_seed_and_number_only_and_exactness_is_counted_by_kind(folder: Path):
    prompts, shape = Prompts(folder), Shape(2, 6)
    batch, again, other = (make_batch(prompts, shape, *which) for which in ((0, 3), (0, 3), (0, 4)))
    for one, two in zip(batch[1:], again[1:], strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(batch.tokens, other.tokens)
    assert batch.tokens.shape == (2, shape.tokens)
    right = np.ones(batch.tokens.shape, bool)
    asked = int((batch.kinds >= 0).sum())
    assert 0 < asked <= 2 * MOST_QUESTIONS
    assert sum(len(exact) for exact in exact_answers(right, batch).values()) == asked
    right[0, np.flatnonzero(batch.learned[0])[0]] = False
    first = KINDS[batch.kinds[0, 0]]
    found = exact_answers(right, batch)
    assert not found[first][0]
    assert sum(int((~exact).sum()) for exact in found.values()) == 1


def test_times_are_those_of_the_runtimes_planning():
    assert Timeline(1, 9).times.tolist() == list(range(9))
    assert Timeline(2, 9).times[-1] == 4
    thinned = Timeline(10, 55)
    assert len(thinned.times) == 11
    assert len(replace(thinned, wanted=1.0).times) == 5
    assert seconds(float(thinned.times[-1])) == "5.4"


def test_questions_are_encoded_as_the_tokenizer_encodes_them(folder: Path):
    prompts, rng = Prompts(folder), np.random.default_rng(0)
    for question in sample_questions(rng, states(SCENE, TIMES), TIMES, 200):
        sample, taken = prompts.sequence(TIMES, [question], 4000)
        assert taken == 1
        ids = sample.tokens[sample.segment == 1].tolist()
        end = ids.index(prompts.tokenizer.control_ids["<|im_end|>"])
        assert ids[:end] == prompts.tokenizer.encode(question.text)
