"""`python -m benchmarks.portable BUNDLE GOLDEN.npz`: does a bundle give the golden tokens on this machine?

Runs every golden prompt through the bundle's exported graphs, alone and all in one batch, with `keye_jax` and flax
out of reach, and fails if one token differs. GOLDEN.npz is tests/golden/golden.npz; the bundle is made from
tests/golden/checkpoint with `python -m convert --dtype float32`, the graphs for this machine with
`python -m runtime.export`, on any host.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine import Engine
from runtime.positions import position_ids
from runtime.sampling import SamplingOptions

CASES = ("text_short", "text_long", "image", "video", "two_images", "mixed")
_MODES = {"fp8": "fp8_on", "float32": "fp8_off"}
_FORBIDDEN = ("keye_jax", "kernels_pallas", "flax", "orbax")


@dataclass
class GoldenPrompt:
    """A prompt whose patches are given, as the golden file has them."""

    token_ids: np.ndarray
    position_ids: np.ndarray
    delta: int
    batches: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def patch_batches(self, max_patches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter(self.batches)


def golden_prompt(golden: dict[str, np.ndarray], case: str, image_id: int, video_id: int) -> GoldenPrompt:
    """The case's prompt, with one batch of patches for each image or frame in the order of the pad tokens."""
    ids = golden[f"{case}/input_ids"]
    frames: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    kinds = (
        (image_id, "pixel_values", "image_grid_thw"),
        (video_id, "pixel_values_videos", "video_grid_thw"),
    )
    for pad, pixels, grid in kinds:
        if f"{case}/{pixels}" in golden:
            grids = golden[f"{case}/{grid}"]
            ends = np.cumsum(grids.prod(axis=1))[:-1]
            frames[pad] = list(zip(np.split(golden[f"{case}/{pixels}"], ends), grids[:, None], strict=True))
    batches, i = [], 0
    while i < len(ids):
        if ids[i] in frames:
            batches.append(frames[int(ids[i])].pop(0))
            i += len(batches[-1][0]) // 4
        else:
            i += 1
    grids = np.array([grid[0] for _, grid in batches]).reshape(-1, 3)
    positions, delta = position_ids(ids, grids, image_token_id=image_id, video_token_id=video_id)
    np.testing.assert_array_equal(positions, golden[f"{case}/position_ids"])
    return GoldenPrompt(ids, positions, delta, batches)


def generate(engine: Engine, prompts: list[GoldenPrompt], new: int) -> list[list[int]]:
    """Greedy tokens of a batch of prompts."""
    rows: list[list[int]] = [[] for _ in prompts]
    executor, greedy = engine.executor(), [SamplingOptions()] * len(prompts)
    for step in executor.run(prompts, greedy, [new] * len(prompts), ()).steps:  # pyright: ignore[reportArgumentType]
        for row, tokens in zip(rows, step, strict=True):
            row += tokens
    return rows


class _Forbid:
    """An import hook that makes packages look as if they were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in _FORBIDDEN:
            raise ModuleNotFoundError(f"{name} is out of reach here", name=name)


def main() -> int:
    """Returns 0 if every token is the golden one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.portable", description=__doc__)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("golden", metavar="GOLDEN.npz", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    args = parser.parse_args()
    sys.meta_path.insert(0, _Forbid())  # pyright: ignore[reportArgumentType]
    begin = time.perf_counter()
    engine = Engine.load(args.bundle)
    settings = engine.processor.settings
    mode = _MODES[engine.bundle.indexer_dtype]
    with np.load(args.golden, allow_pickle=False) as arrays:
        golden = dict(arrays)
    prompts = [golden_prompt(golden, case, settings.image_token_id, settings.video_token_id) for case in CASES]
    expected = [golden[f"{case}/{mode}/decode_tokens"].tolist() for case in CASES]
    new = len(expected[0])
    alone = [generate(engine, [prompt], new)[0] for prompt in prompts]
    together = generate(engine, prompts, new)
    outcome = {
        **_versions(),
        "command": " ".join(["python -m benchmarks.portable", Path(args.bundle).name, args.golden.name]),
        "indexer_dtype": engine.bundle.indexer_dtype,
        "alone": {case: row == want for case, row, want in zip(CASES, alone, expected, strict=True)},
        "in_one_batch": {case: row == want for case, row, want in zip(CASES, together, expected, strict=True)},
        "imported": [name for name in _FORBIDDEN if name in sys.modules],
        "seconds": round(time.perf_counter() - begin, 2),
    }
    print(json.dumps(outcome, indent=1))
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0 if alone == expected == together and not outcome["imported"] else 1


def _versions() -> dict[str, str]:
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


if __name__ == "__main__":
    sys.exit(main())
