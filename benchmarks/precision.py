"""How far bfloat16 and 8-bit weights are from float32:
`python -m benchmarks.precision CHECKPOINT... [--golden FILE.npz]`.

Every prompt runs with the same tokens: in float32; in float32 with weights rounded to bfloat16 (what rounding a
checkpoint costs: nothing where it was published in bfloat16), to int8 or to fp8; and in bfloat16 with each of them. All
are compared with the first. A sparse mixture of experts makes discrete choices: where two keys or two experts score
almost alike, rounding picks the other one and a logit jumps. The overlap of the selected sets shows how much of a
difference is that.
"""

import argparse
import dataclasses
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

from kernels_pallas.index_select.reference import select_mask
from keye_jax import KeyeConfig, KeyeVL
from keye_jax.cache import CAPACITY_STEP, init_cache
from keye_jax.config import INDEXER_DTYPES
from keye_jax.decoder import decoder_layer, embed, lm_head, rope_tables
from keye_jax.indexer import index_inputs
from keye_jax.layers import weights_of
from keye_jax.ops import rms_norm
from keye_jax.params import map_specs

RESULTS = Path(__file__).parent / "results" / "precision.json"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids [T], positions [3, T], and for each pad token id in `media` the patches and grid it stands for."""

    name: str
    ids: np.ndarray
    positions: np.ndarray
    media: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)


def golden_prompts(path: Path, config: KeyeConfig) -> list[Prompt]:
    """The prompts of a golden.npz, with their pixels."""
    with np.load(path, allow_pickle=False) as arrays:
        prompts = []
        for key in arrays.files:
            case, _, rest = key.partition("/")
            if rest != "input_ids":
                continue
            media = {}
            for token, pixels, grid in (
                (config.image_token_id, "pixel_values", "image_grid_thw"),
                (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
            ):
                if f"{case}/{pixels}" in arrays:
                    media[token] = arrays[f"{case}/{pixels}"], arrays[f"{case}/{grid}"]
            prompts.append(Prompt(case, arrays[key], arrays[f"{case}/position_ids"], media))
    return prompts


def random_prompt(config: KeyeConfig, tokens: int, seed: int) -> Prompt:
    """Random text."""
    ids = np.random.default_rng(seed).integers(0, config.text.vocab_size, tokens)
    ids[(ids == config.image_token_id) | (ids == config.video_token_id)] = 0
    return Prompt(f"random ids, seed {seed}", ids.astype(np.int32), np.tile(np.arange(tokens, dtype=np.int32), (3, 1)))


def run(model: KeyeVL, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] and selected sets [L, T, T] of a prompt."""
    T, text = len(prompt.ids), model.arrays()["text"]
    rows = np.zeros((T, model.config.text.hidden_size), np.float32)
    for token, (patches, grid) in prompt.media.items():
        rows[prompt.ids == token] = model.encode_vision(jnp.asarray(patches), jnp.asarray(grid)).astype(jnp.float32)
    is_vision = np.isin(prompt.ids, list(prompt.media))
    h = embed(text, *(jnp.asarray(x)[None] for x in (prompt.ids, rows, is_vision)))
    logits, masks = _trace(text, h, jnp.asarray(prompt.positions)[:, None], model.config)
    return np.asarray(logits[0]), np.asarray(masks)[:, 0, :, :T]


