"""Pixels to patches: the vision tower's input."""

from collections.abc import Sequence

import numpy as np


def patchify(frames: np.ndarray, mean: Sequence[float], std: Sequence[float], patch_size: int = 14) -> np.ndarray:
    """Normalise uint8 frames [N,H,W,3] to (pixel / 255 - mean) / std and cut them into patches.

    Returns float32 [N*gh*gw, 3, patch_size, patch_size], gh = H / patch_size, gw = W / patch_size: frame by
    frame, row by row. Raises ValueError for another dtype or shape, or sides that `patch_size` does not divide.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [N,H,W,3], not {frames.dtype} {list(frames.shape)}")
    count, height, width, _ = frames.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"frames of {width}x{height} pixels are not whole patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = frames.reshape(count, rows, patch_size, columns, patch_size, 3).transpose(0, 1, 3, 5, 2, 4)
    cut = cut.reshape(-1, 3, patch_size, patch_size)
    # A channel has 256 possible values: looking them up needs no float copy of the frames.
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    patches = np.empty(cut.shape, np.float32)
    for channel in range(3):
        table = (levels - np.float32(mean[channel])) / np.float32(std[channel])
        np.take(table, cut[:, channel], out=patches[:, channel], mode="clip")  # "raise" would buffer `out`
    return patches


def packed(
    shares: Sequence[tuple[np.ndarray, np.ndarray]], devices: int, size: int, area: int
) -> tuple[np.ndarray, np.ndarray]:
    """The vision program's arguments from the patches [n,3,P,P] and grids [m,3] of up to `devices` shares.

    Args:
        size: patches of the program on each device.
        area: patches of a vision row.

    Returns:
        float32 [devices * size, 3, P, P] and int32 [devices * size // area, 3], each share followed by zeros.
    """
    pixels = np.zeros((devices, size, *shares[0][0].shape[1:]), np.float32)
    grids = np.zeros((devices, size // area, 3), np.int32)
    for device, (patches, grid) in enumerate(shares):
        pixels[device, : len(patches)] = patches
        grids[device, : len(grid)] = grid
    return pixels.reshape(-1, *pixels.shape[2:]), grids.reshape(-1, 3)
