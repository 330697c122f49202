"""Write a tiny random-weight checkpoint in the published Keye-VL-2.0 layout.

    python -m examples.tiny_checkpoint DIR [--seed N] [--dtype float32|bfloat16] [--shards N] [--no-tokenizer]

The folder has the files of a real one (config.json, safetensors shards and their index, tokenizer.json,
tokenizer_config.json, generation_config.json, preprocessor_config.json) with the real tensor names, so
everything that reads a checkpoint can be tried in seconds. The weights are noise: so is any text it writes.
"""

import argparse
import copy
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny_tokenizer import control_token_ids, write_tokenizer

PACKING_ROWS = 64  # 32768 in the published checkpoint; no forward pass reads the table

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "model_type": "KeyeVL2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
    "rope_theta": 10_000_000,
    "router_aux_loss_coef": 0.001,
    "sa_config": {
        "indexer_head_dim": 16,
        "indexer_num_heads": 4,
        "indexer_num_kv_heads": 1,
        "kv_chunk_size": 512,
        "q_chunk_size": 512,
        "topk": 24,
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "image_size": 56,
        "intermediate_size": 160,
        "layer_norm_eps": 1e-6,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
    },
    "vocab_size": 512,
}

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def tiny_config(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a tiny checkpoint: `TINY_CONFIG`, `overrides`, and the ids of the control tokens.

    `overrides` replaces top-level values; `vision_config`, `sa_config` and `rope_scaling` are merged key by
    key. With another `head_dim` the rope sections follow in the published 2:3:3 ratio unless given too.
    Raises ValueError for a key that the published config does not have.
    """
    config = copy.deepcopy(TINY_CONFIG)
    overrides = dict(overrides or {})
    for key, value in overrides.items():
        if key not in config:
            raise ValueError(f"unknown config key {key!r} in overrides")
        if isinstance(config[key], dict):
            unknown = sorted(set(value) - set(config[key]) - {"mrope_interleaved"})
            if unknown:
                raise ValueError(f"unknown config keys {unknown} in overrides[{key!r}]")
            config[key].update(value)
        else:
            config[key] = value
    if "mrope_section" not in overrides.get("rope_scaling", {}):
        spatial = 3 * config["head_dim"] // 16
        config["rope_scaling"]["mrope_section"] = [config["head_dim"] // 2 - 2 * spatial, spatial, spatial]
    ids = control_token_ids(config["vocab_size"])
    return config | {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "fast_video_token_id": ids["<|fast_video_pad|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with this config, in file order."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _decoder_layer_shapes(config).items()}
    shapes["model.norm.weight"] = (config["hidden_size"],)
    shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    shapes |= _vision_shapes(config["vision_config"])
    width = config["vision_config"]["hidden_size"] * config["vision_config"]["spatial_merge_size"] ** 2
    return shapes | {
        "mlp_AR.pre_norm.weight": (width,),
        "mlp_AR.pre_norm.bias": (width,),
        "mlp_AR.linear_1.weight": (width, width),
        "mlp_AR.linear_1.bias": (width,),
        "mlp_AR.linear_2.weight": (config["hidden_size"], width),
        "mlp_AR.linear_2.bias": (config["hidden_size"],),
    }


def _decoder_layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    experts, width = config["num_experts"], config["moe_intermediate_size"]
    index_heads, index_dim = config["sa_config"]["indexer_num_heads"], config["sa_config"]["indexer_head_dim"]
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.sa_indexer.q_proj.weight": (index_heads * (index_dim + 1), hidden),
        "self_attn.sa_indexer.k_proj.weight": (index_dim, hidden),
        "self_attn.sa_indexer.q_norm.weight": (index_dim,),
        "self_attn.sa_indexer.k_norm.weight": (index_dim,),
        "self_attn.sa_indexer.k_norm.bias": (index_dim,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * width),
        "mlp.experts.down_proj": (experts, width, hidden),
    }


def _vision_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, width, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    prefix = "visual.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "embeddings.patch_embedding.weight": (hidden, vision["num_channels"], patch, patch),
        prefix + "embeddings.patch_embedding.bias": (hidden,),
        prefix + "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, hidden),
        prefix + "embeddings.packing_position_embedding.weight": (PACKING_ROWS, hidden),
    }
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkv"}
    linears |= {
        "self_attn.out_proj": (hidden, hidden),
        "mlp.fc1": (width, hidden),
        "mlp.fc2": (hidden, width),
    }
    for layer in range(vision["num_hidden_layers"]):
        block = f"{prefix}encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{norm}.weight": (hidden,), f"{block}{norm}.bias": (hidden,)}
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    return shapes | {prefix + f"post_layernorm.{kind}": (hidden,) for kind in ("weight", "bias")}


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 noise for one tensor; depends on the name and the seed only, not on the other tensors.

    Matrices have variance 1/fan-in so that activations keep their size from layer to layer and the output
    depends on the input; norm weights are near one, biases near zero.
    """
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith(".bias"):
        return noise * np.float32(0.05)
    if len(shape) == 1:
        return 1 + noise * np.float32(0.1)
    if "embed_tokens" in name or "position_embedding" in name:
        return noise
    # Routed experts are [expert, in, out]; linears [out, in]; the patch convolution [out, in, row, column].
    fan_in = shape[1] if ".experts." in name else int(np.prod(shape[1:]))
    return noise * np.float32(fan_in**-0.5)


def write_tiny_checkpoint(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 2,
    overrides: Mapping[str, Any] | None = None,
    with_tokenizer: bool = True,
    with_template: bool = False,
) -> Path:
    """Write the folder `path` (made if missing) and return it. The same arguments give the same bytes.

    `overrides` changes sizes, see `tiny_config`. `shards=1` writes one `model.safetensors` without an index.
    Without a tokenizer only config.json and the weights are written, as after a bare weight export. With a template
    the model answers at once; without one it is made to think first, as the published one does.
    Raises ValueError for an unknown dtype or config key, or a vocabulary too small for a tokenizer.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {sorted(_DTYPES)}")
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config({**(overrides or {}), "torch_dtype": dtype})
    _write_json(folder / "config.json", config)
    _write_weights(folder, tensor_shapes(config), seed, dtype, shards)
    if with_tokenizer:
        write_tokenizer(folder, config["vocab_size"])
        _write_processing_files(folder, config)
        if with_template:
            (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    return folder


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int, dtype: str, shards: int) -> None:
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", shapes, seed, dtype)
        return
    names = list(shapes)
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        total += _write_safetensors(folder / file, {name: shapes[name] for name in part}, seed, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str) -> int:
    """Write one file (u64 header length, JSON header padded to 8 bytes, raw data); return the data's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * (4 if dtype == "float32" else 2)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for data in _tensor_bytes(shapes, seed, dtype):
            file.write(data)
    return offset


def _tensor_bytes(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str) -> Iterator[bytes]:
    import ml_dtypes

    kind = np.dtype("<f4") if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)
    for name, shape in shapes.items():
        yield random_tensor(name, shape, seed).astype(kind).tobytes()


