"""The published checkpoint's layout at full size, as sparse files: everything that happens before data is read."""

import shutil
from pathlib import Path

import pytest

import convert.convert as module
from benchmarks.conversion import write_checkpoint
from benchmarks.published import PACKING_TABLE, PARAMETERS
from convert.convert import convert
from keye_jax.checkpoint import group_bytes, open_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.params import storage_groups
from runtime.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "hf"
    assert write_checkpoint(folder, layers=48, random=False) == 2 * PARAMETERS == 62_244_164_320
    return folder


def test_thirteen_shards_hold_exactly_what_the_model_needs(checkpoint):
    assert len(list(checkpoint.glob("model-*-of-00013.safetensors"))) == 13
    config = KeyeConfig.from_hf(checkpoint)
    opened = open_checkpoint(checkpoint, config)
    used = {source.tensor.name: source.tensor for sources in opened.sources.values() for source in sources}
    assert sum(tensor.nbytes for tensor in used.values()) == 2 * (PARAMETERS - PACKING_TABLE)


def test_two_groups_of_arrays_take_less_than_half_of_four_gib(checkpoint):
    groups = storage_groups(KeyeConfig.from_hf(checkpoint)).values()
    largest = max(group_bytes(group, "bfloat16") for group in groups)
    assert largest == 128 * 2048 * 1536 * 2
    assert 2 * largest <= module._READ_BYTES <= 2 << 30


def test_a_disk_that_cannot_hold_it_is_refused_at_once(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=62_000_000_000))
    with pytest.raises(InputError, match=r"has 62\.0 GB free and the bundle needs 62\.2 GB more"):
        convert(checkpoint, tmp_path / "bundle")
