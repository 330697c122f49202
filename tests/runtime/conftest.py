"""Bundles that the runtime's tests share: converting and compiling them once is most of their time."""

from pathlib import Path

import jax
import pytest

from convert.convert import convert
from examples.tiny_checkpoint import write_tiny_checkpoint
from runtime.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every command compiles its programs anew; equal ones come from this cache from the second time on."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in float32; it has no tokenizer."""
    target = tmp_path_factory.mktemp("golden") / "bundle"
    convert(GOLDEN / "checkpoint", target, dtype="float32")
    return target


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder / "hf", seed=3)
    convert(folder / "hf", folder / "bundle", dtype="float32")
    return folder / "bundle"


@pytest.fixture(scope="session")
def golden_engine(golden_bundle: Path) -> Engine:
    return Engine.load(golden_bundle)


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Path) -> Engine:
    return Engine.load(tiny_bundle)
