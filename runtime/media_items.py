"""Image and video parts of a message: where the bytes come from and the options of this one item."""

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from runtime.errors import InputError
from runtime.media_options import ImageOptions, VideoOptions

Kind = Literal["image", "video"]
MAX_DATA_URI_BYTES = 256 << 20

OPTIONS: dict[Kind, tuple[str, ...]] = {
    "image": tuple(field.name for field in fields(ImageOptions)),
    "video": tuple(field.name for field in fields(VideoOptions)),
}


@dataclass(frozen=True)
class MediaItem:
    """One image or video of a conversation, not loaded yet.

    source: path, encoded bytes, PIL image or array; of a video also a tuple of such frames. options: what
    the request says about this item alone; names are checked here, values where they are used. label: for
    messages to people. timestamps: seconds of the frames in a tuple.
    """

    kind: Kind
    source: Any
    options: Mapping[str, Any]
    label: str
    timestamps: tuple[float, ...] | None = None


def media_item(part: Mapping[str, Any], place: str) -> MediaItem:
    """Read one part. Raises InputError, naming `place`, for anything that is not understood.

        {"type": "image", "image": SOURCE}            {"type": "image_url", "image_url": {"url": URL}}
        {"type": "video", "video": SOURCE}            {"type": "video_url", "video_url": {"url": URL}}
        {"type": "video", "video": [SOURCE, ...], "timestamps": [seconds, ...]}

    SOURCE is a path, bytes, PIL image, array or URL; a URL is a local path, file:// or data: URI. Options
    (`OPTIONS`) go in `preprocess_kwargs` beside the source or, with *_url, also inside it, where the
    official server reads them; with "image" and "video" they may also stand directly in the part, as
    keye-vl-utils has them.
    """
    type_ = part.get("type")
    if type_ not in ("image", "video", "image_url", "video_url"):
        raise InputError(f"{place}.type is {type_!r:.40}; it must be text, image, image_url, video or video_url")
    kind: Kind = "image" if type_.startswith("image") else "video"
    allowed = {"type", type_, "preprocess_kwargs"}
    allowed |= set() if type_.endswith("_url") else {*OPTIONS[kind]}
    allowed |= {"timestamps"} if type_ == "video" else set()
    _check_keys(part, allowed, place)
    source, inner = part.get(type_), {}
    if type_.endswith("_url") and isinstance(source, Mapping):
        _check_keys(source, {"url", "preprocess_kwargs"}, f"{place}.{type_}")
        source, inner = source.get("url"), source.get("preprocess_kwargs")
    if source is None or (type_.endswith("_url") and not isinstance(source, str)):
        wanted = f'{{"url": "..."}} in {type_!r}' if type_.endswith("_url") else f"a source in {type_!r}"
        raise InputError(f"{place} has no {kind}; give {wanted}")
    direct = {name: part[name] for name in OPTIONS[kind] if name in part}
    options = _merged([direct, part.get("preprocess_kwargs"), inner], kind, place)
    timestamps = part.get("timestamps")
    if kind == "video" and isinstance(source, Sequence) and not isinstance(source, str | bytes):
        frames = tuple(_resolved(frame, "image", f"{place}.video[{i}]") for i, frame in enumerate(source))
        times = None if timestamps is None else _seconds(timestamps, len(frames), f"{place}.timestamps")
        return MediaItem(kind, frames, options, f"{len(frames)} frames", times)
    if timestamps is not None:
        raise InputError(f"{place}.timestamps is for a list of frames; a video file has its own")
    return MediaItem(kind, _resolved(source, kind, f"{place}.{type_}"), options, _label(source, kind))


def _check_keys(mapping: Mapping[str, Any], allowed: set[str], place: str) -> None:
    unknown = sorted(repr(key) for key in mapping if key not in allowed)
    if unknown:
        raise InputError(f"{place} has the unknown key {unknown[0]:.60}; allowed: {', '.join(sorted(allowed))}")


def _merged(places: Sequence[Any], kind: Kind, place: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for options in places:
        if options is None:
            continue
        if not isinstance(options, Mapping):
            raise InputError(f"{place}.preprocess_kwargs must be an object, not {type(options).__name__}")
        _check_keys(options, {*OPTIONS[kind]}, f"{place}.preprocess_kwargs")
        for name, value in options.items():
            if value is None:
                continue
            if name in merged and merged[name] != value:
                raise InputError(
                    f"{place} says {name} = {merged[name]!r:.40} in one place and {value!r:.40} in another; give one"
                )
            merged[name] = value
    return merged


def _seconds(timestamps: Any, count: int, place: str) -> tuple[float, ...]:
    if not isinstance(timestamps, Sequence) or len(timestamps) != count:
        raise InputError(f"{place} must list one time in seconds for each of the {count} frames")
    for value in timestamps:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise InputError(f"{place} holds {value!r:.40}; times are seconds from 0 on")
    return tuple(map(float, timestamps))


def _resolved(source: Any, kind: Kind, place: str) -> Any:
    """A path or the bytes for a string; other sources as they are."""
    if not isinstance(source, str):
        return source
    scheme = source.partition(":")[0].lower() if ":" in source else ""
    if scheme == "data":
        return _data_uri(source, kind, place)
    if scheme == "file":
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise InputError(f"{place} {source!r:.80} is not a file of this machine; use file:///path")
        source = unquote(parts.path)
    elif "://" in source:
        raise InputError(f"{place} {source!r:.80}: network URLs are off; download it and give its path")
    if not source or "\0" in source:
        raise InputError(f"{place} {source!r:.80} is no file name; give the path of a file")
    return source


def _data_uri(uri: str, kind: Kind, place: str) -> bytes:
    header, comma, data = uri.partition(",")
    media_type, _, encoding = header[len("data:") :].lower().partition(";")
    if not comma or encoding.rpartition(";")[2] != "base64":
        raise InputError(f"{place} is a data: URI without base64 data; write data:{kind}/...;base64,...")
    if media_type.partition("/")[0] != kind and (kind, media_type) != ("video", "image/gif"):
        raise InputError(f"{place} is a data: URI of type {media_type!r:.40}; expected {kind}/...")
    if len(data) > MAX_DATA_URI_BYTES * 4 // 3 + 4:
        raise InputError(f"{place} holds more than {MAX_DATA_URI_BYTES >> 20} MiB; save it and give its path")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{place} holds broken base64 data ({error}); encode it again") from error


def _label(source: Any, kind: Kind) -> str:
    is_path = isinstance(source, os.PathLike) or (isinstance(source, str) and not source.startswith("data:"))
    return os.path.basename(os.fsdecode(source)) if is_path else kind
