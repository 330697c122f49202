"""The prompts of golden.npz as one batch."""

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig

CASES = ("text_short", "text_long", "image", "video", "two_images", "mixed")
MODES = ("fp8_off", "fp8_on")
KINDS = {"image": ("image",), "video": ("video",), "two_images": ("image",), "mixed": ("image", "video")}
"""Media of each case that has any."""
LENGTH = 112
"""Tokens of the longest prompt."""


def padded_batch(golden: dict[str, np.ndarray], config: KeyeConfig) -> dict[str, jax.Array]:
    """All cases, a row each, padded to LENGTH on the right.

    Returns:
        The fields of `graphs.Chunk`, and "delta" [6] int32, as in `graphs.DecodeState`.
    """
    rows = len(CASES)
    tokens, positions = np.zeros((rows, LENGTH), np.int32), np.zeros((3, rows, LENGTH), np.int32)
    vision_rows = np.zeros((rows, LENGTH, config.text.hidden_size), np.float32)
    valid, delta = np.zeros((2, rows), np.int32)
    for row, case in enumerate(CASES):
        T = len(golden[f"{case}/input_ids"])
        tokens[row, :T] = golden[f"{case}/input_ids"]
        positions[:, row, :T] = golden[f"{case}/position_ids"]
        valid[row], delta[row] = T, golden[f"{case}/position_ids"].max() + 1 - T
        for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
            if kind in KINDS.get(case, ()):
                vision_rows[row, tokens[row] == token] = golden[f"{case}/{kind}_tokens"]
    batch = {
        "tokens": tokens,
        "positions": positions,
        "vision_rows": vision_rows,
        "is_vision": (tokens == config.image_token_id) | (tokens == config.video_token_id),
        "valid": valid,
        "delta": delta,
    }
    return {name: jnp.asarray(array) for name, array in batch.items()}
