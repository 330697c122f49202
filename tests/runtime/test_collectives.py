"""What a model spread over several devices communicates: activations, and in prefill a layer's index keys. No weights
and no other part of the cache, by the text of the compiled programs."""

import math
from collections import Counter
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from examples.tiny_checkpoint import tiny_config
from keye_jax.config import KeyeConfig
from runtime.aot import Collective, collectives
from runtime.graphs import DONATED, GraphKey, arguments
from runtime.trace import Tracer

DEVICES, CONTEXT, CHUNK, LAYERS = 8, 4096, 8, 2
# Large enough that each device's share of each weight that is spread, and of a layer's cache, exceeds every activation.
CONFIG = tiny_config(
    {
        "hidden_size": 256,
        "num_attention_heads": 16,
        "num_experts": 16,
        "moe_intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "vocab_size": 2048,
        "sa_config": {"indexer_head_dim": 32},
    }
)
KEYS = CONTEXT * CONFIG["sa_config"]["indexer_head_dim"] * 4
"""Bytes of the index keys of one layer, of all devices."""


@cache
def compiled(program: str, preset: str) -> tuple[list[Collective], int]:
    """The communication of a graph over eight devices, and the bytes that one device holds of the smallest array that
    is spread: of one layer, where it has layers."""
    shape = (1, CHUNK, CONTEXT) if program == "prefill" else (1, CONTEXT)
    key = GraphKey(program, "cpu", DEVICES, shape, preset=preset)
    exported = Tracer(CONFIG, "float32", "float32", "none").export(key)
    args = arguments(exported)
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("model",))
    places = jax.tree.unflatten(exported.in_tree, exported.in_shardings_jax(mesh))[0]
    shares = []
    for (path, leaf), place in zip(jax.tree.leaves_with_path(args[:2]), jax.tree.leaves(places[:2]), strict=True):
        local = place.shard_shape(leaf.shape)
        if local != leaf.shape:
            stacked = "layers" in jax.tree_util.keystr(path) or path[0].idx == 1
            shares.append(math.prod(local[1:] if stacked else local) * leaf.dtype.itemsize)
    run = jax.jit(exported.call, in_shardings=places, donate_argnums=DONATED[program])
    # Which operations there are is not for the code generator to say; without its optimisations it is faster.
    options: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    text = run.lower(*args).compile(compiler_options=options).as_text()
    return collectives(text or ""), min(shares)


@pytest.mark.slow
def test_the_model_here_can_tell_weights_and_caches_from_activations() -> None:
    config = KeyeConfig.from_hf(CONFIG, indexer_dtype="float32").text
    for preset in ("context", "expert"):
        _, share = compiled("decode", preset)
        q = CHUNK * config.num_attention_heads * config.head_dim * 4
        assert share > max(q, CHUNK * config.hidden_size * 4, 32 * 1024), "histograms of 1,024 counts of eight devices"
    assert compiled("prefill", "context")[1] < KEYS


@pytest.mark.parametrize("preset", ["context", "expert"])
def test_decode_moves_no_weights_and_no_cache(preset: str) -> None:
    found, share = compiled("decode", preset)
    assert found
    assert [one for one in found if one.bytes >= share] == []


@pytest.mark.parametrize("preset", ["context", "expert"])
def test_prefill_moves_a_layers_index_keys_and_nothing_else_of_that_size(preset: str) -> None:
    found, share = compiled("prefill", preset)
    large = [one for one in found if one.bytes >= share]
    assert large == ([Collective("all-gather", KEYS)] if preset == "context" else [])


@pytest.mark.parametrize(
    ("program", "preset", "layer"),
    [
        # Queries; two sums and a gather of histograms; partial attention; sums of the output and of the experts.
        ("decode", "context", {"all-gather": 2, "all-reduce": 4, "all-to-all": 1}),
        # Queries and index keys; selection and partial attention; sums of the output and of the experts.
        ("prefill", "context", {"all-gather": 2, "all-reduce": 2, "all-to-all": 2}),
        ("decode", "expert", {"all-reduce": 1}),
        ("prefill", "expert", {"all-reduce": 1}),
    ],
)
def test_a_layer_communicates_so_often(program: str, preset: str, layer: dict[str, int]) -> None:
    """Beside them a step sums its embeddings and gathers its logits. Prefill's layers stand in the text once."""
    times = LAYERS if program == "decode" else 1
    expected = Counter({kind: times * count for kind, count in layer.items()})
    expected.update({"all-reduce": 1, "all-gather": 1})
    assert Counter(one.kind for one in compiled(program, preset)[0]) == expected
