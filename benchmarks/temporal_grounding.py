"""When does it happen, and other questions about videos: a bundle's answers against annotations.

    python -m benchmarks.temporal_grounding BUNDLE ANNOTATIONS --videos DIR --output RESULTS.jsonl

Works on TimeLens-Bench's annotation files and on our synthetic sets (`python -m examples.train_tiny.held_out`); see
grounding_annotations.py for the format. Every item becomes a line of RESULTS.jsonl when it is answered: started again,
the command goes on where it was stopped. At the end it prints mean IoU, the share of items whose IoU reaches 0.3, 0.5
and 0.7, and the accuracy of other questions, each with a 95 % bootstrap interval over videos.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.grounding_annotations import AnnotationError, Item, find_video, read_items
from benchmarks.grounding_metrics import THRESHOLDS, interval, iou, same_answer
from runtime.errors import GenerationError, InputError
from runtime.media_options import VideoOptions
from runtime.sampling import SamplingOptions
from runtime.spans import parse_span

if TYPE_CHECKING:
    from runtime.engine import Engine

PROMPT = "When does this happen: {query}? Answer with the start and end in seconds."


def main() -> int:
    args = _parser().parse_args()
    try:
        items = read_items(args.annotations)[: args.limit]
        return run(args, items)
    except (AnnotationError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on after what {args.output} holds", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.temporal_grounding", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("bundle", help="folder made by `python -m convert`")
    parser.add_argument("annotations", type=Path, help="TimeLens annotations (.json or .jsonl)")
    parser.add_argument("--videos", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one an item; continued if it exists")
    parser.add_argument("--summary", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items only")
    parser.add_argument("--prompt", default=PROMPT, help="with {query} in it (default: %(default)s)")
    parser.add_argument("--fps", type=float, help="frames per second to look at (default 2)")
    parser.add_argument("--max-frames", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="thinking included (default 256)")
    return parser


def run(args: argparse.Namespace, items: list[Item]) -> int:
    """Answers what is not answered yet, then prints the figures. Returns the exit code."""
    if "{query}" not in args.prompt:
        raise InputError("--prompt must say where the query goes: {query}")
    options = {name: getattr(args, name) for name in ("fps", "max_frames", "max_pixels")}
    options = {name: value for name, value in options.items() if value is not None}
    settings = {"bundle": args.bundle, "prompt": args.prompt, "max_new_tokens": args.max_new_tokens, **options}
    done = read_results(args.output, settings)
    left = [item for item in items if item.id not in done]
    paths = {item.video: find_video(args.videos, item.video) for item in items}
    missing = sorted(name for name, path in paths.items() if path is None)
    if missing:
        print(f"{len(missing)} videos are not in {args.videos}, for instance {missing[0]!r}: left out", file=sys.stderr)
    left = [item for item in left if paths[item.video] is not None]
    if left:
        from runtime.engine import Engine

        engine = Engine.load(args.bundle)
        with args.output.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps({"settings": settings}) + "\n")
            for result in _progress(answers(engine, left, paths, args, options), len(left)):
                done[result["id"]] = result
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
    figures = summarise([done[item.id] for item in items if item.id in done])
    figures["missing videos"] = len(missing)
    print(table(figures))
    if args.summary:
        args.summary.write_text(json.dumps({"settings": settings, **figures}, indent=2) + "\n", encoding="utf-8")
    return 0


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Earlier results by item; a line cut short by an interruption counts as not written.

    Raises:
        InputError: they were made with other settings.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    records = [json.loads(line) for line in lines]
    if records and records[0].get("settings") != settings:
        raise InputError(f"{path} was made with {records[0].get('settings')}, not {settings}; name another --output")
    return {record["id"]: record for record in records[1:]}


def answers(
    engine: "Engine", items: list[Item], paths: dict[str, Path | None], args: argparse.Namespace, options: Any
) -> Iterator[dict[str, Any]]:
    """What the engine says to each item, and what that is worth.

    Args:
        args: with `prompt` and `max_new_tokens`, see the command line.
        options: of `VideoOptions`.
    """
    for item in items:
        # Replaced, not formatted: braces in the rest of a prompt are text.
        text = args.prompt.replace("{query}", item.text) if item.span else item.text
        content = [{"type": "video", "video": str(paths[item.video])}, {"type": "text", "text": text}]
        begun = time.perf_counter()
        record: dict[str, Any] = {"id": item.id, "video": item.video, "kind": item.kind, "text": text}
        try:
            generation = engine.generate(
                [{"role": "user", "content": content}],
                video_options=VideoOptions(**options),
                max_new_tokens=args.max_new_tokens,
                sampling=SamplingOptions(),
            )
            for _ in generation:
                pass
            result = generation.result
            record |= {name: getattr(result, name) for name in ("thinking", "finish_reason", "prompt_tokens")}
            record |= {"answer": result.text or "", "attention_path": result.attention_path}
        except (InputError, GenerationError) as error:
            record |= {"answer": "", "error": str(error)}
        yield record | score(item, record["answer"]) | {"seconds": round(time.perf_counter() - begun, 3)}


def score(item: Item, answer: str) -> dict[str, Any]:
    """What an answer is worth: its span and IoU, or whether it is the true answer."""
    if item.span is not None:
        span = parse_span(answer)
        return {"true": item.span, "span": span, "iou": round(iou(span, item.span), 4)}
    return {"true": item.answer, "right": same_answer(answer, item.answer or "")}


def _progress(results: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    begun = time.perf_counter()
    for number, result in enumerate(results, start=1):
        yield result
        seconds = (time.perf_counter() - begun) / number * (total - number)
        value = f"IoU {result['iou']:.2f}" if "iou" in result else "right" if result["right"] else "wrong"
        print(f"{number}/{total}, {seconds:.0f} s left: {result['id']} {value}", file=sys.stderr)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures over results: for each a dictionary with mean, low, high and n."""
    measures: dict[str, tuple[list[float], list[str]]] = {}

    def add(name: str, value: float, video: str) -> None:
        values, videos = measures.setdefault(name, ([], []))
        values.append(float(value))
        videos.append(video)

    for result in results:
        if "iou" in result:
            add("mIoU", result["iou"], result["video"])
            for threshold in THRESHOLDS:
                add(f"R@{threshold}", result["iou"] >= threshold, result["video"])
        else:
            add(f"accuracy, {result['kind']}", result["right"], result["video"])
    figures: dict[str, Any] = {}
    for name, (values, videos) in measures.items():
        mean, low, high = interval(values, videos)
        figures[name] = {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}
    paths = sorted({result["attention_path"] for result in results if "attention_path" in result})
    return {**figures, "attention paths": paths, "errors": sum("error" in result for result in results)}


def table(figures: dict[str, Any]) -> str:
    """The figures as text, a line each."""
    lines = [
        f"{name:20} {100 * f['mean']:6.1f} %   ({100 * f['low']:.1f} to {100 * f['high']:.1f}, {f['n']} items)"
        for name, f in figures.items()
        if isinstance(f, dict)
    ]
    rest = [f"{name}: {value}" for name, value in figures.items() if not isinstance(value, dict) and value]
    return "\n".join([*lines, *rest])


if __name__ == "__main__":
    sys.exit(main())
