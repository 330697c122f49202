"""config.json is read strictly: what cannot be run as it asks is refused, by name."""

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_jax.config import KeyeConfig, indexer_sections, read_config_json
from keye_jax.errors import ConfigError
from tests.shards import CHECKPOINT

RAW: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())
DELETE = object()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """RAW with dotted keys set, or removed where the value is DELETE."""
    raw = copy.deepcopy(RAW)
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = raw
        for section in sections:
            node = node[section]
        if value is DELETE:
            del node[name]
        else:
            node[name] = value
    return raw


def test_a_published_config_is_read_field_by_field():
    config = KeyeConfig.from_hf(CHECKPOINT)
    assert (config.text.num_hidden_layers, config.text.num_key_value_heads, config.text.head_dim) == (3, 2, 32)
    assert (config.text.rope_theta, config.text.mrope_section) == (8e6, (4, 6, 6))
    assert (config.sparse.indexer_num_heads, config.sparse.indexer_head_dim, config.sparse.topk) == (4, 16, 24)
    assert (config.vision.hidden_size, config.vision.table_side, config.vision.merged_dim) == (96, 4, 384)
    assert (config.image_token_id, config.video_token_id) == (502, 503)
    assert indexer_sections(config) == (2, 3, 3)


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "float32"])
def test_the_indexers_number_format_is_an_argument(dtype):
    assert KeyeConfig.from_hf(RAW, indexer_dtype=dtype).sparse.indexer_dtype == dtype


def test_the_indexer_multiplies_in_fp8_by_default():
    assert KeyeConfig.from_hf(RAW).sparse.indexer_dtype == "fp8"


