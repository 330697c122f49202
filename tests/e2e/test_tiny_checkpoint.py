"""The tiny checkpoint stands in for the published one in other tests: its layout has to be the published one."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from examples import tiny_checkpoint
from examples.tiny_checkpoint import tensor_shapes, tiny_config, write_tiny_checkpoint
from examples.tiny_tokenizer import CONTROL_TOKENS

PUBLISHED_SIZES = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "vocab_size": 151936,
    "sa_config": {"indexer_head_dim": 64, "indexer_num_heads": 16, "topk": 2048},
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
    },
}


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert start + end <= len(data)
        tensors[name] = (entry["dtype"], entry["shape"], data[start + begin : start + end])
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - start
    return tensors


def test_published_sizes_give_the_published_parameter_count(monkeypatch):
    monkeypatch.setattr(tiny_checkpoint, "PACKING_ROWS", 32768)
    shapes = tensor_shapes(tiny_config(PUBLISHED_SIZES))
    assert sum(math.prod(shape) for shape in shapes.values()) == 31_122_082_160


def test_published_sizes_give_the_published_shapes():
    shapes = tensor_shapes(tiny_config(PUBLISHED_SIZES))
    layer = "model.layers.47."
    expected = {
        "model.embed_tokens.weight": (151936, 2048),
        layer + "self_attn.q_proj.weight": (4096, 2048),
        layer + "self_attn.v_proj.weight": (512, 2048),
        layer + "self_attn.o_proj.weight": (2048, 4096),
        layer + "self_attn.sa_indexer.q_proj.weight": (1040, 2048),
        layer + "self_attn.sa_indexer.k_norm.bias": (64,),
        layer + "mlp.experts.gate_up_proj": (128, 2048, 1536),
        layer + "mlp.experts.down_proj": (128, 768, 2048),
        "visual.vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "visual.vision_model.embeddings.position_embedding.weight": (729, 1152),
        "visual.vision_model.encoder.layers.26.mlp.fc2.weight": (1152, 4304),
        "visual.vision_model.encoder.layers.26.mlp.fc2.bias": (1152,),
        "mlp_AR.pre_norm.weight": (4608,),
        "mlp_AR.linear_2.weight": (2048, 4608),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert f"{layer}mlp.shared_expert.gate_proj.weight" not in shapes


def test_shards_hold_every_tensor_once_and_match_the_index(tmp_path):
    write_tiny_checkpoint(tmp_path, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        for name, tensor in read_tensors(tmp_path / file).items():
            assert index["weight_map"][name] == file
            assert name not in found
            found[name] = tensor
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert {name: tuple(shape) for name, (_, shape, _) in found.items()} == tensor_shapes(tiny_config())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in found.values())


def test_bfloat16_rounds_the_float32_weights(tmp_path):
    import ml_dtypes

    write_tiny_checkpoint(tmp_path / "f", shards=1, with_tokenizer=False)
    write_tiny_checkpoint(tmp_path / "b", shards=1, with_tokenizer=False, dtype="bfloat16")
    full, half = (read_tensors(tmp_path / x / "model.safetensors") for x in "fb")
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, (kind, shape, data) in half.items():
        assert (kind, shape) == ("BF16", full[name][1])
        rounded = np.frombuffer(full[name][2], "<f4").astype(ml_dtypes.bfloat16)
        assert rounded.tobytes() == data


def test_same_seed_same_bytes_other_seed_other_weights(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny_checkpoint(tmp_path / folder, seed=seed)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    changed = {f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "c" / f).read_bytes()}
    assert changed == {f for f in files if f.endswith(".safetensors")}


def test_overrides_reach_config_and_shapes(tmp_path):
    overrides = {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "num_experts": 7,
        "head_dim": 64,
        "sa_config": {"topk": 5000},
    }
    write_tiny_checkpoint(tmp_path, overrides=overrides, shards=1, with_tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sa_config"] == tiny_checkpoint.TINY_CONFIG["sa_config"] | {"topk": 5000}
    assert config["rope_scaling"]["mrope_section"] == [8, 12, 12]
    tensors = read_tensors(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"][1] == [384, 128]
    assert tensors["model.layers.0.self_attn.k_proj.weight"][1] == [64, 128]
    assert tensors["model.layers.0.mlp.gate.weight"][1] == [7, 128]
    assert not (tmp_path / "tokenizer.json").exists()
    assert tiny_checkpoint.TINY_CONFIG["num_experts"] == 8


@pytest.mark.parametrize("overrides", [{"num_expert": 4}, {"sa_config": {"top_k": 3}}, {"vocab_size": 20}])
def test_wrong_overrides_are_named(tmp_path, overrides):
    with pytest.raises(ValueError, match=r"num_expert|top_k|20"):
        write_tiny_checkpoint(tmp_path / "x", overrides=overrides)


def test_tokenizer_and_config_agree_on_control_tokens(tmp_path):
    from tokenizers import Tokenizer

    write_tiny_checkpoint(tmp_path, overrides={"vocab_size": 600, "num_hidden_layers": 1})
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.token_to_id("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.token_to_id("<|video_pad|>") == config["video_token_id"]
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    added = tokenizer.get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == CONTROL_TOKENS
    assert max(added) < config["vocab_size"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [
        tokenizer.token_to_id("<|im_end|>"),
        tokenizer.token_to_id("<|endoftext|>"),
    ]
