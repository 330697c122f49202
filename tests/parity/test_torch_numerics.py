"""Arithmetic that the official stack leaves to torch: e4m3 rounding, block quantisation, linspace, resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kernels_pallas.numerics import quantise, round_e4m3
from keye_jax.vision import interpolate_positions, patch_layout
from runtime.sizing import frame_indices

torch = pytest.importorskip("torch", reason="needs the 'parity' extra: make parity")
pytestmark = pytest.mark.parity


def test_e4m3_rounding_is_the_cast() -> None:
    """All finite bfloat16 values and a million others, clamped to +-448 as the official code does before its cast."""
    grid = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    rng = np.random.default_rng(0)
    spread = torch.tensor((rng.standard_normal(2**20) * 2.0 ** rng.integers(-14, 10, 2**20)).astype(np.float32))
    x = torch.cat([grid[grid.isfinite()], spread])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(round_e4m3(jnp.asarray(x.numpy())), expected)


def test_block_quantisation_is_the_formula() -> None:
    """Blocks of 64 whose size spans every power of two from 2**-20 to 2**20."""
    rng = np.random.default_rng(1)
    x = (
        rng.standard_normal((4100, 64)).astype(np.float32)
        * 2.0 ** np.linspace(-20, 20, 4100, dtype=np.float32)[:, None]
    )
    amax = torch.tensor(x).abs().amax(-1, keepdim=True).double().clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448))).float()
    expected = (torch.tensor(x) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    values, scales = jax.jit(quantise)(jnp.asarray(x))
    np.testing.assert_array_equal(scales, scale[:, 0])
    np.testing.assert_array_equal(values.astype(jnp.float32), expected.float())


def test_frame_indices_are_those_of_torch_linspace() -> None:
    """Random numbers of frames up to a day of video, and every count of short ones."""
    rng = np.random.default_rng(2)
    cases = [(total, count) for total in range(1, 60) for count in range(1, total + 1)]
    for _ in range(3000):
        total = int(np.exp(rng.uniform(0, np.log(5e6)))) + 1
        cases.append((total, int(rng.integers(1, min(total, 2880) + 1))))
    for total, count in cases:
        expected = torch.linspace(0, total - 1, count).round().long().clamp(0, total - 1)
        np.testing.assert_array_equal(frame_indices(total, count), expected)


@pytest.mark.parametrize("seed", range(20))
def test_position_table_is_resized_as_by_interpolate(seed: int) -> None:
    """Bilinear, align_corners=False, no antialiasing; larger and smaller than the 27x27 table."""
    rng = np.random.default_rng(seed)
    rows, columns = (int(n) for n in rng.integers(1, 80, 2))
    table = rng.standard_normal((729, 8)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(table).reshape(1, 27, 27, 8).permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear"
    )
    layout = patch_layout(jnp.asarray([[1, rows, columns]], jnp.int32), rows * columns)
    actual = interpolate_positions(jnp.asarray(table), layout, side=27)
    np.testing.assert_allclose(actual, expected[0].permute(1, 2, 0).reshape(-1, 8), rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_frames_are_resized_as_by_antialiased_interpolate(seed: int) -> None:
    """uint8 frames, larger and smaller: within one level of 255 (Pillow rounds between its two passes)."""
    from runtime.images import render

    rng = np.random.default_rng(seed)
    height, width, rows, columns = (int(n) for n in rng.integers(20, 200, 4))
    frame = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.tensor(frame).permute(2, 0, 1)[None], size=(rows, columns), mode="bilinear", antialias=True
    )[0].permute(1, 2, 0)
    actual = render(Image.fromarray(frame), [((rows, columns), "bilinear")])
    assert np.abs(actual.astype(int) - expected.numpy().astype(int)).max() <= 1
