"""The model's sizes, and its weights as a folder in the official Hugging Face layout."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from examples.tiny_checkpoint import CHAT_TURNS, tensor_shapes, tiny_config, write_tiny_checkpoint
from examples.train_tiny.vocabulary import write_vocabulary
from keye_jax.config import KeyeConfig
from keye_jax.hf_layout import expected_rows
from keye_jax.params import flatten

OVERRIDES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "intermediate_size": 768,
    # Frames that matter are seconds apart, hundreds of positions at most: the published 1e7 would waste the columns'
    # frequencies on differences that no clip has.
    "rope_theta": 10_000,
    "max_position_embeddings": 32768,
    "sa_config": {"indexer_head_dim": 32, "indexer_num_heads": 4, "topk": 128},
    "vision_config": {
        "hidden_size": 128,
        "image_size": 224,
        "intermediate_size": 320,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    },
    "vocab_size": 512,
}

# Like the published one, it opens the thinking for the model. Jinja drops a line break that ends a template, so the
# last line is written as a string.
CHAT_TEMPLATE = CHAT_TURNS + "{{ '<|im_start|>assistant\n<think>\n' }}"


def trained_config() -> dict[str, Any]:
    """The trained model's config.json."""
    return tiny_config({**OVERRIDES, "torch_dtype": "bfloat16"})


def write_untrained(folder: Path) -> KeyeConfig:
    """Writes everything but trained weights: config, tokenizer, template, preprocessing. Returns the configuration,
    with an indexer that gradients can pass."""
    write_tiny_checkpoint(folder, dtype="bfloat16", shards=1, overrides=OVERRIDES)
    config = trained_config()
    write_vocabulary(folder, config["vocab_size"])
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    generation = {**ids, "pad_token_id": ids["bos_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return KeyeConfig.from_hf(folder, indexer_dtype="bf16")


def hf_tensors(config: KeyeConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters under their published names and shapes, float32."""
    arrays = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params)}
    tensors = {}
    for name, row, layer in expected_rows(config, {}):
        parts = [view(arrays[path] if layer is None else arrays[path][layer]) for path, view in row.targets]
        tensors[name] = np.concatenate(parts)
    return tensors


def write_trained(folder: Path, config: KeyeConfig, params: Mapping[str, Any]) -> int:
    """Writes the whole checkpoint in bfloat16. Returns its size in bytes.

    Raises:
        ValueError: the parameters do not make exactly the tensors that the layout has.
    """
    write_untrained(folder)
    tensors = hf_tensors(config, params)
    shapes = tensor_shapes(trained_config())
    # The layout has one table that no forward pass reads.
    unread = shapes.keys() - tensors.keys()
    tensors |= {name: np.zeros(shapes[name], np.float32) for name in unread}
    wrong = [name for name in tensors if shapes.get(name) != tensors[name].shape]
    if wrong or len(unread) != 1:
        raise ValueError(f"parameters do not fit the layout: {wrong or sorted(unread)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in shapes:
        end = offset + 2 * tensors[name].size
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shapes:
            file.write(tensors[name].astype(ml_dtypes.bfloat16).tobytes())
    return sum(path.stat().st_size for path in folder.iterdir())