CHAT_TURNS = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
"""
"""The published template in short: the turns of a conversation, without what opens the answer."""
# Unlike the published model this one does not think first: random weights would never come to the answer.
_CHAT_TEMPLATE = CHAT_TURNS + "<|im_start|>assistant\n"


def _write_processing_files(folder: Path, config: Mapping[str, Any]) -> None:
    eos, pad = config["eos_token_id"], config["bos_token_id"]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "eos_token": "<|im_end|>",
            "model_max_length": config["max_position_embeddings"],
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": pad,
            "do_sample": True,
            "eos_token_id": [eos, pad],
            "pad_token_id": pad,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_pixels": 16_056_320,
            "merge_size": config["vision_config"]["spatial_merge_size"],
            "min_pixels": 3_136,
            "patch_size": config["vision_config"]["patch_size"],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": 1,
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_checkpoint",
        description="Write a tiny random-weight checkpoint in the published Keye-VL-2.0 layout.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights (default 0)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--shards", type=int, default=2, help="number of safetensors files (default 2)")
    parser.add_argument("--no-tokenizer", action="store_true", help="write config and weights only")
    args = parser.parse_args()
    folder = write_tiny_checkpoint(
        args.folder,
        seed=args.seed,
        dtype=args.dtype,
        shards=args.shards,
        with_tokenizer=not args.no_tokenizer,
        with_template=True,
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB of random weights; its answers are noise")


if __name__ == "__main__":
    main()
