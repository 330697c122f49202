"""The part of a command line that says what is asked: prompt, messages or token ids, and media."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.processor import Processor, Prompt

_MAX_MESSAGES_BYTES = 512 << 20


class _AddMedia(argparse.Action):
    """Keeps --image and --video in the order in which they were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kind = (option_string or "").lstrip("-")
        namespace.media = [*namespace.media, (kind, values)]


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --prompt, --messages, --token-ids, --system, and the media with their options."""
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="what to ask; media stand before it")
    asked.add_argument(
        "--messages", metavar="FILE", help="JSON: list of messages, or {messages, tools} (OpenAI schema)"
    )
    asked.add_argument("--token-ids", metavar="IDS", help="raw prompt: comma-separated token ids")
    media = parser.add_argument_group("media (repeat for several; they keep their order)")
    media.add_argument("--image", dest="media", metavar="FILE", action=_AddMedia, default=[])
    media.add_argument("--video", dest="media", metavar="FILE", action=_AddMedia)
    media.add_argument("--fps", type=float, help="video frames per second to look at (default 2)")
    media.add_argument("--max-frames", type=int, metavar="N", help="at most N frames of each video")
    media.add_argument("--max-pixels", type=int, metavar="N", help="at most N pixels for each image or frame")
    media.add_argument("--video-start", type=float, metavar="S", help="begin each video at second S")
    media.add_argument("--video-end", type=float, metavar="S", help="end each video at second S")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, with --prompt")


def prepare_request(
    processor: "Processor", args: argparse.Namespace, progress: Callable[[str, int, int], None]
) -> "Prompt":
    """The prompt that the arguments ask for. Raises InputError for what cannot be served."""
    from runtime.media_options import ImageOptions, VideoOptions

    if args.system is not None and args.prompt is None:
        raise InputError("--system goes with --prompt only; put a system message into the --messages file")
    if args.messages is not None and args.media:
        raise InputError("--image and --video go with --prompt or --token-ids; name media inside the --messages file")
    limits = {} if args.max_pixels is None else {"max_pixels": args.max_pixels}
    timing = {"fps": args.fps, "max_frames": args.max_frames}
    timing |= {"video_start": args.video_start, "video_end": args.video_end}
    image_options = ImageOptions.from_mapping(limits)
    video_options = VideoOptions.from_mapping(limits | {k: v for k, v in timing.items() if v is not None})
    options: Any = {"image_options": image_options, "video_options": video_options, "progress": progress}
    content = [{"type": kind, kind: path} for kind, path in args.media]
    if args.token_ids is not None:
        return processor.prepare_token_ids(_token_ids(args.token_ids), content, **options)
    if args.messages is not None:
        messages, tools = _read_messages(Path(args.messages))
        return processor.prepare(messages, tools=tools, **options)
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": args.prompt}]})
    return processor.prepare(messages, **options)


def question(args: argparse.Namespace) -> str | None:
    """The text of what `prepare_request` asks: the last user message's; None where there is none."""
    if args.messages is None:
        return args.prompt
    messages, _ = _read_messages(Path(args.messages))
    content = next((message["content"] for message in reversed(messages) if message["role"] == "user"), None)
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part["type"] == "text")
    return content


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--token-ids {text[:60]!r} must be whole numbers with commas between them") from None


def _read_messages(path: Path) -> tuple[Any, Any]:
    try:
        if path.stat().st_size > _MAX_MESSAGES_BYTES:
            raise InputError(f"{path} is larger than {_MAX_MESSAGES_BYTES >> 20} MiB; name media by path instead")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSON file of messages") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON ({error}); give a list of messages") from None
    if isinstance(document, dict):
        unknown = set(document) - {"messages", "tools"}
        if unknown or "messages" not in document:
            odd = f"has the unknown key {sorted(unknown)[0]!r}" if unknown else "has no 'messages'"
            raise InputError(f"{path} {odd}; give a list of messages or an object with messages and tools")
        return document["messages"], document.get("tools")
    return document, None
