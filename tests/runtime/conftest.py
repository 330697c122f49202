"""Bundles that the runtime's tests share: converting and compiling them once is most of their time."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.convert import convert
from examples.tiny_checkpoint import write_tiny_checkpoint
from runtime.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runtime's compilation cache, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
