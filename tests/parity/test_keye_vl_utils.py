"""Preprocessing against keye-vl-utils 1.5.2, the previous model's helper: what 2.0 kept must be the same.

The package imports torchvision, OpenCV and einops, which nothing compared here runs: stand-ins take their place.
Its defaults are those of 1.5, so limits are given; and all frames are told to be "slow", as in 2.0.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError
from runtime.images import load_image
from runtime.media_options import ImageOptions, VideoOptions
from runtime.sizing import TOKEN_PIXELS, frame_count, frame_indices, frame_size, smart_resize
from runtime.video import FrameList, load_video

torch = pytest.importorskip("torch", reason="needs the 'parity' extra: make parity")
pytestmark = pytest.mark.parity

UNUSED = ("cv2", "einops", "torchvision", "torchvision.io", "torchvision.transforms")


class Unused(ModuleType):
    """A module whose every name is None: enough to be imported from."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@pytest.fixture(scope="module")
def utils() -> Any:
    """Their module, with every frame counted as slow."""
    with pytest.MonkeyPatch.context() as patch:
        for name in UNUSED:
            patch.setitem(sys.modules, name, Unused(name))
        try:
            module = importlib.import_module("keye_vl_utils.vision_process")
        except ImportError:
            pytest.skip("needs the 'parity' extra: make parity")
        patch.setattr(
            module, "extract_slow_fast_frames", lambda frames, threshold: torch.zeros(len(frames), dtype=torch.int32)
        )
        yield module


def test_smart_resize(utils: Any) -> None:
    """20,000 random sizes and limits, elongated and tiny ones among them."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(20_000):
        height, width = (int(n) for n in np.exp(rng.uniform(0, np.log(10_000), 2)))
        low = int(np.exp(rng.uniform(np.log(784), np.log(200_000))))
        high = low + int(np.exp(rng.uniform(np.log(784), np.log(16_000_000))))
        try:
            expected = utils.smart_resize(height, width, 28, low, high)
        except ValueError:
            refused += 1
            with pytest.raises(InputError):
                smart_resize(height, width, min_pixels=low, max_pixels=high)
            continue
        assert smart_resize(height, width, min_pixels=low, max_pixels=high) == expected
    assert 0 < refused < 5000


def test_frame_counts_and_indices(utils: Any) -> None:
    """Random lengths, rates and limits. 2.0 raised the least number of frames to 2."""
    rng = np.random.default_rng(1)
    for _ in range(5000):
        total = int(np.exp(rng.uniform(0, np.log(2e6)))) + 1
        rate = float(rng.choice([rng.uniform(0.5, 120), 24.0, 25.0, 30000 / 1001]))
        fps = float(rng.choice([rng.uniform(0.05, 30), 1.0, 2.0]))
        frames = int(rng.integers(1, 4000))
        budget = int(rng.integers(64, 262_144)) * TOKEN_PIXELS
        theirs = utils.smart_nframes(
            {"fps": fps, "max_frames": frames, "min_pixels": 64 * TOKEN_PIXELS, "video_total_pixels": budget},
            total,
            rate,
        )
        ours = frame_count(total, rate, fps=fps, min_frames=1, max_frames=frames, budget=budget)
        assert ours == min(max(theirs, 1), total)
        indices = torch.linspace(0, total - 1, ours).round().long()
        np.testing.assert_array_equal(frame_indices(total, ours), indices)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1"])
def test_images(utils: Any, mode: str) -> None:
    """Pixel for pixel: bicubic, transparency dropped."""
    rng = np.random.default_rng(2)
    for _ in range(6):
        height, width = (int(n) for n in rng.integers(10, 200, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4)).astype(np.uint8)).convert(mode)
        expected = utils.fetch_image({"image": image, "min_pixels": 3136, "max_pixels": 20_000})
        np.testing.assert_array_equal(load_image(image, ImageOptions(3136, 20_000)), np.asarray(expected))


def random_list(rng: np.random.Generator) -> tuple[list[Image.Image], dict[str, Any]]:
    count, height, width = int(rng.integers(2, 12)), *(int(n) for n in rng.integers(200, 500, 2))
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)) for _ in range(count)]
    low = int(rng.integers(64, 80))
    limits = {
        "min_pixels": low * TOKEN_PIXELS,
        "max_pixels": int(rng.integers(low, 256)) * TOKEN_PIXELS,
        "video_total_pixels": int(rng.integers(low * count, 100 * count + low)) * TOKEN_PIXELS,
    }
    return images, limits


@pytest.mark.parametrize("seed", range(12))
def test_frame_lists(utils: Any, seed: int) -> None:
    """Images as a video: frame size within the budget, timestamps, and the pixels after both resizes (the second one
    by torch)."""
    rng = np.random.default_rng(seed)
    images, limits = random_list(rng)
    fps = float(rng.choice([0.5, 1.0, 2.0, 3.0]))
    frames, sizes = utils.fetch_video({"video": images, "fps": fps, **limits})
    video = load_video(FrameList(images), VideoOptions(fps=fps, **limits))
    size = (sizes["height"], sizes["width"])
    assert video.plan.size == size
    assert video.frames.shape == (len(frames), *size, 3)
    assert video.timestamps is not None
    np.testing.assert_allclose(video.timestamps, sizes["timestamps"], rtol=1e-6)
    resized = torch.nn.functional.interpolate(frames, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    off = np.abs(video.frames.astype(int) - resized.numpy().astype(int))
    # On noise, the hardest picture to resize, up to three values in a million were off by two.
    assert off.max() <= 2
    assert np.mean(off > 1) <= 1e-5


def test_frame_sizes(utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their binary search for a frame's share of the budget against the closed form, on frames never drawn."""
    rng = np.random.default_rng(3)
    monkeypatch.setattr(utils, "fetch_image", lambda ele, **kw: ele["image"])
    monkeypatch.setattr(utils.np, "array", lambda image: image)
    for _ in range(200):
        count, height, width = (int(n) for n in (rng.integers(2, 12), *rng.integers(28, 400, 2)))
        low = int(rng.integers(64, 128))
        limits = {
            "min_pixels": low * TOKEN_PIXELS,
            "max_pixels": int(rng.integers(low, 1024)) * TOKEN_PIXELS,
            "video_total_pixels": int(rng.integers(low * count, 600 * count)) * TOKEN_PIXELS,
        }
        blank = np.zeros((height, width, 3), np.uint8)
        _, sizes = utils.fetch_video({"video": [blank] * count, **limits})
        ours = frame_size(
            height,
            width,
            count,
            min_pixels=limits["min_pixels"],
            max_pixels=limits["max_pixels"],
            budget=limits["video_total_pixels"],
        )
        assert ours == (sizes["height"], sizes["width"])
