"""Draws an explanation: frames on a time line, how much of each was selected, and the intervals that were named."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import InputError
from runtime.explain import Explanation, MediaSelection
from runtime.processor import Media
from runtime.spans import Span

WIDTH, MARGIN = 1400, 36
LEFT, RIGHT = 110, WIDTH - 60
"""Where the time line begins and ends."""
BARS, THUMB_HEIGHT, THUMB_WIDTH, LEAST_WIDTH = 150, 120, 130, 72
"""Height of the bars; height of a thumbnail at most; how wide it is where there are more frames than fit; how narrow it
may be for all frames to fit."""
LANE, MOST_SPANS = 26, 6
IMAGE_ROW = 96
MOST_ROWS = 24
"""Images and videos drawn; what is more is counted only."""
INK, SOFT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
BAR, ANSWER, TRUTH = "#2f6fb7", "#c2571a", "#0b6e4f"
_MOST_LINES, _MOST_CHARACTERS, _MOST_LABEL = 12, 2000, 100
_ROW = BARS + THUMB_HEIGHT + (MOST_SPANS + 1) * LANE + 120
"""More than the height of a video's row."""


class Axis(NamedTuple):
    """The scale of a time line, or of frame numbers."""

    edges: np.ndarray
    """[n + 1] where each frame's bar begins, and the last one ends."""
    unit: str

    def x(self, value: float) -> float:
        first, last = self.edges[0], self.edges[-1]
        return LEFT + (RIGHT - LEFT) * (value - first) / (last - first)


