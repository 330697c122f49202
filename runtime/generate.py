"""`python -m runtime.generate`: a bundle answers about images and videos."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import GenerationError, InputError

if TYPE_CHECKING:
    from runtime.engine import Engine, Generation, Result
    from runtime.processor import Prompt

_MAX_MESSAGES_BYTES = 512 << 20
_EXAMPLES = """examples:
  python -m runtime.generate BUNDLE --video clip.mp4 --prompt "What happens in this video?"
  python -m runtime.generate BUNDLE --image a.jpg --image b.png --prompt "What differs?" --json
  python -m runtime.generate BUNDLE --messages conversation.json --temperature 0.6 --seed 1
"""


class _AddMedia(argparse.Action):
    """Keeps --image and --video in the order in which they were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kind = (option_string or "").lstrip("-")
        namespace.media = [*namespace.media, (kind, values)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0; 1 generation failed; 2 bad input; 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted before the first token", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 1
    except (InputError, GenerationError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.generate",
        description="Answers a prompt about images and videos with a bundle made by `python -m convert`. "
        "The answer goes to stdout as it is written; thinking and progress go to stderr.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by `python -m convert`")
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
    output = parser.add_argument_group("generation (unset: the checkpoint's generation_config.json, else greedy)")
    output.add_argument("--max-new-tokens", type=int, metavar="N", help="default 1024, or what the context has left")
    output.add_argument("--temperature", type=float, metavar="T", help="0: greedy, always the likeliest token")
    output.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P")
    output.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; 0: all")
    output.add_argument("--seed", type=int, metavar="S", help="same seed, same answer (default 0)")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _run(args: argparse.Namespace) -> int:
    from runtime.engine import Engine
    from runtime.progress import ProgressLine

    progress = ProgressLine()
    engine = Engine.open(args.bundle, progress=progress)
    prompt = _prepare(engine, args)
    progress.close()
    generation = engine.generate_prompt(prompt, max_new_tokens=args.max_new_tokens, sampling=_sampling(engine, args))
    for warning in prompt.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    interrupted = False
    try:
        _stream(generation, progress, quiet=args.json)
    except KeyboardInterrupt:
        interrupted = True
    progress.close()
    result = generation.result
    if args.json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
    else:
        _print_summary(result)
    return 130 if interrupted else 0


def _prepare(engine: "Engine", args: argparse.Namespace) -> "Prompt":
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
    options = {"image_options": image_options, "video_options": video_options}
    content = [{"type": kind, kind: path} for kind, path in args.media]
    if args.token_ids is not None:
        return engine.prepare_token_ids(_token_ids(args.token_ids), content, **options)
    if args.messages is not None:
        messages, tools = _read_messages(Path(args.messages))
        return engine.prepare(messages, tools=tools, **options)
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": args.prompt}]})
    return engine.prepare(messages, **options)


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


def _sampling(engine: "Engine", args: argparse.Namespace) -> Any:
    """The checkpoint's settings with the options given on the command line in their place."""
    from dataclasses import replace

    names = ("temperature", "top_p", "top_k", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(engine.default_sampling(), **given)


def _stream(generation: "Generation", progress: Any, *, quiet: bool) -> None:
    channel = None
    for piece in generation:
        if quiet:
            continue
        if piece.channel != channel:
            progress.close()
            if channel is not None:
                print(file=sys.stderr)
            if piece.channel == "thinking":
                print("(thinking) ", end="", file=sys.stderr, flush=True)
            channel = piece.channel
        print(piece.text, end="", flush=True, file=sys.stderr if channel == "thinking" else sys.stdout)
    if channel is not None:
        print(file=sys.stderr if channel == "thinking" else sys.stdout)


def _print_summary(result: "Result") -> None:
    if result.text is None:
        print("no tokenizer in this bundle, so no text; token ids:")
        print(",".join(map(str, result.token_ids)))
    elif not result.text and result.finish_reason == "length":
        print("(no answer yet: all new tokens went into thinking; raise --max-new-tokens)", file=sys.stderr)
    for call in result.tool_calls:
        print(json.dumps({"tool_call": {"name": call.name, "arguments": call.arguments}}, ensure_ascii=False))
    new, seconds = len(result.token_ids), result.timings["decode_s"]
    rate = f"{new / seconds:.1f} tokens/s, " if seconds else ""
    print(
        f"[{result.prompt_tokens} prompt tokens, {new} new, {rate}prefill {result.timings['prefill_s']:.2f} s, "
        f"compile {result.timings['compile_s']:.1f} s, finish: {result.finish_reason}, {result.attention_path}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
