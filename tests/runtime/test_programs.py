"""The programs of a bundle: exported graphs only, made on the spot where they are missing, and the same mathematics as
the functions they were traced from."""

import dataclasses
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import runtime.export
from convert.convert import convert
from examples.tiny_checkpoint import write_tiny_checkpoint
from keye_jax import KeyeConfig
from keye_jax import graphs as eager
from runtime import buckets, compile_cache, graphs
from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.errors import InputError
from runtime.graphs import GraphKey
from runtime.programs import Program, Programs
from tests.bundles import copy_without_graphs
from tests.keye_jax.golden_prompts import CASES, LENGTH
from tests.runtime.test_executor import generate, golden_prompt

Golden = dict[str, np.ndarray]
VISION = GraphKey("vision", "cpu", 1, (256,))


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> None:
    """These tests compile the same graphs over and over; the session's cache remembers them."""
    compile_cache.enable()


@pytest.fixture
def bare(golden_bundle: Path, tmp_path: Path) -> Path:
    """A bundle without graphs."""
    return copy_without_graphs(golden_bundle, tmp_path / "bare")


@pytest.fixture
def said() -> list[str]:
    return []


@contextmanager
def counted(name: str) -> Iterator[Counter[str]]:
    """Counts JAX's own events whose names hold `name`."""
    events: Counter[str] = Counter()

    def listen(event: str, *args: Any, **kwargs: Any) -> None:
        if name in event:
            events[event] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_missing_graph_is_exported_said_stored_and_never_exported_again(bare: Path, said: list[str]) -> None:
    lines = [f"exporting {VISION.name}, which the bundle lacks", f"compiling {VISION.name}"]
    programs = Programs(Bundle.open(bare), said.append)
    program = programs.vision(256)
    assert said == lines
    assert programs.vision(256) is program
    assert said == lines
    assert set(Bundle.open(bare).graphs) == {VISION}
    said.clear()
    Programs(Bundle.open(bare), said.append).vision(256)
    assert said == [f"compiling {VISION.name}"]


def test_a_graph_with_the_sizes_of_another_chip_is_made_anew(bare: Path, said: list[str]) -> None:
    bundle = Bundle.open(bare)
    bundle.add_graph(VISION, tracer(bundle).export(VISION), device_kind="TPU v5 lite")
    Programs(Bundle.open(bare), said.append).vision(256)
    assert said == [f"exporting {VISION.name}, which the bundle lacks for this chip", f"compiling {VISION.name}"]
    assert Bundle.open(bare).graphs[VISION].device_kind == "any"


