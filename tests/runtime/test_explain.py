"""What an answer looked at: figures, the picture, and the command line's --explain."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import buckets
from runtime.engine import Engine
from runtime.errors import InputError
from runtime.explain import Explanation, MediaSelection, check_prompt, explain_answer
from runtime.explain_picture import WIDTH, check_path, draw
from runtime.generate import main
from runtime.media_options import ImageOptions
from runtime.processor import Media, Prompt
from runtime.sampling import SamplingOptions
from runtime.spans import named_spans
from tests.runtime.media import numbered_picture

SMALL = ImageOptions(max_pixels=50176)
PICTURE = numbered_picture(5, 224, 224)
IMAGE, VIDEO = 500, 501
SETTINGS: Any = type("Settings", (), {"image_token_id": IMAGE, "video_token_id": VIDEO, "merge_size": 2})


def media(kind: Any, frames: int, times: list[float] | None = None) -> Media:
    """Frames of 2 x 4 patches: two tokens each."""
    pictures = np.stack([numbered_picture(n, 28, 60) for n in range(frames)])
    return Media(kind, pictures, None if times is None else np.array(times, np.float32), f"{kind}.mp4", (2, 4))


def prompt(ids: list[int], *items: Media) -> Prompt:
    tokens = np.array(ids, np.int32)
    return Prompt(tokens, np.tile(np.arange(len(ids)), (3, 1)), 0, items, False, (), SETTINGS)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("From 1.0 to 2.0 seconds.", [(1, 2)]),
        ("1.0 - 2.0 s", [(1, 2)]),
        ("A circle with a 4 from 1.0 to 3.0 seconds and a star from 2.0 to 5.5 s.", [(1, 3), (2, 5.5)]),
        ("0:05 until 1:02", [(5, 62)]),
        ("It starts at 4 seconds. It ends at 9 seconds.", [(4, 9)]),
        ("At 4.0 seconds.", []),
        ("3 and 4 make 7, or 7 to 9 shapes.", []),
        ("", []),
    ],
)
def test_intervals_are_told_from_other_numbers(text: str, spans: list[Any]) -> None:
    assert named_spans(text) == spans


def test_shares_are_those_of_each_frames_own_tokens() -> None:
    items = media("video", 2, [0.5, 1.5]), media("image", 1)
    asked = prompt([1, VIDEO, VIDEO, 2, VIDEO, VIDEO, 3, IMAGE, IMAGE, 4], *items)
    # Ten prompt tokens; three steps, so that the last one had twelve to select from.
    selected = np.array([9, 0.25, 0.75, 9, 0, 1, 9, 0.5, 0, 9, 9, 9])
    found = explain_answer(asked, selected, 3, 11, "From 0.5 to 1.0 seconds", "answer")
    assert [(m.kind, m.timestamps, m.shares) for m in found.media] == [
        ("video", (0.5, 1.5), (0.5, 0.5)),
        ("image", None, (0.25,)),
    ]
    assert (found.context, found.everything, found.spans) == (12, False, ((0.5, 1.0),))
    # The three steps saw 10, 11 and 12 tokens and took 11 at most.
    assert found.even == pytest.approx((1 + 1 + 11 / 12) / 3)
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["media"][0]["shares"] == [0.5, 0.5]
    assert explain_answer(asked, selected, 3, 12, "", "tokens").everything


def test_prompts_that_cannot_be_explained() -> None:
    with pytest.raises(InputError, match="no image or video"):
        check_prompt(prompt([1, 2]))
    with pytest.raises(InputError, match="put text after it"):
        check_prompt(prompt([1, IMAGE, IMAGE], media("image", 1)))


def explanation(items: list[Media], text: str = "", spans: Any = (), topk: int = 10, seed: int = 0) -> Explanation:
    rng = np.random.default_rng(seed)
    chosen = tuple(
        MediaSelection(
            m.kind,
            m.label,
            None if m.timestamps is None else tuple(map(float, m.timestamps)),
            tuple(map(float, rng.random(len(m.frames)) ** 8)),
        )
        for m in items
    )
    return Explanation(chosen, text, "answer", 3, topk, 100, 0.1, tuple(spans))


def drawn(path: Path, items: list[Media], shown: Explanation, **options: Any) -> np.ndarray:
    draw(shown, items, path, **options)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@settings(max_examples=25)
@given(
    frames=st.integers(1, 320),
    step=st.sampled_from([0.0, 0.04, 0.5, 7.0, 3600.0]),
    text=st.text(max_size=40).map(lambda t: t * 20),
    spans=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).map(sorted).map(tuple), max_size=9),
    timed=st.booleans(),
)
def test_any_explanation_is_drawn_and_fits_its_sheet(
    tmp_path_factory: pytest.TempPathFactory, frames: int, step: float, text: str, spans: Any, timed: bool
) -> None:
    items = [media("video", frames, [n * step for n in range(frames)] if timed else None), media("image", 1)]
    picture = drawn(
        tmp_path_factory.mktemp("any") / "a.png", items, explanation(items, text, spans), question=text, truth=(0, 1)
    )
    assert picture.shape[1] == WIDTH
    # The margin below everything that was drawn is empty: nothing ran off the sheet.
    assert (picture[-8:] == 255).all()
    assert (picture[:-8] != 255).any()


def test_bars_and_intervals_stand_at_their_times(tmp_path: Path) -> None:
    """Four frames, half a second of time line before and behind them; the third one was selected."""
    items = [media("video", 4, [0, 1, 2, 3])]
    shown = Explanation(
        (MediaSelection("video", "v", (0, 1, 2, 3), (0.0, 0.0, 0.8, 0.0)),),
        "2 to 3 s",
        "answer",
        1,
        10,
        100,
        0.1,
        ((2, 3),),
    )
    picture = drawn(tmp_path / "a.png", items, shown).astype(int)
    for colour, start, end in (((0x2F, 0x6F, 0xB7), 1.5, 2.5), ((0xC2, 0x57, 0x1A), 2, 3)):
        # No letter is so tall.
        wide = np.flatnonzero((picture == colour).all(-1).sum(axis=0) >= 12)
        left, right = (110 + 1230 * (time + 0.5) / 4 for time in (start, end))
        assert abs(wide.min() - left) < 6
        assert abs(wide.max() - right) < 6


def test_where_everything_was_selected_the_picture_is_another(tmp_path: Path) -> None:
    items = [media("video", 4, [0, 1, 2, 3])]
    some = drawn(tmp_path / "a.png", items, explanation(items, topk=99))
    everything = drawn(tmp_path / "b.png", items, explanation(items, topk=100))
    assert some.shape != everything.shape or (some != everything).any()


def test_files_that_cannot_be_written_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, why in (("a.gif", "png file"), ("folder.png", "is a folder"), ("absent/a.png", "does not exist")):
        with pytest.raises(InputError, match=why):
            check_path(str(tmp_path / name))
    check_path(str(tmp_path / "a.png"))


def ask(engine: Engine, new: int = 20) -> Any:
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]
    generation = engine.generate(
        [{"role": "user", "content": content}],
        image_options=SMALL,
        max_new_tokens=new,
        sampling=SamplingOptions(),
        explain=True,
    )
    for _ in generation:
        pass
    return generation


@pytest.mark.slow
def test_a_generation_is_explained_in_chunks_of_any_size(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = ask(tiny_engine)
    whole = generation.explanation()
    assert not whole.everything
    assert generation.explanation() == whole
    monkeypatch.setattr(buckets, "EXPLAIN_CHUNK", 8)
    assert generation.explanation() == whole
    (image,) = whole.media
    assert 0 < image.shares[0] < 1


def test_every_step_selects_as_many_as_there_may_be(tiny_engine: Engine) -> None:
    """The shares of all tokens add up to top-k, and the answer alone is another average than everything produced."""
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]
    asked = tiny_engine.prepare([{"role": "user", "content": content}], image_options=SMALL)
    executor, topk = tiny_engine.executor(), tiny_engine.bundle.config["sa_config"]["topk"]
    run = executor.run([asked], [SamplingOptions()], [12], (), explain=True)
    tokens = [token for rows in run.steps for token in rows[0]]
    assert len(tokens) == 12
    assert len(asked.token_ids) > topk
    parts = {first: executor.selected(run, asked, tokens, first) for first in (0, 7)}
    for share in parts.values():
        assert share.shape == (len(asked.token_ids) + 11,)
        assert share.sum() == pytest.approx(topk)
    assert (parts[0] != parts[7]).any()


def test_only_what_was_kept_can_be_explained(tiny_engine: Engine) -> None:
    generation = tiny_engine.generate([{"role": "user", "content": "Hi"}], max_new_tokens=1)
    for _ in generation:
        pass
    with pytest.raises(ValueError, match="explain=True"):
        generation.explanation()


def test_the_command_line_draws_and_says_it_in_json(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, photo = tmp_path / "out.png", tmp_path / "photo.png"
    Image.fromarray(PICTURE).save(photo)
    options = ["--max-pixels", "50176", "--prompt", "What is this?", "--max-new-tokens", "4", "--temperature", "0"]
    command = [str(tiny_bundle), "--image", str(photo), *options, "--explain"]
    assert main([*command, str(target), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["explanation"]
    assert found["media"][0]["label"] == "photo.png"
    assert found["everything"] is False
    with Image.open(target) as picture:
        assert picture.width == WIDTH
    assert f"{target}: what the" in captured.err
    assert main([*command, str(tmp_path / "out.jpg")]) == 2
    assert "out.jpg" in capsys.readouterr().err
    assert main([str(tiny_bundle), "--prompt", "x", "--explain", str(target)]) == 2
    assert "no image or video" in capsys.readouterr().err
