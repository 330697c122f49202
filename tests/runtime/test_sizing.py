"""The official sizing rules: every number the model's specification gives, and what must hold for all inputs."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.sizing import (
    FRAME_MIN_PIXELS,
    IMAGE_MAX_PIXELS,
    IMAGE_MIN_PIXELS,
    TOKEN_PIXELS,
    VIDEO_TOTAL_PIXELS,
    frame_budget,
    frame_count,
    frame_indices,
    frame_size,
    plan_frames,
    smart_resize,
)

IMAGE = {"min_pixels": IMAGE_MIN_PIXELS, "max_pixels": IMAGE_MAX_PIXELS}
sides = st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("source", "expected", "tokens"),
    [
        ((480, 640), (476, 644), 391),
        ((1080, 1920), (1092, 1932), 2691),
        ((42, 42), (56, 56), 4),
        ((70, 70), (56, 56), 4),
        ((20, 400), (28, 392), 14),
        ((8000, 6000), (4620, 3444), 20_295),
    ],
)
def test_image_sizes_are_the_official_ones(source, expected, tokens):
    assert smart_resize(*source, **IMAGE) == expected
    assert expected[0] * expected[1] // TOKEN_PIXELS == tokens


def test_limits_of_images_and_videos_are_the_official_numbers():
    assert (IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS) == (3_136, 16_056_320)
    assert (FRAME_MIN_PIXELS, VIDEO_TOTAL_PIXELS) == (50_176, 144_506_880)


def test_aspect_ratio_200_is_served_and_more_is_refused():
    assert smart_resize(10, 2000, **IMAGE) == (28, 1988)
    with pytest.raises(InputError, match="too elongated"):
        smart_resize(10, 2001, **IMAGE)


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_an_empty_picture_is_refused(size):
    with pytest.raises(InputError, match="empty"):
        smart_resize(*size, **IMAGE)


@given(sides, sides, st.integers(1, 1000), st.integers(4, 20))
def test_resized_area_obeys_the_limits_unless_a_side_is_at_its_least(height, width, low, factor):
    # With limits closer than fourfold, rounding up to the lower one may pass the upper one: the official rule.
    least, most = low * TOKEN_PIXELS, low * factor * TOKEN_PIXELS
    assume(max(height, width) / min(height, width) <= 200)
    rows, columns = smart_resize(height, width, min_pixels=least, max_pixels=most)
    assert rows % 28 == columns % 28 == 0
    assert min(rows, columns) >= 28
    assert least <= rows * columns <= most or min(rows, columns) == 28 or height * width > least


@given(sides, sides)
def test_resizing_a_resized_picture_changes_nothing(height, width):
    if max(height, width) / min(height, width) <= 150:
        once = smart_resize(height, width, **IMAGE)
        assert smart_resize(*once, **IMAGE) == once


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (512, (336, 588)),
        (800, (308, 560)),
        (1024, (280, 476)),
        (2048, (196, 336)),
        (2880, (168, 280)),
    ],
)
def test_frame_sizes_of_a_full_hd_video_are_the_official_ones(count, expected):
    assert frame_size(1080, 1920, count) == expected


@given(
    st.integers(28, 5000),
    st.integers(28, 5000),
    st.integers(1, 4096),
    st.integers(FRAME_MIN_PIXELS, VIDEO_TOTAL_PIXELS),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
)
def test_frames_respect_the_budget_and_their_own_limits(height, width, count, budget, least, most):
    count = min(count, budget // FRAME_MIN_PIXELS)
    least = min(least, FRAME_MIN_PIXELS)
    try:
        rows, columns = frame_size(height, width, count, min_pixels=least, max_pixels=most, budget=budget)
    except InputError:
        assert max(height, width) / min(height, width) > 30
        return
    enlarged = 28 * (rows + columns) if height * width < FRAME_MIN_PIXELS * 1.2 else 0
    assert rows * columns * count <= budget + count * (TOKEN_PIXELS + enlarged)
    assert rows * columns <= max(most, FRAME_MIN_PIXELS) + enlarged


def test_an_elongated_video_that_cannot_meet_its_budget_is_refused():
    assert frame_size(28, 5600, 60) == (28, 5600)
    with pytest.raises(InputError, match="too elongated for 2880 frames"):
        frame_size(28, 5600, 2880)


@pytest.mark.parametrize(
    ("total", "fps", "options", "expected"),
    [
        (300, 30.0, {}, 20),
        (300, 30.0, {"fps": 4}, 40),
        (300, 1.0, {"fps": 4}, 300),
        (10, 30.0, {}, 2),
        (1, 30.0, {}, 1),
        (300, 30.0, {"min_frames": 64}, 64),
        (300, 30.0, {"max_frames": 8}, 8),
        (300, 30.0, {"min_frames": 64, "max_frames": 8}, 8),
        (30 * 3600 * 4, 30.0, {}, 2880),
        (30 * 3600 * 4, 30.0, {"max_frames": 4000}, 2880),
        (300, 30.0, {"budget": 3 * FRAME_MIN_PIXELS}, 3),
    ],
)
def test_frame_count_follows_rate_limits_and_budget(total, fps, options, expected):
    assert frame_count(total, fps, **options) == expected


def test_indices_spread_evenly_over_both_ends():
    assert frame_indices(250, 20).tolist()[:4] == [0, 13, 26, 39]
    assert frame_indices(250, 20)[-1] == 249
    assert frame_indices(7, 7).tolist() == list(range(7))
    assert frame_indices(9, 1).tolist() == [0]


def test_half_positions_go_to_the_even_frame():
    assert frame_indices(6, 3).tolist() == [0, 2, 5]  # 2.5
    assert frame_indices(8, 3).tolist() == [0, 4, 7]  # 3.5


@given(st.integers(1, 4_000_000), st.integers(1, 4096))
def test_indices_ascend_within_the_video(total, count):
    indices = frame_indices(total, min(total, count))
    assert (indices[0], indices[-1]) == (0, total - 1) or count == 1
    assert (np.diff(indices) >= 0).all()


@given(st.integers(2, 100_000), st.integers(2, 3000))
def test_indices_round_a_single_precision_walk_from_both_ends(total, count):
    """An independent restatement in exact integers: step = p / q is a float32, so step * k is a fraction."""
    count = min(total, count)
    p, q = float(np.float32((total - 1) / (count - 1))).as_integer_ratio()
    expected = []
    for k in range(count):
        exact = p * k if k < count // 2 else (total - 1) * q - p * (count - 1 - k)
        expected.append(min(max(round(float(np.float32(exact / q))), 0), total - 1))
    assert frame_indices(total, count).tolist() == expected


def test_single_precision_matters_for_some_indices():
    differing = [
        n for n in range(2, 2000) if (frame_indices(4567, n) != np.rint(np.linspace(0, 4566, n)).astype(int)).any()
    ]
    assert differing


@pytest.mark.parametrize(
    ("table", "duration", "share"),
    [
        ("off", 1, 1),
        ("server", 259, 0.09),
        ("server", 259.1, 0.18),
        ("server", 518, 0.18),
        ("server", 1036, 0.36),
        ("server", 2016, 0.7),
        ("server", 2017, 1),
        ("paper", 256, 0.125),
        ("paper", 512, 0.25),
        ("paper", 1024, 0.5),
        ("paper", 2048, 1),
    ],
)
def test_adaptive_budget_follows_its_table(table, duration, share):
    assert frame_budget(duration, adaptive=table) == int(VIDEO_TOTAL_PIXELS * share)


def test_a_plan_joins_budget_count_and_size():
    plan = plan_frames(7200, 30.0, 1080, 1920, adaptive="server")
    assert len(plan.indices) == math.floor(VIDEO_TOTAL_PIXELS * 0.09) // FRAME_MIN_PIXELS == 259
    assert (plan.height, plan.width) == (168, 280)
    assert plan.tokens == 259 * 60
