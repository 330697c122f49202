"""What every test folder shares: the golden data, bundles (making and compiling them once is most of the time), and how
hypothesis runs."""

import dataclasses
import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from runtime.engine import Engine

# The same examples on every machine and no time limit per example: the first one of a shape compiles.
settings.register_profile("keye", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("keye")

# A shell that starts the tests in the background has them, and so the programs that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiling is most of the time of a run. Without optimisation and by XLA's older emitters it takes a sixth of that;
# kernels must equal their references and the model the golden values either way. Child processes inherit this. The
# optimising compiler works in tests that use `optimising_compiler`, and in the quick run: newer JAX does not know the
# second flag.
GIVEN_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
if jax.__version_info__ < (0, 11):
    hasty = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{GIVEN_XLA_FLAGS} {hasty}".strip()

# Tracing makes millions of objects, nearly none of them garbage: looking for it at Python's own rate takes a tenth.
gc.set_threshold(20_000, 20, 50)

# Meshes for the tests of sharding; everything else runs on the first one.
jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def optimising_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that start programs as a user does, or under another JAX, which may refuse the flags: those programs
    are compiled as the user's would be."""
    monkeypatch.setenv("XLA_FLAGS", GIVEN_XLA_FLAGS)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Every array of golden.npz by name."""
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def margins() -> dict[str, Any]:
    """margins.json: how far rounding is from changing a choice."""
    return json.loads((GOLDEN / "margins.json").read_text())


@pytest.fixture(scope="session")
def golden_params() -> dict[str, Any]:
    """The golden checkpoint's weights in float32."""
    from keye_jax import KeyeVL

    return KeyeVL.from_hf(GOLDEN / "checkpoint", dtype="float32").arrays()


@pytest.fixture(scope="session")
def golden_configs() -> dict[str, Any]:
    """Its configuration by golden.npz's mode names."""
    from keye_jax import KeyeConfig

    config = KeyeConfig.from_hf(GOLDEN / "checkpoint", indexer_dtype="float32")
    quantised = dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, indexer_dtype="fp8"))
    return {"fp8_off": config, "fp8_on": quantised}


@pytest.fixture(scope="session")
def golden_batch(golden: dict[str, np.ndarray], golden_configs: dict[str, Any]) -> dict[str, Any]:
    """The golden prompts as one padded batch; see `padded_batch`."""
    from tests.keye_jax.golden_prompts import padded_batch

    return padded_batch(golden, golden_configs["fp8_off"])


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runtime's compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in float32; it has no tokenizer."""
    from convert.convert import convert

    target = tmp_path_factory.mktemp("golden") / "bundle"
    convert(GOLDEN / "checkpoint", target, dtype="float32")
    return target


@pytest.fixture(scope="session")
def golden_int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in float32 with int8 weights."""
    from convert.convert import convert

    target = tmp_path_factory.mktemp("golden_int8") / "bundle"
    convert(GOLDEN / "checkpoint", target, dtype="float32", weights="int8")
    return target


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a tokenizer. One layer, unlike the golden bundle: its programs compile in half the time."""
    from convert.convert import convert
    from examples.tiny_checkpoint import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    one_layer = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}}
    write_tiny_checkpoint(folder / "hf", seed=3, overrides=one_layer)
    convert(folder / "hf", folder / "bundle", dtype="float32")
    return folder / "bundle"


@pytest.fixture(scope="session")
def golden_engine(golden_bundle: Path) -> "Engine":
    from runtime.engine import Engine

    return Engine.load(golden_bundle)


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Path) -> "Engine":
    from runtime.engine import Engine

    return Engine.load(tiny_bundle)