def test_a_bundle_that_cannot_be_written_keeps_the_graph_in_memory_and_says_so(
    bare: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because the superuser writes in spite of permissions."""

    def read_only(*args: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("runtime.bundle.write_file", read_only)
    before = sorted(path.name for path in bare.rglob("*") if path.is_file())
    programs = Programs(Bundle.open(bare), said.append)
    programs.vision(256)
    programs.vision(256)
    assert said == [
        f"exporting {VISION.name}, which the bundle lacks",
        f"keeping {VISION.name} for this run only: the bundle cannot be written (Read-only file system)",
        f"compiling {VISION.name}",
    ]
    after = sorted(path.name for path in bare.rglob("*") if path.is_file() and path.name != ".lock")
    assert after == before


def test_graph_files_that_the_manifest_does_not_list_are_never_loaded(
    bare: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Path(shutil.copytree(bare, tmp_path / "stored"))
    Programs(Bundle.open(stored)).vision(256)
    shutil.copytree(stored / graphs.FOLDER, bare / graphs.FOLDER)
    assert Bundle.open(bare).graphs == {}
    monkeypatch.setattr(export, "deserialize", None)  # calling it would be a TypeError
    Programs(Bundle.open(bare), said.append).vision(256)
    assert said[0] == f"exporting {VISION.name}, which the bundle lacks"


def test_where_nothing_can_be_exported_the_error_says_what_to_run(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "runtime.trace", None)
    with pytest.raises(InputError) as caught:
        Programs(Bundle.open(bare)).decode(1, 512)
    assert "the bundle has no graph decode-cpu-d1-batch1-context512" in str(caught.value)
    assert str(caught.value).endswith(f"run: python -m runtime.export {bare} --platform cpu --context 512 --batch 1")


def test_a_configuration_that_the_model_refuses_is_one_line(bare: Path) -> None:
    bundle = Bundle.open(bare)
    bundle = dataclasses.replace(bundle, config={**bundle.config, "hidden_act": "relu"})
    with pytest.raises(InputError, match=r"lacks graph vision.*hidden_act") as caught:
        Programs(bundle).vision(256)
    assert "\n" not in str(caught.value)


def follow(error: str) -> None:
    """Runs the command that ends an error message, in this process."""
    command = shlex.split(error[error.index("python -m runtime.export ") :])
    assert runtime.export.main(command[3:]) == 0


def test_the_command_in_the_error_mends_a_damaged_graph(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MAX_PATCHES", 256)
    Programs(Bundle.open(bare)).vision(256)
    (bare / Bundle.open(bare).graphs[VISION].file).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        Programs(Bundle.open(bare)).vision(256)
    follow(str(caught.value))
    assert Programs(Bundle.open(bare)).vision(256).key == VISION


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [{"num_hidden_layers": 2}, {"vision_config": {"hidden_size": 48}}], ids=["text", "vision"]
)
def test_a_graph_traced_for_other_weights_is_refused_and_can_be_made_again(
    golden_bundle: Path, tmp_path: Path, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "MAX_PATCHES", 256)
    write_tiny_checkpoint(tmp_path / "hf", overrides={"max_position_embeddings": 300, **overrides}, shards=1)
    other = convert(tmp_path / "hf", tmp_path / "other", dtype="float32")
    mine = Bundle.open(golden_bundle)
    key = VISION if "vision_config" in overrides else GraphKey("decode", "cpu", 1, (1, 384))
    other.add_graph(key, tracer(mine).export(key))

    def get(bundle: Bundle) -> Program:
        programs = Programs(bundle)
        return programs.vision(256) if key is VISION else programs.decode(1, 384)

    with pytest.raises(
        InputError, match=r"was made for other weights \(\['.*'\] differs from the bundle's\)"
    ) as caught:
        get(other)
    follow(str(caught.value))
    assert get(Bundle.open(other.path)).key == key


def tracer(bundle: Bundle) -> Any:
    from runtime.trace import Tracer

    return Tracer.of(bundle)


@pytest.fixture(scope="module")
def model(golden_engine: Engine) -> tuple[Programs, dict[str, Any], KeyeConfig]:
    executor, bundle = golden_engine.executor(), golden_engine.bundle
    config = KeyeConfig.from_hf(bundle.config, indexer_dtype="fp8")
    return executor.programs, {"text": executor._text, **executor._vision}, config


def equal(found: Any, expected: Any) -> None:
    """Bit for bit: the graph and the function are the same operations, and XLA compiles them alike."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def test_vision_gives_what_the_function_gives(golden: Golden, model: tuple[Programs, Any, KeyeConfig]) -> None:
    programs, params, config = model
    patches, grid = golden["mixed/pixel_values"], golden["mixed/image_grid_thw"]
    padded, grids = np.zeros((256, *patches.shape[1:]), np.float32), np.zeros((64, 3), np.int32)
    padded[: len(patches)], grids[: len(grid)] = patches, grid
    vision = {name: params[name] for name in ("vision", "projector")}
    expected = jax.jit(partial(eager.vision, config=config))(vision, padded, grids)
    found = programs.vision(256)(vision, padded, grids)
    equal(found, expected)
    np.testing.assert_allclose(found[: len(patches) // 4], golden["mixed/image_tokens"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_prefill_and_decode_give_what_the_functions_give(
    golden_batch: dict[str, Any], golden: Golden, model: tuple[Programs, Any, KeyeConfig]
) -> None:
    programs, params, config = model
    rows, chunk, context = len(CASES), 512, 512
    prefill, decode = programs.prefill(rows, chunk, context), programs.decode(rows, context)
    inputs = {name: np.zeros(array.shape, array.dtype) for name, array in prefill.args[3].items()}
    for name in ("tokens", "vision_rows", "is_vision"):
        inputs[name][:, :LENGTH] = golden_batch[name]
    inputs["positions"][:, :, :LENGTH] = golden_batch["positions"]
    inputs["valid"][:] = golden_batch["valid"]
    state = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), decode.args[3])
    state["delta"], state["budget"] = np.asarray(golden_batch["delta"]), np.full(rows, 99, np.int32)
    state["stop_ids"] = np.full_like(state["stop_ids"], -1)

    def run(first: Callable[..., Any], then: Callable[..., Any]) -> Any:
        cache, logits = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), prefill.args[1:3])
        cache, logits = first(params["text"], cache, logits, inputs)
        after_prefill = jax.tree.map(np.asarray, (cache, logits))
        return after_prefill, then(params["text"], cache, logits, state, np.int32(16))

    found = run(prefill, decode)
    equal(found, run(*(jax.jit(partial(f, config=config)) for f in (eager.prefill, eager.decode))))
    for case, tokens in zip(CASES, np.asarray(found[1][3]), strict=True):
        assert tokens.tolist() == golden[f"{case}/fp8_on/decode_tokens"].tolist()


def test_the_cache_is_updated_in_place(model: tuple[Programs, Any, KeyeConfig]) -> None:
    programs, _, _ = model
    for program in (programs.prefill(6, 512, 512), programs.decode(6, 512)):
        carried = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.args[1:3]))
        assert program.memory.aliased >= carried
        assert program.memory.results < carried + (1 << 20)


def test_answering_neither_traces_nor_compiles_once_the_programs_are_there(
    golden: Golden, golden_engine: Engine
) -> None:
    executor = golden_engine.executor()
    prompts = [golden_prompt(golden, case) for case in CASES]
    generate(executor, prompts)
    with counted("/jax/core/compile/") as events:
        generate(executor, prompts, new=[5, 9, 16, 1, 2, 3])
        assert events == {}
        jax.jit(lambda x: x * 3 + 1)(np.arange(3))
    assert {name.rsplit("/", 1)[1] for name in events} >= {"jaxpr_trace_duration", "backend_compile_duration"}


def test_prefill_takes_the_chunk_length_that_the_bundle_has_graphs_for(golden_bundle: Path) -> None:
    def choose(prompt_tokens: int, *exported: int) -> int:
        entry: Any = None  # nothing but the keys is read
        keys = [GraphKey("prefill", "cpu", 1, (1, chunk, 2048)) for chunk in exported]
        keys += [GraphKey("prefill", "cpu", 1, (2, 33, 2048)), GraphKey("prefill", "tpu", 1, (1, 34, 2048))]
        bundle = dataclasses.replace(Bundle.open(golden_bundle), graphs=dict.fromkeys(keys, entry))
        return Programs(bundle).chunk(1, 2048, prompt_tokens)

    assert [choose(20), choose(65), choose(2000)] == [64, 512, 512]
    assert [choose(20, 128), choose(2000, 128)] == [128, 128]
    assert [choose(300, 512, 1024), choose(600, 512, 1024), choose(2000, 512, 1024)] == [512, 1024, 1024]
    assert [choose(20, 512), choose(20, 64, 512)] == [512, 64]
    # A short prompt that came first does not make every later prefill slow.
    assert choose(300, 64) == 512
