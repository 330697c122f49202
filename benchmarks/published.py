"""The published Keye-VL-2.0-30B-A3B as a config.json, for benchmarks that need its shapes and not its weights.

    python -m benchmarks.published DIR

writes DIR/config.json; `python -m convert DIR BUNDLE --shapes-only` makes of it a bundle that can be exported and
compiled for any platform.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PARAMETERS = 31_122_082_160
"""Of the checkpoint, which holds a table of 32768 x 1152 that no forward pass reads."""

PACKING_TABLE = 32768 * 1152

CONFIG: dict[str, Any] = {
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "model_type": "KeyeVL2",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "rope_theta": 10_000_000,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    "sa_config": {
        "indexer_head_dim": 64,
        "indexer_num_heads": 16,
        "indexer_num_kv_heads": 1,
        "kv_chunk_size": 512,
        "q_chunk_size": 512,
        "topk": 2048,
    },
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
        "patch_size": 14,
        "num_channels": 3,
        "spatial_merge_size": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "fast_video_token_id": 151678,
}


def write_published_config(folder: Path) -> Path:
    """Writes `folder`/config.json, making the folder if it is missing, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published", description="Write the published model's config.json."
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    print(write_published_config(parser.parse_args().folder) / "config.json")


if __name__ == "__main__":
    main()
