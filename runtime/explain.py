"""What an answer looked at: how often the steps that wrote it selected each frame's tokens, as figures.

`runtime.explain_picture` draws them.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from runtime.errors import InputError
from runtime.processor import Prompt
from runtime.spans import Span, named_spans

Part = Literal["answer", "thinking", "tokens"]


@dataclass(frozen=True)
class MediaSelection:
    """What was selected of one image or video."""

    kind: Literal["image", "video"]
    label: str
    timestamps: tuple[float, ...] | None
    """Seconds of each frame; None for images and for frames without times."""
    shares: tuple[float, ...]
    """For each frame the share of its tokens selected, 0 to 1, averaged over the steps and all layers."""


@dataclass(frozen=True)
class Explanation:
    """What the lightning indexer selected while an answer was written."""

    media: tuple[MediaSelection, ...]
    """In the order of the prompt."""
    text: str
    """What was written in those steps."""
    part: Part
    """What the steps wrote: the answer; thinking, where nothing followed it; tokens, where there is no tokenizer."""
    steps: int
    """Tokens that the shares are averaged over."""
    topk: int
    """Tokens that a layer selects in a step, at most."""
    context: int
    """Tokens that the last of the steps could select from."""
    even: float
    """The share if each step selected evenly among all tokens before it."""
    spans: tuple[Span, ...]
    """Intervals that the text names, in seconds."""

    @property
    def everything(self) -> bool:
        """Whether all tokens were selected because they were no more than top-k."""
        return self.context <= self.topk

    def to_json(self) -> dict[str, Any]:
        rounded = [[round(share, 5) for share in media.shares] for media in self.media]
        fields = asdict(self) | {"everything": self.everything, "even": round(self.even, 5)}
        fields["media"] = [m | {"shares": r} for m, r in zip(fields["media"], rounded, strict=True)]
        return fields


def check_prompt(prompt: Prompt) -> None:
    """Raises InputError for a prompt whose answer cannot be explained."""
    if not prompt.media:
        raise InputError("there is no image or video in the prompt whose selection could be explained")
    if int(prompt.token_ids[-1]) in (prompt.settings.image_token_id, prompt.settings.video_token_id):
        raise InputError(
            "an answer to a prompt that ends with an image or frame cannot be explained; put text after it"
        )


def explain_answer(prompt: Prompt, selected: np.ndarray, steps: int, topk: int, text: str, part: Part) -> Explanation:
    """The figures of an answer.

    Args:
        selected: [N], the share of (step, layer) pairs that selected each token, from `Executor.selected`.
        steps: that it is averaged over, the last N tokens.
        topk: of the model.
        text: what the steps wrote, and `part` what that is.
    """
    settings = prompt.settings
    pads = np.flatnonzero(np.isin(prompt.token_ids, (settings.image_token_id, settings.video_token_id)))
    media, used = [], 0
    for item in prompt.media:
        frames, each = len(item.frames), item.grid[0] * item.grid[1] // settings.merge_size**2
        slots = pads[used : used + frames * each].reshape(frames, each)
        used += frames * each
        times = None if item.timestamps is None else tuple(round(float(t), 3) for t in item.timestamps)
        media.append(MediaSelection(item.kind, item.label, times, tuple(map(float, selected[slots].mean(axis=1)))))
    seen = np.arange(len(selected) - steps, len(selected)) + 1
    return Explanation(
        media=tuple(media),
        text=text,
        part=part,
        steps=steps,
        topk=topk,
        context=len(selected),
        even=float(np.minimum(1, topk / seen).mean()),
        spans=tuple(named_spans(text)),
    )