REFUSED = {
    "unknown key": ({"router_temperature": 2}, "unknown key 'router_temperature'"),
    "unknown sparse key": ({"sa_config.block_size": 64}, "sa_config: unknown key 'block_size'"),
    "unknown vision key": ({"vision_config.window_size": 112}, "vision_config: unknown key 'window_size'"),
    "unknown rope key": ({"rope_scaling.factor": 4.0}, "rope_scaling: unknown key 'factor'"),
    "length scaling": ({"rope_scaling.type": "yarn"}, "type='yarn' is not supported"),
    "other model": ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe"),
    "dense sibling": ({"architectures": ["KeyeVL2ForConditionalGeneration"]}, "KeyeVL2ForConditionalGeneration"),
    "no model type": ({"model_type": DELETE}, "model_type=None"),
    "shared experts": ({"num_shared_experts": 1}, "num_shared_experts=1"),
    "dense layers": ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    "sparse step": ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    "tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "attention bias": ({"attention_bias": True}, "attention_bias=True"),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window=True"),
    "multi-token prediction": ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "vision activation": ({"vision_config.hidden_act": "quick_gelu"}, "vision_config: hidden_act='quick_gelu'"),
    "deepstack": ({"vision_config.deepstack_visual_indexes": [8, 16]}, "deepstack_visual_indexes"),
    "indexer key heads": ({"sa_config.indexer_num_kv_heads": 2}, "indexer_num_kv_heads=2"),
    "no rope_theta": ({"rope_theta": DELETE}, "no rope_theta"),
    "two rope_thetas": ({"rope_scaling.rope_theta": 1e6}, "contradicts itself about rope_theta"),
    "rope_theta a string": ({"rope_theta": "1e7"}, "rope_theta must be float"),
    "rope_theta too small": ({"rope_theta": 1}, "rope_theta=1.0"),
    "rope_theta NaN": ({"rope_theta": float("nan")}, "rope_theta=nan"),
    "rope_theta infinite": ({"rope_theta": float("inf")}, "rope_theta=inf"),
    "epsilon negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    "vision epsilon NaN": ({"vision_config.layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
    "no rope_scaling": ({"rope_scaling": DELETE}, "no rope_scaling"),
    "no mrope_section": ({"rope_scaling.mrope_section": DELETE}, "mrope_section must be"),
    "two sections": ({"rope_scaling.mrope_section": [8, 8]}, "mrope_section must be"),
    "sections of another head": ({"rope_scaling.mrope_section": [16, 24, 24]}, "half of head_dim=32"),
    "sections that do not scale": ({"rope_scaling.mrope_section": [5, 5, 6]}, "does not scale from head_dim=32"),
    "no head_dim": ({"head_dim": DELETE}, "no head_dim"),
    "missing size": ({"num_experts": DELETE}, "num_experts missing"),
    "missing token id": ({"image_token_id": DELETE}, "image_token_id missing"),
    "token id outside": ({"image_token_id": 512}, "image_token_id=512 is no token of vocab_size=512"),
    "token id negative": ({"video_token_id": -1}, "video_token_id=-1 is no token"),
    "same token ids": ({"video_token_id": 502}, "both 502"),
    "missing sparse section": ({"sa_config": DELETE}, "no object 'sa_config'"),
    "missing vision section": ({"vision_config": None}, "no object 'vision_config'"),
    "missing top-k": ({"sa_config.topk": DELETE}, "sa_config: topk missing"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be between"),
    "negative": ({"vision_config.image_size": -14}, "image_size=-14 must be between"),
    "absurd": ({"vocab_size": 10**12}, "vocab_size=1000000000000 must be between"),
    "float size": ({"hidden_size": 128.0}, "hidden_size must be int"),
    "bool size": ({"num_experts": True}, "num_experts must be int"),
    "string size": ({"vision_config.hidden_size": "96"}, "vision_config: hidden_size must be int"),
    "kv heads": ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
    "more chosen than experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds num_experts=8"),
    "index head no power of two": ({"sa_config.indexer_head_dim": 24}, "power of two"),
    "vision heads": ({"vision_config.num_attention_heads": 5}, "multiple of 4"),
    "image smaller than a patch": ({"vision_config.image_size": 13}, "smaller than patch_size"),
    "norm_topk_prob a number": ({"norm_topk_prob": 1}, "norm_topk_prob must be bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        KeyeConfig.from_hf(changed(changes))
    assert "\n" not in str(caught.value)


ACCEPTED = {
    "one key/value head": {"num_key_value_heads": 1},
    "experts no power of two": {"num_experts": 7},
    "top-k beyond any context": {"sa_config.topk": 1 << 20},
    "transformers bookkeeping": {
        "auto_map": {"AutoModel": "x.Y"},
        "transformers_version": "5.1.0",
        "dtype": "bfloat16",
    },
    "theta in rope_scaling": {"rope_theta": DELETE, "rope_scaling.rope_theta": 8e6},
    "theta twice the same": {"rope_scaling.rope_theta": 8000000},
    "theta in rope_parameters": {
        "rope_theta": DELETE,
        "rope_scaling": DELETE,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 8e6},
    },
    "nulls": {"sliding_window": None, "quantization_config": None, "mlp_only_layers": None, "norm_topk_prob": None},
    "table not a whole number of patches": {"vision_config.image_size": 69},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_variants_of_the_same_model_are_read(case):
    config = KeyeConfig.from_hf(changed(ACCEPTED[case]))
    assert config.text.rope_theta == 8e6
    assert config.text.norm_topk_prob
    assert config.vision.table_side == 4


def test_rotary_layouts_can_differ_between_decoder_and_indexer():
    config = KeyeConfig.from_hf(changed({"rope_scaling.mrope_interleaved": True, "sa_config.mrope_interleaved": False}))
    assert config.text.mrope_interleaved
    assert config.sparse.mrope_interleaved is False


@given(st.data())
def test_to_hf_round_trips(data):
    sizes = st.integers(1, 4096)
    width = data.draw(st.sampled_from([8, 16, 32, 64]))
    heads = data.draw(st.integers(1, 8))
    vision_heads = data.draw(st.integers(1, 16))
    text = {
        "vocab_size": data.draw(st.integers(2, 1 << 20)),
        "hidden_size": data.draw(sizes),
        "num_hidden_layers": data.draw(sizes),
        "num_key_value_heads": heads,
        "num_attention_heads": heads * data.draw(st.integers(1, 8)),
        "head_dim": 2 * width,
        "moe_intermediate_size": data.draw(sizes),
        "num_experts": data.draw(st.integers(8, 300)),
        "rms_norm_eps": data.draw(st.floats(1e-9, 1e-3)),
        "norm_topk_prob": data.draw(st.booleans()),
        "max_position_embeddings": data.draw(sizes),
        "rope_theta": data.draw(st.floats(2, 1e9)),
        "rope_scaling": {
            "mrope_section": [width // 4, width // 4, width // 2],
            "mrope_interleaved": data.draw(st.booleans()),
        },
        "image_token_id": 0,
        "video_token_id": 1,
        "sa_config.indexer_head_dim": width,
        "sa_config.topk": data.draw(sizes),
        "vision_config.num_attention_heads": vision_heads,
        "vision_config.hidden_size": 4 * vision_heads * data.draw(st.integers(1, 30)),
        "vision_config.image_size": data.draw(st.integers(14, 1000)),
    }
    config = KeyeConfig.from_hf(changed(text))
    assert KeyeConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@given(st.dictionaries(st.text(min_size=1), st.integers(), min_size=1))
def test_any_key_that_is_not_known_is_refused(extra):
    with pytest.raises(ConfigError, match="unknown key"):
        KeyeConfig.from_hf({**RAW, **{f"x_{key}": value for key, value in extra.items()}})


BROKEN_FILES = {
    "missing": (None, "does not exist"),
    "not JSON": (b"{", "cannot be read as JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON"),
    "nested": (b"[" * 200_000, "cannot be read as JSON"),
    "a list": (b"[1]", "not a JSON object"),
    "huge": (b" " * (5 << 20), "larger than 4 MiB"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path, case):
    content, message = BROKEN_FILES[case]
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config_json(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configs_are_values():
    config = KeyeConfig.from_hf(RAW)
    assert hash(config) == hash(KeyeConfig.from_hf(CHECKPOINT / "config.json"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.text.hidden_size = 1  # pyright: ignore[reportAttributeAccessIssue]
