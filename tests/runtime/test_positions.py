"""MRoPE positions: recorded prompts, the rule walked token by token, and pads and grids that disagree."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.positions import position_ids

IMAGE, VIDEO = 502, 503
GOLDEN = Path(__file__).parents[1] / "golden" / "positions.npz"
CASES = ["text_short", "text_long", "image", "video", "two_images", "mixed"]


def run(ids, grids):
    return position_ids(np.array(ids, np.int32), grids, image_token_id=IMAGE, video_token_id=VIDEO)


def walk(ids, grids):
    """The rule of the published model, one token after the other."""
    p, n, frames, out = 0, 0, iter(grids), []
    while n < len(ids):
        if ids[n] in (IMAGE, VIDEO):
            _, gh, gw = next(frames)
            h, w = gh // 2, gw // 2
            out += [(p, p + cell // w, p + cell % w) for cell in range(h * w)]
            p, n = p + max(h, w), n + h * w
        else:
            out.append((p, p, p))
            p, n = p + 1, n + 1
    return np.array(out, np.int32).reshape(-1, 3).T


@pytest.mark.parametrize("case", CASES)
def test_recorded_prompts(case):
    data = np.load(GOLDEN)
    ids = data[f"{case}/input_ids"]
    # The recording keeps images and frames apart; in "mixed" the frames come first.
    kinds = [f"{case}/video_grid_thw", f"{case}/image_grid_thw"]
    grids = [row for kind in kinds if kind in data for row in data[kind]]
    positions, delta = run(ids, grids)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, data[f"{case}/position_ids"])
    assert delta == data[f"{case}/position_ids"].max() + 1 - len(ids)


def test_worked_example_of_a_frame_after_text():
    positions, _ = run([1] * 19 + [VIDEO] * 60 + [1], [(1, 12, 20)])
    frame = positions[:, 19:79]
    assert set(frame[0]) == {19}
    assert list(frame[1]) == [19 + i // 10 for i in range(60)]
    assert list(frame[2]) == [19 + i % 10 for i in range(60)]
    assert positions[:, 79].tolist() == [29, 29, 29]


half_sides = st.integers(1, 5)
items = st.one_of(
    st.integers(1, 6).map(lambda n: ([7] * n, [])),
    st.tuples(st.sampled_from([IMAGE, VIDEO]), half_sides, half_sides).map(
        lambda x: ([x[0]] * (x[1] * x[2]), [(1, 2 * x[1], 2 * x[2])])
    ),
)


@given(st.lists(items, max_size=12))
def test_any_prompt_equals_the_walk_even_without_separators(parts):
    ids = [i for part, _ in parts for i in part]
    grids = [g for _, part in parts for g in part]
    positions, delta = run(ids, grids)
    np.testing.assert_array_equal(positions, walk(ids, grids))
    assert delta == (positions.max() + 1 - len(ids) if ids else 0)
    assert delta <= 0


def test_one_row_for_many_frames_is_split():
    ids = [1] + [VIDEO] * 6 + [2] + [VIDEO] * 6 + [3]
    np.testing.assert_array_equal(run(ids, [(2, 4, 6)])[0], run(ids, [(1, 4, 6), (1, 4, 6)])[0])


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE, IMAGE], [(1, 2, 2)], "has 2 .* need 1"),
        ([1, 2], [(1, 2, 2)], "has 0 .* need 1"),
        ([IMAGE, 2], [], "has 1 .* need 0"),
        ([IMAGE, 1, IMAGE], [(1, 2, 4)], "frame 0 needs 2 neighbouring"),
        ([IMAGE, VIDEO], [(1, 2, 4)], "changes kind"),
        ([IMAGE, IMAGE, 1, IMAGE, IMAGE], [(1, 2, 6), (1, 2, 2)], "frame 0 needs 3"),
        ([IMAGE], [(1, 3, 2)], "multiples of 2"),
        ([IMAGE], [(0, 2, 2)], "positive"),
    ],
)
def test_pads_and_grids_that_disagree_are_refused(ids, grids, message):
    with pytest.raises(InputError, match=message):
        run(ids, grids)


def test_largest_prompt_is_fast():
    """A loop over a million tokens would take seconds; the context is 262,144."""
    ids = np.array(([1] * 5 + [VIDEO] * 60) * 4000, np.int32)
    positions, _ = position_ids(ids, [(4000, 12, 20)], image_token_id=IMAGE, video_token_id=VIDEO)
    assert positions[0, -1] == 3999 * 15 + 5
