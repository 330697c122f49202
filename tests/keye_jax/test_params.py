"""The declaration of parameters agrees with the published model and with itself."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_jax.config import KeyeConfig
from keye_jax.params import (
    ParamSpec,
    abstract_params,
    count_params,
    flatten,
    init_params,
    param_specs,
    storage_groups,
    unflatten,
)
from tests.keye_jax.tiny import TINY

PUBLISHED = {
    "model_type": "KeyeVL2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "rope_theta": 1e7,
    "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]},
    "sa_config": {"indexer_num_heads": 16, "indexer_head_dim": 64, "indexer_num_kv_heads": 1, "topk": 2048},
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
    },
    "image_token_id": 151655,
    "video_token_id": 151656,
}


@pytest.fixture(scope="module")
def published() -> KeyeConfig:
    return KeyeConfig.from_hf(PUBLISHED)


def test_published_sizes_give_the_published_parameter_count(published):
    packing_table = 32768 * published.vision.hidden_size
    assert count_params(published) + packing_table == 31_122_082_160


@pytest.mark.parametrize(
    ("part", "count"),
    [
        (("text", "embed_tokens"), 311_164_928),
        (("text", "layers", "attn"), 48 * 18_874_624),
        (("text", "layers", "indexer"), 108_536_832),
        (("text", "layers", "moe"), 48 * 604_241_920),
        (("vision",), 412_987_248),
        (("projector",), 30_686_720),
    ],
)
def test_each_block_has_its_published_count(published, part, count):
    specs = flatten(param_specs(published))
    assert sum(int(np.prod(s.shape)) for path, s in specs if path[: len(part)] == part) == count


def test_storage_groups_hold_every_weight_exactly_once(published):
    for config in (TINY, published):
        stored: dict[tuple[str, ...], list[tuple[int | None, tuple[int, ...]]]] = {}
        for group in storage_groups(config).values():
            for path, spec in group.specs.items():
                stored.setdefault(path, []).append((group.layer, spec.shape))
        specs = dict(flatten(param_specs(config)))
        assert stored.keys() == specs.keys()
        for path, spec in specs.items():
            layers = [(i, spec.shape[1:]) for i in range(spec.shape[0])] if spec.stacked else [(None, spec.shape)]
            assert sorted(stored[path], key=str) == sorted(layers, key=str), path


def test_no_storage_group_is_larger_than_conversion_can_hold(published):
    largest = max(
        sum(spec.nbytes("bfloat16") for spec in group.specs.values()) for group in storage_groups(published).values()
    )
    assert largest <= 128 * 2048 * 1536 * 2


def test_random_weights_have_the_declared_shapes_and_dtypes():
    for dtype in ("float32", "bfloat16"):
        made = jax.eval_shape(partial(init_params, TINY, dtype=dtype), jax.random.key(0))
        declared = abstract_params(TINY, dtype)
        assert jax.tree.structure(made) == jax.tree.structure(declared)
        for array, struct in zip(jax.tree.leaves(made), jax.tree.leaves(declared), strict=True):
            assert (array.shape, array.dtype) == (struct.shape, struct.dtype)


@pytest.mark.slow
def test_random_weights_follow_their_declared_distribution():
    made = jax.jit(lambda key: init_params(TINY, key))(jax.random.key(0))
    specs = dict(flatten(param_specs(TINY)))
    for path, array in flatten(made):
        if specs[path].init == "normal":
            assert 0.015 < float(np.std(array)) < 0.025, path
        else:
            assert np.unique(array) == (1 if specs[path].init == "ones" else 0), path


def test_a_spec_names_an_axis_for_every_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((2, 3), ("embed",))


def test_the_indexers_key_norm_is_float32_in_any_model():
    indexer = param_specs(TINY)["text"]["layers"]["indexer"]
    assert {name for name, spec in indexer.items() if spec.as_dtype("bfloat16") == "float32"} == {
        "k_norm",
        "k_norm_bias",
    }
    other = dataclasses.replace(indexer["q_norm"])
    assert other.as_dtype("bfloat16") == "bfloat16"


TREES = st.recursive(
    st.integers(), lambda child: st.dictionaries(st.sampled_from("abc"), child, min_size=1), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@given(TREES)
def test_unflatten_inverts_flatten(tree):
    assert unflatten(dict(flatten(tree))) == tree
