"""`python -m runtime.generate`: a bundle answers about images and videos."""

import argparse
import contextlib
import io
import json
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import GenerationError, InputError
from runtime.graphs import PRESETS
from runtime.processes import ALONE, Processes, join
from runtime.request import add_request_arguments, prepare_request, question

if TYPE_CHECKING:
    from runtime.engine import Engine, Generation, Result

_EXAMPLES = """examples:
  python -m runtime.generate BUNDLE --video clip.mp4 --prompt "What happens in this video?"
  python -m runtime.generate BUNDLE --image a.jpg --image b.png --prompt "What differs?" --json
  python -m runtime.generate BUNDLE --messages conversation.json --temperature 0.6 --seed 1
  python -m runtime.generate gs://bucket/BUNDLE --prompt "Hello" --coordinator host0:8476 --num-processes 2 --process-id 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0; 1 generation failed; 2 bad input; 130 interrupted."""
    args = _parser().parse_args(argv)
    processes = ALONE
    try:
        processes = join(args.coordinator, args.num_processes, args.process_id)
        return processes.end(_run(args, processes))
    except KeyboardInterrupt:
        print(f"{processes.prefix}interrupted before the answer was complete", file=sys.stderr)
        return processes.end(130, "interrupted")
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return processes.end(1)
    except Exception as error:
        known = isinstance(error, InputError | GenerationError)
        if processes.count == 1 and (args.debug or not known):
            raise
        if args.debug or not known:
            traceback.print_exc()
        # Several processes must hear of every error, the unforeseen too; else they wait for this one.
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        print(f"error: {processes.prefix}{reason}", file=sys.stderr)
        return processes.end(2 if isinstance(error, InputError) else 1, reason)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.generate",
        description="Answers a prompt about images and videos with a bundle made by `python -m convert`. "
        "The answer goes to stdout as it is written; thinking and progress go to stderr.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="made by `python -m convert`: a folder, or gs://... or s3://..."
    )
    add_request_arguments(parser)
    output = parser.add_argument_group("generation (unset: the checkpoint's generation_config.json, else greedy)")
    output.add_argument("--max-new-tokens", type=int, metavar="N", help="default 1024, or what the context has left")
    output.add_argument("--temperature", type=float, metavar="T", help="0: greedy, always the likeliest token")
    output.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P")
    output.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; 0: all")
    output.add_argument("--seed", type=int, metavar="S", help="same seed, same answer (default 0)")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    output.add_argument(
        "--explain", metavar="FILE.png", help="also draw which frames were selected while the answer was written"
    )
    several = parser.add_argument_group("several devices")
    several.add_argument("--devices", type=int, metavar="N", help="spread the model over N (default: all accelerators)")
    several.add_argument("--preset", choices=PRESETS, help=f"what is spread (default {PRESETS[0]})")
    hosts = parser.add_argument_group(
        "several processes (start the same command in each; TPU pods, Slurm and Open MPI need no options)"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    hosts.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    hosts.add_argument("--process-id", type=int, metavar="I", help="which one this is; 0 prints the answer")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _run(args: argparse.Namespace, processes: Processes) -> int:
    from runtime.engine import Engine
    from runtime.explain_picture import check_path, draw
    from runtime.progress import ProgressLine

    speaks = processes.index == 0
    if args.explain is not None and speaks:
        check_path(args.explain)
    progress = ProgressLine(None if speaks else io.StringIO())
    engine = Engine.open(args.bundle, progress=progress, devices=args.devices, preset=args.preset, processes=processes)
    prompt = prepare_request(engine.processor, args, progress)
    progress.close()
    generation = engine.generate_prompt(
        prompt,
        max_new_tokens=args.max_new_tokens,
        sampling=_sampling(engine, args),
        explain=args.explain is not None,
    )
    if not speaks:
        for _ in generation:
            pass
        if args.explain is not None:
            generation.explanation()
        return 0
    for warning in prompt.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    interrupted = False
    try:
        _stream(generation, progress, quiet=args.json)
    except KeyboardInterrupt:
        interrupted = True
    progress.close()
    shown = generation.result.to_json()
    if not args.json:
        _print_summary(generation.result)
    if args.explain is not None and not interrupted:
        explanation = generation.explanation()
        draw(explanation, prompt.media, args.explain, question=question(args))
        progress.close()
        print(f"[{args.explain}: what the {explanation.part} selected]", file=sys.stderr)
        shown["explanation"] = explanation.to_json()
    if args.json:
        print(json.dumps(shown, ensure_ascii=False))
    return 130 if interrupted else 0


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
