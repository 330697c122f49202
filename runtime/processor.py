"""Messages and media in, model input out: token ids, positions, patches."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from runtime.chat import Segment, Trusted, frame_label, parse_messages, parse_tools, render_chatml
from runtime.errors import InputError
from runtime.images import load_image
from runtime.media_items import Kind, MediaItem, media_item
from runtime.media_options import ImageOptions, VideoOptions
from runtime.patches import patchify
from runtime.positions import position_ids
from runtime.processor_settings import ProcessorSettings, SecondResize, check_tokenizer
from runtime.sizing import smart_resize
from runtime.template import render_template
from runtime.tokenizer import Tokenizer
from runtime.video import FrameList, load_video, plan_video

__all__ = ["Media", "Processor", "ProcessorSettings", "Prompt"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a total of 0 means that it is not known."""


@dataclass(frozen=True, eq=False)
class Media:
    """One decoded image or video."""

    kind: Kind
    frames: np.ndarray
    """uint8 [n,H,W,3]; an image is one frame."""
    timestamps: np.ndarray | None
    """float32 [n], seconds; None for images and for frames without times."""
    label: str
    grid: tuple[int, int]
    """(patch rows, patch columns) of every frame."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Prompt:
    """Everything the model reads, before it generates."""

    token_ids: np.ndarray
    """int32 [T]."""
    position_ids: np.ndarray
    """int32 [3,T]: time, row, column."""
    delta: int
    """A token generated at sequence index n has position n + delta."""
    media: tuple[Media, ...]
    """In the order of their pad tokens."""
    open_think: bool
    """The prompt ends inside `<think>`: the model's first words are thinking."""
    warnings: tuple[str, ...]
    settings: ProcessorSettings = field(repr=False)

    def patch_batches(self, max_patches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Patches float32 [N,3,P,P] with their grids int32 [M,3], rows (1, gh, gw), in the order of the pad tokens.

        A batch holds whole frames and at most `max_patches` patches, unless one frame alone has more. Pixels become
        floats here, batch by batch: an hour of video as float32 would take four times the memory of its frames.
        """
        return map(self._patches, self._batches(max_patches))

    def patch_counts(self, max_patches: int) -> list[int]:
        """Patches in each of `patch_batches`, without making them."""
        batches = self._batches(max_patches)
        return [sum(len(frames) * math.prod(media.grid) for media, frames in batch) for batch in batches]

    def _batches(self, max_patches: int) -> Iterator[list[tuple[Media, np.ndarray]]]:
        batch: list[tuple[Media, np.ndarray]] = []
        used = 0
        for media in self.media:
            size, start = media.grid[0] * media.grid[1], 0
            while start < len(media.frames):
                count = min((max_patches - used) // size, len(media.frames) - start)
                if count < 1 and batch:
                    yield batch
                    batch, used = [], 0
                    continue
                count = max(count, 1)
                batch.append((media, media.frames[start : start + count]))
                start, used = start + count, used + count * size
        if batch:
            yield batch

    def _patches(self, batch: list[tuple[Media, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        patches, grids = [], []
        for media, frames in batch:
            settings = self.settings
            mean = settings.image_mean if media.kind == "image" else settings.video_mean
            std = settings.image_std if media.kind == "image" else settings.video_std
            patches.append(patchify(frames, mean, std, settings.patch_size))
            grids += [(1, *media.grid)] * len(frames)
        return np.concatenate(patches), np.array(grids, np.int32)


class Processor:
    """Turns conversations into prompts. Without a tokenizer it takes token ids only. With `decode` false videos are
    planned from their headers and their frames are black: the prompt has its true length and costs nothing.

    Raises InputError if the tokenizer does not belong to the settings.
    """

    def __init__(self, settings: ProcessorSettings, tokenizer: Tokenizer | None = None, *, decode: bool = True):
        self.settings = settings
        self.tokenizer = tokenizer
        self._decode = decode
        if tokenizer is None:
            return
        check_tokenizer(settings, tokenizer)
        needed = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        missing = [name for name in needed if name not in tokenizer.control_ids]
        if missing and settings.chat_template is None:
            raise InputError(f"tokenizer.json has no {missing[0]!r} token, which the chat format needs")

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
        progress: Progress | None = None,
    ) -> Prompt:
        """Messages and tools in the OpenAI schema to a prompt; see `chat.parse_messages` and `media_items`.

        The options hold for all items; what a message says about an item of its own comes first. Raises InputError.
        """
        if self.tokenizer is None:
            raise InputError(
                "this bundle has no tokenizer.json, so it cannot take text; "
                "pass --token-ids or convert a folder that has tokenizer.json"
            )
        parsed, declared = parse_messages(messages), parse_tools(tools)
        settings, warnings = self.settings, ()
        if settings.chat_template is None:
            segments = render_chatml(parsed, declared, settings.chat)
            warnings = ("this checkpoint ships no chat template; using ChatML as Qwen3 writes it",)
        else:
            segments = render_template(settings.chat_template, parsed, declared, settings.template_tokens)
        items = [segment for segment in segments if isinstance(segment, MediaItem)]
        media = self._load(items, image_options, video_options, progress)
        return self._prompt(self._token_ids(segments, media), media, warnings)

    def prepare_token_ids(
        self,
        token_ids: Iterable[int],
        media: Sequence[Mapping[str, Any]] = (),
        *,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
        progress: Progress | None = None,
    ) -> Prompt:
        """Raw token ids to a prompt. `media`: image and video parts as in a message, one for each run of pad tokens.

        Raises InputError for ids outside the vocabulary, or pad tokens that are not those the media need.
        """
        ids = list(token_ids)
        limit = self.settings.vocab_size
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < limit]
        if wrong or not ids:
            what = f"hold {wrong[0]!r:.40}" if wrong else "are empty"
            raise InputError(f"the token ids {what}; give whole numbers from 0 to {limit - 1}")
        items = [media_item(part, f"media[{i}]") for i, part in enumerate(media)]
        return self._prompt(ids, self._load(items, image_options, video_options, progress), ())

    def _load(
        self,
        items: Sequence[MediaItem],
        image_options: ImageOptions | None,
        video_options: VideoOptions | None,
        progress: Progress | None,
    ) -> tuple[Media, ...]:
        report = progress or (lambda stage, done, total: None)
        # Options are checked for all items before the first is decoded.
        images, videos = image_options or ImageOptions(), video_options or VideoOptions()
        options = [replace(images if item.kind == "image" else videos, **item.options) for item in items]
        loaded: list[Media] = []
        tokens, limit = 0, self.settings.max_position_embeddings
        for item, chosen in zip(items, options, strict=True):
            is_image = isinstance(chosen, ImageOptions)
            media = self._load_image(item, chosen, report) if is_image else self._load_video(item, chosen, report)
            tokens += len(media.frames) * self._tokens_per_frame(media)
            # Not left to the engine: frames of a hundred items may not fit memory before they exceed the context.
            if tokens > limit:
                raise InputError(
                    f"images and videos up to {item.label!r} need {tokens} tokens, more than the context of {limit}; "
                    "leave some out or lower max_pixels or max_frames"
                )
            loaded.append(media)
        return tuple(loaded)

    def _load_image(self, item: MediaItem, options: ImageOptions, report: Progress) -> Media:
        report(f"reading {item.label}", 0, 0)
        pixels = load_image(item.source, options)
        if self.settings.second_resize is not None:
            pixels = _resized_again(pixels, self.settings.second_resize)
        return Media("image", pixels[None], None, item.label, self._grid(pixels))

    def _load_video(self, item: MediaItem, options: VideoOptions, report: Progress) -> Media:
        source = item.source
        if isinstance(source, tuple):
            source = FrameList(source, item.timestamps)
        if not self._decode:
            plan = plan_video(source, options)
            black = np.broadcast_to(np.uint8(0), (len(plan.indices), *plan.size, 3))
            return Media("video", black, plan.timestamps, item.label, self._grid(black[0]), plan.warnings)
        video = load_video(source, options, progress=lambda done, total: report(f"reading {item.label}", done, total))
        grid = self._grid(video.frames[0])
        return Media("video", video.frames, video.timestamps, item.label, grid, video.warnings)

    def _grid(self, frame: np.ndarray) -> tuple[int, int]:
        height, width = frame.shape[:2]
        patch, merge = self.settings.patch_size, self.settings.merge_size
        if height % (patch * merge) or width % (patch * merge):
            raise InputError(f"a checkpoint with patch_size {patch} and spatial_merge_size {merge} takes no media yet")
        return height // patch, width // patch

    def _tokens_per_frame(self, media: Media) -> int:
        return media.grid[0] * media.grid[1] // self.settings.merge_size**2

    def _token_ids(self, segments: Sequence[Segment], media: Sequence[Media]) -> list[int]:
        """Encode: text between two control tokens as one run, as if the whole prompt were encoded at once."""
        assert self.tokenizer is not None
        ids: list[int] = []
        run: list[str] = []
        loaded = iter(media)
        for part in self._parts(segments, loaded):
            if isinstance(part, str):
                run.append(part)
                continue
            ids += self.tokenizer.encode("".join(run)) if run else []
            ids += part
            run = []
        return ids + (self.tokenizer.encode("".join(run)) if run else [])

    def _parts(self, segments: Sequence[Segment], loaded: Iterator[Media]) -> Iterator[str | list[int]]:
        """Plain text and lists of ids, in order."""
        for segment in segments:
            if isinstance(segment, str):
                yield segment
            elif isinstance(segment, Trusted):
                yield from self._trusted(segment.text)
            else:
                yield from self._pads(next(loaded))

    def _pads(self, media: Media) -> Iterator[str | list[int]]:
        count = self._tokens_per_frame(media)
        if media.kind == "image":
            yield [self.settings.image_token_id] * count
            return
        for k in range(len(media.frames)):
            seconds = None if media.timestamps is None else float(media.timestamps[k])
            yield from self._trusted(frame_label(seconds))
            yield [self.settings.video_token_id] * count

    def _trusted(self, text: str) -> Iterator[str | list[int]]:
        assert self.tokenizer is not None
        for part in self.tokenizer.split_control(text):
            yield part if isinstance(part, str) else [part]

    def _prompt(self, ids: Sequence[int], media: tuple[Media, ...], warnings: tuple[str, ...]) -> Prompt:
        settings = self.settings
        tokens = np.array(ids, np.int32)
        grids = [(len(m.frames), *m.grid) for m in media]
        positions, delta = position_ids(
            tokens,
            grids,
            image_token_id=settings.image_token_id,
            video_token_id=settings.video_token_id,
            merge_size=settings.merge_size,
        )
        self._check_kinds(tokens, media)
        warnings += settings.warnings + tuple(warning for m in media for warning in m.warnings)
        return Prompt(tokens, positions, delta, media, self._opens_thinking(tokens), warnings, settings)

    def _check_kinds(self, tokens: np.ndarray, media: Sequence[Media]) -> None:
        kinds: dict[int, Kind] = {self.settings.image_token_id: "image", self.settings.video_token_id: "video"}
        pads = tokens[np.isin(tokens, list(kinds))]
        start = 0
        for k, m in enumerate(media):
            if kinds[int(pads[start])] != m.kind:
                raise InputError(f"{m.label!r} (item {k}) is of kind {m.kind}, but its pad tokens are for another kind")
            start += len(m.frames) * self._tokens_per_frame(m)

    def _opens_thinking(self, tokens: np.ndarray) -> bool:
        if self.tokenizer is None:
            return False
        return self.tokenizer.decode(tokens[-8:].tolist()).rstrip().endswith("<think>")


def _resized_again(pixels: np.ndarray, second: SecondResize) -> np.ndarray:
    height, width = smart_resize(*pixels.shape[:2], min_pixels=second.min_pixels, max_pixels=second.max_pixels)
    if (height, width) == pixels.shape[:2]:
        return pixels
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling(second.resample)))
