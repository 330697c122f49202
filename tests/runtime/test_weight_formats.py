"""A bundle of 8-bit weights runs with no option: its graphs are the traced functions, and none made for other weights
passes for one of them."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import KeyeConfig
from keye_jax import graphs as eager
from runtime import compile_cache
from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.errors import InputError
from runtime.graphs import GraphKey
from runtime.programs import Programs
from tests.bundles import copy_without_graphs
from tests.runtime.test_programs import equal, tracer

NEW_TOKENS = 12


@pytest.mark.slow
def test_an_engine_answers_as_the_functions_do_and_says_the_format(
    golden_int8_bundle: Path, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The engine's tokens, from exported graphs, are those of the functions; cache and logits bit for bit."""
    compile_cache.enable()
    engine = Engine.load(copy_without_graphs(golden_int8_bundle, tmp_path / "bundle"))
    prompt = engine.prepare_token_ids(golden["text_short/input_ids"].tolist())
    generation = engine.generate_prompt(prompt, max_new_tokens=NEW_TOKENS)
    list(generation)
    result = generation.result
    assert (result.options["weights"], result.options["dtype"]) == ("int8", "float32")
    executor = engine.executor()
    prefill, decode = executor.programs.prefill(1, 64, 512), executor.programs.decode(1, 512)
    config, text = KeyeConfig.from_hf(engine.bundle.config, indexer_dtype="fp8"), executor._text
    assert text["lm_head"]["values"].dtype == jnp.int8

    tokens = np.asarray(prompt.token_ids)
    inputs = {name: np.zeros(array.shape, array.dtype) for name, array in prefill.args[3].items()}
    inputs["tokens"][0, : len(tokens)], inputs["valid"][:] = tokens, len(tokens)
    inputs["positions"][:, 0, : len(tokens)] = np.arange(len(tokens))
    state = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), decode.args[3])
    state["budget"], state["stop_ids"] = np.full(1, NEW_TOKENS, np.int32), np.full_like(state["stop_ids"], -1)

    def run(first: Any, then: Any) -> Any:
        cache, logits = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), prefill.args[1:3])
        cache, logits = first(text, cache, logits, inputs)
        after_prefill = jax.tree.map(np.asarray, (cache, logits))
        return after_prefill, then(text, cache, logits, state, np.int32(16))

    found = run(prefill, decode)
    equal(found, run(*(jax.jit(partial(f, config=config)) for f in (eager.prefill, eager.decode))))
    assert list(result.token_ids) == np.asarray(found[1][3])[0, : len(result.token_ids)].tolist()
    assert len(result.token_ids) == NEW_TOKENS or result.finish_reason == "stop"


@pytest.mark.parametrize("mine", ["none", "int8"])
def test_a_graph_made_for_weights_of_another_format_is_refused(
    golden_bundle: Path, golden_int8_bundle: Path, tmp_path: Path, mine: str
) -> None:
    key = GraphKey("decode", "cpu", 1, (1, 128))
    bundles = {"none": golden_bundle, "int8": golden_int8_bundle}
    bundle = Bundle.open(copy_without_graphs(bundles.pop(mine), tmp_path / "bundle"))
    (other,) = bundles.values()
    bundle.add_graph(key, tracer(Bundle.open(other)).export(key))
    with pytest.raises(InputError, match=r"was made for other weights.*python -m runtime\.export"):
        Programs(bundle).decode(1, 128)


def test_a_graph_made_for_int8_is_refused_where_weights_are_fp8(golden_int8_bundle: Path, tmp_path: Path) -> None:
    """Both have arrays of the same names and shapes."""
    key = GraphKey("decode", "cpu", 1, (1, 128))
    bundle = Bundle.open(copy_without_graphs(golden_int8_bundle, tmp_path / "bundle"))
    bundle.add_graph(key, tracer(dataclasses.replace(bundle, weight_format="fp8")).export(key))
    with pytest.raises(InputError, match=r"was made for other weights \(\['.*values'\] differs"):
        Programs(bundle).decode(1, 128)