@partial(jax.jit, static_argnames="config")
def _trace(text: dict[str, Any], h: jax.Array, positions: jax.Array, config: KeyeConfig) -> tuple[jax.Array, jax.Array]:
    """The decoder in one chunk, with the sets that each layer selects."""
    T, layers, start = h.shape[1], weights_of(text["layers"]), jnp.zeros(1, jnp.int32)
    capacity = -(-T // CAPACITY_STEP) * CAPACITY_STEP
    tables = rope_tables(positions, config, h.dtype)

    def body(layer: jax.Array, carry: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, Any, jax.Array]:
        h, cache, masks = carry
        a = rms_norm(h, layers["input_layernorm"][layer], config.text.rms_norm_eps)
        index = index_inputs(jax.tree.map(lambda w: w[layer], layers["indexer"]), a, *tables[1], config)
        h, cache = decoder_layer(layers, layer, h, cache, tables, jnp.full(1, T, jnp.int32), config)
        keys = (cache["idx_k"], cache.get("idx_scale"), layer, start)
        mask = select_mask(index.q, index.weights, *keys, config.sparse.topk)
        return h, cache, masks.at[layer].set(mask)

    masks = jnp.zeros((config.text.num_hidden_layers, 1, T, capacity), bool)
    carry = (h, init_cache(config, 1, capacity, h.dtype), masks)
    h, _, masks = lax.fori_loop(0, config.text.num_hidden_layers, body, carry)
    return lm_head(text, rms_norm(h, text["norm"], config.text.rms_norm_eps)), masks


def compare(
    reference: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], topk: int
) -> dict[str, Any]:
    """Differences of logits relative to the largest one; share of positions with the same best token; overlap
    (intersection over union) of the selected sets per layer, over queries that see more than `topk` keys."""
    (logits, sets), (other_logits, other_sets) = reference, other
    error = np.abs(other_logits - logits) / np.abs(logits).max()
    overlap = (sets & other_sets).sum(-1)[:, topk:] / (sets | other_sets).sum(-1)[:, topk:]
    return {
        "logits_max": float(error.max()),
        "logits_mean": float(error.mean()),
        "same_best_token": float(np.mean(logits.argmax(-1) == other_logits.argmax(-1))),
        "set_overlap_per_layer": [float(x) for x in overlap.mean(-1)] if overlap.size else None,
    }


def measure(folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per prompt and way of rounding."""
    exact = KeyeVL.from_hf(folder, dtype="float32", indexer_dtype=args.indexer_dtype)
    config = exact.config
    rounded = map_specs(lambda spec: spec.as_dtype(jnp.bfloat16), config)
    low = jax.tree.map(lambda x, dtype: x.astype(dtype), exact.arrays(), rounded)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    load = partial(KeyeVL.from_hf, folder, indexer_dtype=args.indexer_dtype)
    others = {
        "bfloat16 weights": KeyeVL(config, wide),
        "int8 weights": load(dtype="float32", weights="int8"),
        "fp8 weights": load(dtype="float32", weights="fp8"),
        "bfloat16": KeyeVL(config, low),
        "bfloat16, int8 weights": load(dtype="bfloat16", weights="int8"),
        "bfloat16, fp8 weights": load(dtype="bfloat16", weights="fp8"),
    }
    prompts = golden_prompts(args.golden, config) if args.golden else [random_prompt(config, args.tokens, args.seed)]
    records = []
    for prompt in prompts:
        reference = run(exact, prompt)
        for name, model in others.items():
            result = compare(reference, run(model, prompt), config.sparse.topk)
            records.append(
                {"checkpoint": folder, "prompt": prompt.name, "tokens": len(prompt.ids), "run": name, **result}
            )
            print(_line(records[-1]), flush=True)
    return records


def _line(record: dict[str, Any]) -> str:
    overlap = record["set_overlap_per_layer"]
    return (
        f"{record['prompt']:<24} {record['tokens']:>6}  {record['run']:<22} {record['logits_max']:>10.4f} "
        f"{record['logits_mean']:>10.5f} {record['same_best_token']:>10.1%}  "
        + (" ".join(f"{x:.3f}" for x in overlap) if overlap else "all keys selected")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description="bfloat16 and 8-bit weights against float32"
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder in the official layout")
    parser.add_argument("--golden", type=Path, metavar="NPZ", help="take prompts from here (else random ids)")
    parser.add_argument("--tokens", type=int, default=256, help="length of the random prompt (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--indexer-dtype", choices=INDEXER_DTYPES, default="fp8")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"default {RESULTS.name} in benchmarks/results")
    args = parser.parse_args()
    print(f"{'prompt':<24} {'tokens':>6}  {'run':<22} {'largest':>10} {'mean':>10} {'same best':>10}  set overlap")
    records = [record for folder in args.checkpoints for record in measure(folder, args)]
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.precision", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "records": records,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
