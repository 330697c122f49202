"""How much neighbouring queries share of what they select, on real clips.

    python -m benchmarks.selection_locality BUNDLE VIDEO... [--out RESULTS.json] [--plot PLOT.png]

For blocks of 16, 64 and 256 consecutive prompt tokens: the keys that the block selects together (their union) and the
128-token pages that hold them, averaged over blocks and layers. Blocks count whose first token sees more than top-k
keys. `even` is the union that as many independent, even choices would have; `visible` all keys that a block sees. The
plot needs matplotlib (the `bench` extra).
"""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.prompts import bundle_model, chunks, selected_by
from keye_jax import KeyeConfig, KeyeVL
from keye_jax.cache import Cache, init_cache
from keye_jax.decoder import embed, rope_tables
from keye_jax.graphs import Chunk
from keye_jax.layers import weights_of
from runtime.engine import Engine
from runtime.errors import InputError
from runtime.media_options import VideoOptions
from runtime.processor import Prompt

BLOCKS = (16, 64, 256)
PAGE = 128
CHUNK = 512
PROMPT = "What happens in this video?"


def locality(model: KeyeVL, prompt: Prompt) -> dict[str, Any]:
    """A prompt's figures by block size; see the head of this module.

    Returns:
        tokens, topk, and in `blocks` by size: number of blocks, and means of union, pages, visible, visible_pages and
        even in keys or pages; `union_by_layer` and `pages_by_layer` [L]. Means are None where no block counts.
    """
    config, T = model.config, len(prompt.token_ids)
    topk = config.sparse.topk
    text = model.arrays()["text"]
    capacity = -(-T // CHUNK) * CHUNK
    cache = init_cache(config, 1, capacity, text["norm"].dtype)
    parts = []
    for chunk in chunks(model, prompt, CHUNK):
        cache, found = _unions(text, cache, chunk, config)
        parts.append({size: np.asarray(pair) for size, pair in found.items()})
    blocks = {}
    for size in BLOCKS:
        counts = np.concatenate([part[size] for part in parts], axis=1)  # [L, blocks, 2]
        first = np.arange(counts.shape[1]) * size
        used = (first + 1 > topk) & (first + size <= T)
        blocks[size] = _figures(counts[:, used], first[used], size, topk)
    return {"tokens": T, "topk": topk, "blocks": blocks}


def _figures(counts: np.ndarray, first: np.ndarray, size: int, topk: int) -> dict[str, Any]:
    if not len(first):
        return {"blocks": 0}
    # A key is left out by all queries that see it, each with the chance of those it does not take.
    seen = first[:, None] + np.arange(size) + 1
    missed = np.cumsum(np.log1p(-np.minimum(topk / seen, 1 - 1e-12))[:, ::-1], axis=1)[:, ::-1]
    own = -np.expm1(missed)
    even = own[:, 0] * seen[:, 0] + own[:, 1:].sum(axis=1)
    means = {
        "union": counts[..., 0].mean(),
        "pages": counts[..., 1].mean(),
        "even": even.mean(),
        "visible": seen[:, -1].mean(),
        "visible_pages": (-(-seen[:, -1] // PAGE)).mean(),
    }
    by_layer = counts.mean(axis=1).round(2).T.tolist()
    rounded = {name: round(float(value), 2) for name, value in means.items()}
    return {"blocks": len(first), **rounded, "union_by_layer": by_layer[0], "pages_by_layer": by_layer[1]}


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _unions(text: dict[str, Any], cache: Cache, chunk: Chunk, config: KeyeConfig) -> tuple[Cache, dict[int, jax.Array]]:
    """The cache with a chunk appended, and by block size int32 [L, C / size, 2]: keys and pages of each union."""
    h = embed(text, chunk["tokens"], chunk["vision_rows"], chunk["is_vision"])
    C, S, layers = h.shape[1], cache["kv"].shape[2], config.text.num_hidden_layers
    weights = weights_of(text["layers"])
    rest = (rope_tables(chunk["positions"], config, h.dtype), chunk["valid"], config)

    def body(layer: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        h, cache, found = carry
        h, cache, selected = selected_by(weights, layer, h, cache, rest)
        for size in BLOCKS:
            union = selected[0].reshape(C // size, size, S).any(axis=1)
            pages = union.reshape(C // size, S // PAGE, PAGE).any(axis=-1)
            both = jnp.stack([union.sum(-1), pages.sum(-1)], axis=-1)
            found = {**found, size: found[size].at[layer].set(both)}
        return h, cache, found

    found = {size: jnp.zeros((layers, C // size, 2), jnp.int32) for size in BLOCKS}
    h, cache, found = lax.fori_loop(0, layers, body, (h, cache, found))
    return {**cache, "length": cache["length"] + chunk["valid"]}, found


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Union and pages against the block size, as shares of what an even choice, or all that is visible, would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), dpi=150)
    for record in records:
        sizes = [size for size in BLOCKS if record["blocks"][size]["blocks"]]
        figures = [record["blocks"][size] for size in sizes]
        label = f"{record['video']}, {record['tokens']:,} tokens"
        (line,) = left.plot(sizes, [f["union"] for f in figures], "o-", label=label)
        left.plot(sizes, [f["even"] for f in figures], ":", color=line.get_color())
        right.plot(sizes, [100 * f["pages"] / f["visible_pages"] for f in figures], "o-", color=line.get_color())
    left.set(xlabel="neighbouring queries", ylabel="keys selected together", title="Union (dotted: even choice)")
    right.set(xlabel="neighbouring queries", ylabel="% of the visible pages", title=f"{PAGE}-token pages touched")
    right.set_ylim(0, 105)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(BLOCKS, [str(size) for size in BLOCKS])
        axes.grid(color="#e4e4e4")
    left.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        # Where no line is: blocks touch nearly every page.
        right.legend(handles, labels, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    args = _parser().parse_args()
    try:
        return run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection_locality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("bundle", help="folder made by `python -m convert`")
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument("--fps", type=float, help="frames per second to look at (default 2)")
    parser.add_argument("--max-frames", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--out", type=Path, default=Path("selection-locality.json"), help="default: %(default)s")
    parser.add_argument("--plot", type=Path, help="also draw it, as PNG")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures every video and writes the results. Returns the exit code."""
    options = {name: getattr(args, name) for name in ("fps", "max_frames", "max_pixels")}
    options = {name: value for name, value in options.items() if value is not None}
    engine = Engine.open(args.bundle)
    model = bundle_model(engine.bundle)
    records = []
    for video in args.videos:
        content = [{"type": "video", "video": str(video)}, {"type": "text", "text": args.prompt}]
        prompt = engine.prepare([{"role": "user", "content": content}], video_options=VideoOptions(**options))
        records.append({"video": video.name, **locality(model, prompt)})
        print(_lines(records[-1]), flush=True)
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.selection_locality", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "indexer_dtype": engine.bundle.indexer_dtype,
        "page": PAGE,
        "records": records,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(records, args.plot)
    return 0


def _lines(record: dict[str, Any]) -> str:
    lines = [f"{record['video']}: {record['tokens']} tokens, top-{record['topk']}"]
    for size, f in record["blocks"].items():
        if not f["blocks"]:
            lines.append(f"  {size:4} queries: no block whose queries see more than top-k keys")
            continue
        lines.append(
            f"  {size:4} queries: {f['union']:8.1f} keys together (even choice {f['even']:.1f}, visible "
            f"{f['visible']:.1f}), {f['pages']:.1f} of {f['visible_pages']:.1f} pages"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
