"""What sparse attention and number formats cost in quality: one checkpoint, several ways to run it, one table.

    python -m benchmarks.sparsity_quality CHECKPOINT ANNOTATIONS --videos DIR --out RESULTS.json

Every variant answers every item of an annotation file (see grounding_annotations.py; `python -m
examples.train_tiny.held_out` writes one). Dense attention is the same checkpoint with top-k as large as its context.
Index recall is the share of dense attention that falls on the selected keys (`benchmarks.prompts.index_recall`),
averaged over layers and over the prompts of the first videos.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.grounding_annotations import AnnotationError, Item, find_video, read_items
from benchmarks.prompts import bundle_model, index_recall
from benchmarks.temporal_grounding import PROMPT, answers, summarise
from convert.convert import convert
from keye_jax import KeyeConfig
from keye_jax.errors import CheckpointError, ConfigError
from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.errors import InputError


@dataclass(frozen=True)
class Variant:
    """One way to run the checkpoint; `options` are those of `convert.convert`."""

    name: str
    options: dict[str, str]
    dense: bool = False


VARIANTS = (
    Variant("dense, float32", {"dtype": "float32", "indexer_dtype": "float32"}, dense=True),
    Variant("sparse, float32 index keys", {"dtype": "float32", "indexer_dtype": "float32"}),
    Variant("sparse, fp8 index keys", {"dtype": "float32", "indexer_dtype": "fp8"}),
    Variant("sparse, fp8, bfloat16 weights", {"dtype": "bfloat16", "indexer_dtype": "fp8"}),
    Variant("sparse, fp8, int8 weights", {"dtype": "bfloat16", "indexer_dtype": "fp8", "weights": "int8"}),
)


def main() -> int:
    args = _parser().parse_args()
    try:
        return run(args)
    except (AnnotationError, CheckpointError, ConfigError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparsity_quality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="folder in the official layout")
    parser.add_argument("annotations", type=Path, help="TimeLens annotations (.json or .jsonl)")
    parser.add_argument("--videos", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items only")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="thinking included (default 256)")
    parser.add_argument("--recall-videos", type=int, default=8, metavar="N", help="prompts for recall (default 8)")
    parser.set_defaults(prompt=PROMPT)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs all variants, prints the table and writes the figures. Returns the exit code."""
    items = read_items(args.annotations)[: args.limit]
    paths = {item.video: find_video(args.videos, item.video) for item in items}
    missing = sorted(name for name, path in paths.items() if path is None)
    if missing or not items:
        raise InputError(f"{args.videos} lacks {missing[0]!r}" if missing else f"{args.annotations} has no items")
    records = []
    with tempfile.TemporaryDirectory(prefix="sparsity-quality-") as folder:
        for number, variant in enumerate(VARIANTS):
            records.append(_measure(variant, Path(folder, str(number)), items, paths, args))
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.sparsity_quality", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "items": len(items),
        "videos": len(paths),
        "variants": records,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(records))
    return 0


def _measure(
    variant: Variant, folder: Path, items: list[Item], paths: dict[str, Path | None], args: argparse.Namespace
) -> dict[str, Any]:
    record: dict[str, Any] = {"name": variant.name, **variant.options}
    begun = time.perf_counter()
    checkpoint = dense_checkpoint(args.checkpoint, folder / "checkpoint") if variant.dense else args.checkpoint
    options: dict[str, Any] = variant.options
    engine = Engine.load(convert(checkpoint, folder / "bundle", **options).path)
    found = []
    for result in answers(engine, items, paths, args, {}):
        found.append(result)
        print(f"{variant.name}: {len(found)}/{len(items)}", file=sys.stderr)
    lengths = [result["prompt_tokens"] for result in found if "prompt_tokens" in result]
    record |= {"topk": engine.bundle.config["sa_config"]["topk"], "figures": summarise(found)}
    record["prompt_tokens"] = round(float(np.mean(lengths)), 1) if lengths else None
    if not variant.dense:
        record["index_recall"] = _recall(engine, items, paths, args.recall_videos)
    return record | {"seconds": round(time.perf_counter() - begun, 1)}


def dense_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """A folder with the same files, whose top-k is as large as the context: everything is selected."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["sa_config"]["topk"] = KeyeConfig.from_hf(checkpoint).text.max_position_embeddings
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _recall(engine: Engine, items: list[Item], paths: dict[str, Path | None], count: int) -> dict[str, Any]:
    """Mean over layers and prompts, and by layer."""
    model = bundle_model(Bundle.open(engine.bundle.path))
    first = {item.video: item for item in reversed(items)}
    found = []
    for video in list(dict.fromkeys(item.video for item in items))[:count]:
        content = [{"type": "video", "video": str(paths[video])}, {"type": "text", "text": first[video].text}]
        found.append(index_recall(model, engine.prepare([{"role": "user", "content": content}])))
    by_layer = np.mean(found, axis=0)
    return {"mean": round(float(by_layer.mean()), 4), "by_layer": by_layer.round(4).tolist(), "prompts": len(found)}


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    kinds = sorted({name for r in records for name in r["figures"] if name.startswith("accuracy, ")})
    columns = ["mIoU", "R@0.5", *kinds]
    head = ["variant", "top-k", "context / top-k", "index recall", *columns]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for record in records:
        figures = record["figures"]
        ratio = f"{record['prompt_tokens'] / record['topk']:.2f}" if record["prompt_tokens"] else "-"
        recall = f"{100 * record['index_recall']['mean']:.1f} %" if "index_recall" in record else "-"
        cells = [record["name"], str(record["topk"]), ratio, recall]
        for name in columns:
            f = figures.get(name)
            cells.append(
                "-" if f is None else f"{100 * f['mean']:.1f} % ({100 * f['low']:.1f} to {100 * f['high']:.1f})"
            )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
