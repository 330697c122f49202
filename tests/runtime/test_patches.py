"""Patches: the vision tower's input layout and normalisation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.patches import packed, patchify

HALF = (0.5, 0.5, 0.5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_each_patch_is_the_pixels_of_its_place_row_by_row(count, rows, columns, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (count, 14 * rows, 14 * columns, 3), np.uint8)
    patches = patchify(frames, HALF, HALF)
    assert patches.shape == (count * rows * columns, 3, 14, 14)
    assert patches.dtype == np.float32
    for place in np.ndindex(count, rows, columns):
        frame, row, column = place
        square = frames[frame, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        expected = (square.astype(np.float64) / 255 - 0.5) / 0.5
        got = patches[np.ravel_multi_index(place, (count, rows, columns))]
        np.testing.assert_allclose(got, expected.transpose(2, 0, 1), atol=2e-7)


def test_each_channel_has_its_own_mean_and_deviation():
    frames = np.full((1, 14, 14, 3), 255, np.uint8)
    patches = patchify(frames, (0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    assert patches[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]


def test_black_and_white_span_exactly_minus_one_to_one():
    frames = np.zeros((1, 14, 28, 3), np.uint8)
    frames[:, :, 14:] = 255
    patches = patchify(frames, HALF, HALF)
    assert (patches[0] == -1).all()
    assert (patches[1] == 1).all()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 14, 14, 3), np.float32),
        np.zeros((14, 14, 3), np.uint8),
        np.zeros((1, 14, 14, 4), np.uint8),
        np.zeros((1, 15, 14, 3), np.uint8),
    ],
)
def test_other_types_and_shapes_are_refused(frames):
    with pytest.raises(ValueError, match="frames"):
        patchify(frames, HALF, HALF)


def test_shares_lie_one_after_the_other_each_with_its_padding():
    """Two shares for three devices of eight patches; a row stands for four."""
    shares = [(np.full((n, 3, 2, 2), n, np.float32), np.full((n // 4, 3), n, np.int32)) for n in (8, 4)]
    pixels, grids = packed(shares, devices=3, size=8, area=4)
    assert (pixels.dtype, pixels.shape) == (np.float32, (24, 3, 2, 2))
    assert pixels[:, 0, 0, 0].tolist() == [8] * 8 + [4] * 4 + [0] * 12
    assert (grids.dtype, grids.shape) == (np.int32, (6, 3))
    assert grids[:, 0].tolist() == [8, 8, 4, 0, 0, 0]
