"""Conversion to 8-bit weights: the same guarantees as without, and the same weights as `KeyeVL.from_hf` has."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.__main__ import main
from convert.convert import convert
from examples.tiny_checkpoint import write_tiny_checkpoint
from keye_jax import KeyeVL
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import MANIFEST, write_manifest
from tests.convert.test_convert import SMALL, assert_equal_bundles, interrupted
from tests.shards import entry, read_array, read_tensors, write_file

each_format = pytest.mark.parametrize("weights", ["int8", "fp8"])
STORED = {"int8": "int8", "fp8": "float8_e4m3fn"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hf"), overrides=SMALL)


@pytest.fixture(scope="module")
def int8(checkpoint, tmp_path_factory) -> Path:
    return convert(checkpoint, tmp_path_factory.mktemp("whole") / "bundle", weights="int8").path


@each_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_line_makes_the_weights_that_the_library_loads(checkpoint, tmp_path, capsys, weights, dtype):
    arguments = [str(checkpoint), str(tmp_path / "bundle"), "--weights", weights, "--dtype", dtype, "--verify"]
    assert main(arguments) == 0
    assert f"{dtype}, {weights} weights, indexer fp8" in capsys.readouterr().err
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.weight_format, bundle.dtype) == (weights, dtype)
    assert {
        leaf for group in bundle.groups.values() for leaf, a in group.arrays.items() if a.dtype == STORED[weights]
    } == {
        "text.lm_head.values",
        *(f"text.layers.attn.{name}_proj.values" for name in "qkvo"),
        *(f"text.layers.moe.{name}_proj.values" for name in ("gate_up", "down")),
    }
    found, expected = bundle.load_params(), KeyeVL.from_hf(checkpoint, dtype=dtype, weights=weights).arrays()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, array), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert array.dtype == other.dtype, path
        assert np.asarray(array).tobytes() == np.asarray(other).tobytes(), path


def test_shapes_alone_say_the_format_too(checkpoint, int8, tmp_path):
    shapes = convert(checkpoint, tmp_path / "shapes", weights="int8", shapes_only=True)
    assert shapes.abstract_params() == Bundle.open(int8).abstract_params()


def test_an_interrupted_conversion_goes_on_to_the_same_bundle(checkpoint, int8, tmp_path, monkeypatch):
    interrupted(checkpoint, tmp_path / "bundle", monkeypatch, weights="int8")
    reports: list[str] = []
    convert(checkpoint, tmp_path / "bundle", weights="int8", report=lambda stage, done, total: reports.append(stage))
    assert reports[0].startswith("resuming, ")
    assert_equal_bundles(tmp_path / "bundle", int8)


def test_what_was_converted_to_another_format_is_neither_resumed_nor_overwritten(
    checkpoint, int8, tmp_path, monkeypatch
):
    interrupted(checkpoint, tmp_path / "bundle", monkeypatch, weights="fp8")
    convert(checkpoint, tmp_path / "bundle", weights="int8")
    assert_equal_bundles(tmp_path / "bundle", int8)
    with pytest.raises(InputError, match="other options"):
        convert(checkpoint, int8, weights="fp8")
    with pytest.raises(InputError, match="other options"):
        convert(checkpoint, int8)


@each_format
@pytest.mark.parametrize(("factor", "leaf"), [(2, "scale"), (-1, "values")])
def test_verification_finds_changed_weights(checkpoint, tmp_path, weights, factor, leaf):
    """Weights that were changed together with their checksum: twice the channel is twice the scale and the same values,
    the negative channel the same scale."""
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    tensors = read_tensors(changed)
    head = read_array(tensors, "lm_head.weight").copy()
    head[3] *= factor
    for path in changed.glob("model*"):
        path.unlink()
    write_file(changed / "model.safetensors", {**tensors, "lm_head.weight": entry(head)})
    honest = convert(checkpoint, tmp_path / "honest", weights=weights)
    forged = convert(changed, tmp_path / "forged", weights=weights)
    manifest = json.loads((forged.path / MANIFEST).read_text()) | {"source": honest.source}
    write_manifest(forged.path, manifest)
    with pytest.raises(InputError, match=rf"weights text\.lm_head\.{leaf} differ from the checkpoint"):
        convert(checkpoint, forged.path, weights=weights, verify=True)


def test_verification_finds_a_changed_byte(checkpoint, int8, tmp_path):
    bundle = Bundle.open(shutil.copytree(int8, tmp_path / "bundle"))
    experts = {name: file.bytes for name, file in bundle.files.items() if "layers.1.gate_up_proj/" in name}
    name = max(experts, key=experts.__getitem__)
    data = bytearray((bundle.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(InputError, match="differs from its sha256"):
        convert(checkpoint, bundle.path, weights="int8", verify=True)