def check_path(path: str) -> None:
    """Raises InputError where no picture can be written."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InputError(f"--explain {path!r:.200} must be the name of a .png file")
    if target.is_dir():
        raise InputError(f"--explain {path!r:.200} is a folder; name a .png file")
    if not target.parent.is_dir():
        raise InputError(f"--explain {path!r:.200} is in a folder that does not exist; make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise InputError(f"--explain {path!r:.200} cannot be written (permissions); name another place")


def draw(
    explanation: Explanation,
    media: Sequence[Media],
    path: str | os.PathLike[str],
    *,
    question: str | None = None,
    truth: Span | None = None,
) -> None:
    """Writes the picture as PNG. The font has Latin, Greek and Cyrillic letters; others show as boxes.

    Args:
        media: of the prompt, as explained.
        truth: the true interval, drawn under the answer's.

    Raises:
        InputError: it cannot be written.
    """
    # Drawn on a sheet that is longer than needed and cut off below: texts wrap, so the length is known at the end.
    rows = min(len(media), MOST_ROWS)
    sheet = Image.new("RGB", (WIDTH, 2 * 28 * _MOST_LINES + 400 + rows * _ROW), "white")
    page = _Page(sheet, explanation, truth)
    if question:
        page.text("Question", question)
    name = {"answer": "Answer", "thinking": "Thinking", "tokens": "Tokens"}[explanation.part]
    page.text(name, explanation.text or f"{explanation.steps} tokens")
    if truth is not None:
        page.text("Truth", f"{_number(truth[0])} to {_number(truth[1])} s")
    page.summary()
    for selection, item in list(zip(explanation.media, media, strict=True))[:MOST_ROWS]:
        page.row(selection, item.frames)
    if len(media) > MOST_ROWS:
        page.note(f"and {len(media) - MOST_ROWS} more images or videos")
    try:
        sheet.crop((0, 0, WIDTH, page.y + MARGIN)).save(path, "PNG")
    except OSError as error:
        raise InputError(f"{os.fspath(path)!r:.200} cannot be written ({error.strerror})") from None


class _Page:
    """A sheet that fills from the top; `y` is where the next thing goes."""

    def __init__(self, sheet: Image.Image, explanation: Explanation, truth: Span | None):
        self.y = MARGIN
        self._sheet, self._pen = sheet, ImageDraw.Draw(sheet)
        self._explanation, self._truth = explanation, truth
        largest = max(share for media in explanation.media for share in media.shares)
        # One scale for all rows, so that they compare.
        self._top = _ceiling(max(largest, explanation.even))

    def text(self, name: str, text: str) -> None:
        """A paragraph with its name beside it."""
        self._put(MARGIN, self.y + 3, name, 16, SOFT)
        lines = _wrapped(text[:_MOST_CHARACTERS], RIGHT - LEFT - 20, 20)
        if len(text) > _MOST_CHARACTERS or len(lines) > _MOST_LINES:
            lines = [*lines[: _MOST_LINES - 1], "..."]
        for line in lines:
            self._put(LEFT + 20, self.y, line, 20, INK)
            self.y += 28
        self.y += 8

    def note(self, text: str) -> None:
        for line in _wrapped(text, RIGHT - MARGIN, 15):
            self._put(MARGIN, self.y, line, 15, SOFT)
            self.y += 22

    def summary(self) -> None:
        """What the bars mean, in words."""
        e = self._explanation
        self.y += 8
        if e.everything:
            self.note(
                f"The context of {e.context:,} tokens never exceeded top-{e.topk:,}: every token was selected, and the "
                "bars say nothing about what mattered."
            )
        else:
            self.note(
                f"Bars: share of a frame's tokens that the lightning indexer selected, averaged over all layers and "
                f"{e.steps} tokens of the {e.part}. It selects {e.topk:,} of {e.context:,} tokens; an even choice "
                f"would be {_percent(e.even)} (dashed)."
            )
        self.y += 10

    def row(self, selection: MediaSelection, frames: np.ndarray) -> None:
        if selection.kind == "image":
            self._image(selection, frames[0])
        else:
            self._video(selection, frames)
        self.y += 24

    def _image(self, selection: MediaSelection, picture: np.ndarray) -> None:
        thumb = _thumbnail(picture, 150, IMAGE_ROW)
        self._sheet.paste(thumb, (MARGIN, self.y))
        left, width = MARGIN + 170, RIGHT - MARGIN - 170 - 90
        share = selection.shares[0]
        self._put(left, self.y + 6, selection.label[:_MOST_LABEL], 16, INK)
        box = (left, self.y + 36, left + width, self.y + 64)
        self._pen.rectangle(box, fill=GRID)
        self._pen.rectangle((*box[:2], left + width * share / self._top, box[3]), fill=BAR)
        self._put(box[2] + 12, self.y + 40, _percent(share), 16, INK)
        if not self._explanation.everything:
            x = left + width * self._explanation.even / self._top
            self._dashes((x, box[1] - 4), (x, box[3] + 4))
        self.y += max(thumb.height, IMAGE_ROW - 20)

    def _video(self, selection: MediaSelection, frames: np.ndarray) -> None:
        axis = _axis(selection)
        what = f"{selection.label[:_MOST_LABEL]}: {len(frames)} frames"
        if selection.timestamps is not None:
            what += f", {_number(selection.timestamps[0])} to {_number(selection.timestamps[-1])} s"
        self._put(MARGIN, self.y, what, 16, INK)
        self.y += 28
        self._thumbnails(axis, frames)
        spans = [(span, ANSWER, "answer") for span in self._explanation.spans[:MOST_SPANS]]
        spans += [(self._truth, TRUTH, "truth")] if self._truth is not None else []
        # Only a time line has places for times.
        spans = [s for s in spans if axis.unit == "s" and s[0][0] <= axis.edges[-1] and s[0][1] >= axis.edges[0]]
        self._bars(axis, selection.shares, [(span, colour) for span, colour, _ in spans])
        self._ticks(axis)
        for span, colour, name in spans:
            self._lane(axis, span, colour, name)

    def _thumbnails(self, axis: Axis, frames: np.ndarray) -> None:
        """As many frames as fit, each at its own time or beside it."""
        height, width = frames.shape[1:3]
        fits = (RIGHT - LEFT) // min(max(round(THUMB_HEIGHT * width / height) + 4, 24), THUMB_WIDTH)
        count = len(frames) if len(frames) <= (RIGHT - LEFT) // LEAST_WIDTH else fits
        slot = (RIGHT - LEFT) / count
        tallest = 0
        for i in range(count):
            x = LEFT + (i + 0.5) * slot
            middle = axis.edges[0] + (i + 0.5) / count * (axis.edges[-1] - axis.edges[0])
            frame = min(max(int(np.searchsorted(axis.edges, middle, side="right")) - 1, 0), len(frames) - 1)
            thumb = _thumbnail(frames[frame], int(slot) - 4, THUMB_HEIGHT)
            self._sheet.paste(thumb, (round(x - thumb.width / 2), self.y))
            tallest = max(tallest, thumb.height)
        self.y += tallest + 12

    def _bars(self, axis: Axis, shares: Sequence[float], spans: list[tuple[Span, str]]) -> None:
        bottom = self.y + BARS
        for span, colour in spans:
            x0, x1 = map(round, _clipped(axis, span))
            box = (x0, self.y, x1, bottom)
            behind = self._sheet.crop(box)
            self._sheet.paste(Image.blend(behind, Image.new("RGB", behind.size, colour), 0.16), box)
        for part in range(5):
            value = self._top * part / 4
            y = bottom - BARS * part / 4
            self._pen.line((LEFT, y, RIGHT, y), fill=GRID if part else SOFT)
            self._put(LEFT - 8, y - 8, _percent(value), 13, SOFT, right=True)
        for share, start, end in zip(shares, axis.edges[:-1], axis.edges[1:], strict=True):
            x0, x1 = axis.x(start), axis.x(end)
            gap = 1 if x1 - x0 > 4 else 0
            top = bottom - BARS * share / self._top
            if share > 0:
                self._pen.rectangle((x0 + gap, top, max(x1 - 1 - gap, x0 + gap), bottom), fill=BAR)
        if not self._explanation.everything:
            y = bottom - BARS * self._explanation.even / self._top
            self._dashes((LEFT, y), (RIGHT, y))
        self.y = bottom

    def _ticks(self, axis: Axis) -> None:
        first, last = axis.edges[0], axis.edges[-1]
        step = _step((last - first) / 10)
        for number in range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1):
            x = axis.x(number * step)
            self._pen.line((x, self.y, x, self.y + 6), fill=SOFT)
            label = _number(number * step) + (f" {axis.unit}" if axis.unit == "s" else "")
            self._put(x, self.y + 9, label, 13, SOFT, centre=True)
        self.y += 34

    def _lane(self, axis: Axis, span: Span, colour: str, name: str) -> None:
        x0, x1 = _clipped(axis, span)
        self._put(LEFT - 8, self.y, name, 14, colour, right=True)
        self._pen.rounded_rectangle((x0, self.y + 2, x1, self.y + 16), 4, fill=colour)
        label = f"{_number(span[0])} to {_number(span[1])} s"
        wide = _width(label, 14)
        x = x1 + 8 if x1 + 8 + wide < RIGHT else x0 - 8 - wide
        if x < LEFT:
            self._put((x0 + x1) / 2, self.y + 1, label, 13, "white", centre=True)
        else:
            self._put(x, self.y, label, 14, colour)
        self.y += LANE

    def _dashes(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        length = math.dist(start, end)
        for at in np.arange(0, length, 10):
            a, b = (t / length for t in (at, min(at + 5, length)))
            points = [tuple(p + (q - p) * t for p, q in zip(start, end, strict=True)) for t in (a, b)]
            self._pen.line([*points[0], *points[1]], fill=INK)

    def _put(
        self, x: float, y: float, text: str, size: int, colour: str, *, right: bool = False, centre: bool = False
    ) -> None:
        shift = _width(text, size) * (1 if right else 0.5 if centre else 0)
        self._pen.text((x - shift, y), text, fill=colour, font=_font(size))


def _axis(selection: MediaSelection) -> Axis:
    times = selection.timestamps
    count = len(selection.shares)
    if times is None or (count > 1 and times[-1] <= times[0]):
        return Axis(np.arange(count + 1) - 0.5, "frame")
    # A frame stands in the middle of its bar: an interval is named by the first and the last frame that show something.
    half = (float(np.median(np.diff(times))) if count > 1 else 1.0) / 2 or 0.5
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    return Axis(np.array([times[0] - half, *middles, times[-1] + half]), "s")


def _clipped(axis: Axis, span: Span) -> tuple[float, float]:
    """Where a span lies on the page; a moment is shown three pixels wide."""
    x0, x1 = (axis.x(min(max(t, axis.edges[0]), axis.edges[-1])) for t in span)
    return (x0, x1) if x1 - x0 >= 3 else ((x0 + x1) / 2 - 1.5, (x0 + x1) / 2 + 1.5)


def _thumbnail(picture: np.ndarray, width: int, height: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _wrapped(text: str, width: float, size: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider than a line is cut."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            while _width(word, size) > width:
                keep = max(1, int(len(word) * width / _width(word, size)) - 1)
                lines += [line] if line else []
                lines.append(word[:keep])
                line, word = "", word[keep:]
            longer = f"{line} {word}" if line else word
            if _width(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _ceiling(share: float) -> float:
    """The top of the scale: the next of 1, 2, 4, 6, 8, 10 times a power of ten, at most 100 %, at least 0.1 %."""
    share = max(share, 1e-3)
    power = 10.0 ** math.floor(math.log10(share))
    return min(1.0, next(n for n in (1, 2, 4, 6, 8, 10) if n * power >= share * (1 - 1e-9)) * power)


def _step(least: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(n for n in (1, 2, 5, 10) if n * power >= least * (1 - 1e-9)) * power


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
