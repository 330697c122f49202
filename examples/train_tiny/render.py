"""Draws scenes. The same arithmetic runs in numpy for video files and in JAX for training batches."""

from functools import cache
from typing import Any

import numpy as np

from examples.train_tiny.scenes import COLOURS, SHAPES, SIDE, SPRITE, States

# Five columns by seven rows, a row a string.
_FONT = {
    0: "01110 10001 10011 10101 11001 10001 01110",
    1: "00100 01100 00100 00100 00100 00100 01110",
    2: "01110 10001 00001 00010 00100 01000 11111",
    3: "11111 00010 00100 00010 00001 10001 01110",
    4: "00010 00110 01010 10010 11111 00010 00010",
    5: "11111 10000 11110 00001 00001 10001 01110",
    6: "00110 01000 10000 11110 10001 10001 01110",
    7: "11111 00001 00010 00100 01000 01000 01000",
    8: "01110 10001 10001 01110 10001 10001 01110",
    9: "01110 10001 10001 01111 00001 00010 01100",
}
_SCALE = 6
_PLATE = 2
"""Pixels of white around a digit, so that it reads the same on every shape and colour."""
_OUTSIDE, _FILL, _WHITE, _BLACK = 0, 1, 2, 3


@cache
def sprites() -> np.ndarray:
    """What each pixel of a shape with each digit (none, 0 ... 9) is made of: uint8 [shapes, 11, SPRITE, SPRITE] of
    0 nothing, 1 the shape's colour, 2 white, 3 black."""
    table = np.zeros((len(SHAPES), 11, SPRITE, SPRITE), np.uint8)
    table[:] = np.stack([_shape(name) for name in SHAPES])[:, None]
    top, left = (SPRITE - 7 * _SCALE) // 2, (SPRITE - 5 * _SCALE) // 2
    plate = np.s_[..., top - _PLATE : top + 7 * _SCALE + _PLATE, left - _PLATE : left + 5 * _SCALE + _PLATE]
    for digit, rows in _FONT.items():
        glyph = np.array([[int(bit) for bit in row] for row in rows.split()]).repeat(_SCALE, 0).repeat(_SCALE, 1)
        table[:, digit + 1][plate] = _WHITE
        inside = np.s_[:, digit + 1, top : top + 7 * _SCALE, left : left + 5 * _SCALE]
        table[inside] = np.where(glyph == 1, _BLACK, _WHITE)
    return table


def _shape(name: str) -> np.ndarray:
    """bool [SPRITE, SPRITE]."""
    y, x = (np.mgrid[:SPRITE, :SPRITE] + 0.5) * (2 / SPRITE) - 1
    match name:
        case "circle":
            return x**2 + y**2 < 1
        case "square":
            return np.maximum(abs(x), abs(y)) < 0.88
        case "triangle":
            return (abs(x) < (y + 1) / 2) & (y < 0.95)
        case "star":
            radius, angle = np.hypot(x, y), np.arctan2(x, -y)
            sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            # The edge from a point at radius 1 to a notch at 0.42, a tenth of a turn further.
            tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
            px, py = radius * np.cos(sector), radius * np.sin(sector)
            return (notch[0] - tip[0]) * (py - tip[1]) - (notch[1] - tip[1]) * (px - tip[0]) > 0
        case "cross":
            return (np.minimum(abs(x), abs(y)) < 0.34) & (np.maximum(abs(x), abs(y)) < 1)
        case "diamond":
            return abs(x) + abs(y) < 1
    raise ValueError(f"no shape is called {name!r}")


def render(states: States, background: Any, xp: Any = np) -> Any:
    """Frames uint8 [..., F, SIDE, SIDE, 3] of states [..., F, O] over grey `background` [...].

    xp: numpy or jax.numpy.
    """
    table, palette = xp.asarray(sprites().reshape(-1)), xp.asarray(np.array(list(COLOURS.values()), np.uint8))
    pixels = xp.arange(SIDE)
    grey = xp.asarray(background, xp.uint8)[..., None, None, None, None]
    shape = (*states.visible.shape[:-1], SIDE, SIDE)
    frames = xp.broadcast_to(grey, (*shape, 3))
    for o in range(states.visible.shape[-1]):
        kind = (states.shape[..., o].astype(xp.int32) * 11 + states.digit[..., o] + 1)[..., None, None]
        dx = pixels - states.column[..., o, None]
        dy = pixels - states.row[..., o, None]
        across = ((dx >= 0) & (dx < SPRITE) & (states.visible[..., o, None] > 0))[..., None, :]
        inside = across & ((dy >= 0) & (dy < SPRITE))[..., None]
        x, y = (xp.clip(d, 0, SPRITE - 1) for d in (dx, dy))
        where = (kind * SPRITE + y[..., None]) * SPRITE + x[..., None, :]
        made_of = xp.where(inside, table[where], _OUTSIDE)[..., None]
        colour = palette[states.colour[..., o]][..., None, None, :]
        frames = xp.where(made_of == _FILL, colour, frames)
        frames = xp.where(made_of == _WHITE, xp.uint8(255), xp.where(made_of == _BLACK, xp.uint8(0), frames))
    return frames
