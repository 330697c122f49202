"""A bundle opens only if it is complete and unaltered, and gives back exactly the weights it was made of."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.convert import convert
from examples.tiny_checkpoint import write_tiny_checkpoint
from keye_jax.checkpoint import load_params
from keye_jax.config import KeyeConfig
from runtime import bundle as bundle_module
from runtime import weights
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import JOURNAL, MANIFEST, VERSION, write_manifest
from tests.bundles import read_group

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "moe_intermediate_size": 8,
    "num_experts": 3,
    "sa_config": {"indexer_head_dim": 16, "indexer_num_heads": 2, "topk": 4},
    "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hf"), overrides={**SMALL, "vocab_size": 512})


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory) -> Path:
    """A float32 bundle; tests that alter it work on a copy."""
    folder = tmp_path_factory.mktemp("bundles") / "a bundle, with ünusual (name)%20"
    convert(checkpoint, folder, dtype="float32", indexer_dtype="bf16")
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    write_manifest(root, manifest)


def weight_file(root: Path) -> str:
    """The largest file of the weights."""
    files = json.loads((root / MANIFEST).read_text())["files"]
    return max((file for file in files if file["path"].startswith("weights/")), key=lambda f: f["bytes"])["path"]


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, array in jax.tree.leaves_with_path(expected):
        other = found
        for key in path:
            other = other[key.key]
        assert (other.dtype, isinstance(other, jax.Array)) == (array.dtype, True)
        np.testing.assert_array_equal(np.asarray(other), np.asarray(array), err_msg=str(path))


def test_the_manifest_is_what_the_bundle_was_made_of(made, checkpoint):
    bundle = Bundle.open(made)
    assert KeyeConfig.from_hf(bundle.config) == KeyeConfig.from_hf(checkpoint)
    assert (bundle.dtype, bundle.indexer_dtype) == ("float32", "bf16")
    assert bundle.tokenizer_path is not None
    assert bundle.tokenizer_path.read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert bundle.processor_settings["image_token_id"] == bundle.config["image_token_id"]
    bundle.verify()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_checkpoint(checkpoint, tmp_path, dtype):
    convert(checkpoint, tmp_path / "bundle", dtype=dtype)
    config = KeyeConfig.from_hf(checkpoint)
    assert_same(Bundle.open(tmp_path / "bundle").load_params(), load_params(checkpoint, config, dtype))


def test_large_stacks_grow_on_the_device_with_the_same_values(made, monkeypatch):
    whole = Bundle.open(made).load_params()
    monkeypatch.setattr(weights, "_HOST_BYTES", 10_000)
    assert_same(Bundle.open(made).load_params(), whole)


def test_orbax_restores_the_same_arrays(made):
    """The store is an ordinary Orbax checkpoint: other programs can read it."""
    import orbax.checkpoint as ocp

    bundle = Bundle.open(made)
    for name in ("text.layers.1", "text.layers.0.gate_up_proj", "vision.layers.0", "projector.linear_1"):
        folder = bundle_module.group_folder(made.resolve(), name)
        restored = jax.tree.leaves_with_path(ocp.PyTreeCheckpointer().restore(folder))
        arrays = {".".join(key.key for key in path): np.asarray(array) for path, array in restored}
        expected = read_group(bundle, name)
        assert arrays.keys() == expected.keys()
        for leaf, array in expected.items():
            np.testing.assert_array_equal(arrays[leaf], array)


def test_progress_counts_up_to_the_total(made):
    for call in (Bundle.open(made).load_params, Bundle.open(made).verify):
        seen: list[tuple[int, int]] = []
        call(progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1] > 0


def test_opening_needs_no_jax_and_loading_needs_no_model_library(made):
    program = (
        "import sys; from runtime.bundle import Bundle; b = Bundle.open(sys.argv[1])\n"
        "assert 'jax' not in sys.modules\n"
        "b.load_params()\n"
        "assert not {'flax', 'orbax', 'keye_jax', 'convert', 'torch'} & set(sys.modules)"
    )
    root = Path(bundle_module.__file__).parent.parent
    subprocess.run([sys.executable, "-c", program, made], cwd=root, check=True)


def test_a_bundle_moves_and_may_be_reached_through_a_link(made, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    (tmp_path / "link").symlink_to(moved)
    assert_same(Bundle.open(tmp_path / "link").load_params(), Bundle.open(made).load_params())


def first_file(manifest: dict[str, Any], **values: Any) -> None:
    manifest["files"][0].update(values)


def array_of(manifest: dict[str, Any], group: str = "text.norm") -> dict[str, Any]:
    return next(iter(manifest["weights"][group]["arrays"].values()))


def add_file(manifest: dict[str, Any], path: str) -> None:
    manifest["files"].append({"path": path, "bytes": 0, "sha256": "0" * 64})


FORGED = {
    "other format": (lambda m: m.update(format="zip"), "not the manifest of a keye-jax bundle"),
    "newer version": (lambda m: m.update(version=VERSION + 1), f"version {VERSION + 1}, newer than {VERSION}; upgrade"),
    "version a string": (lambda m: m.update(version="1"), "version is '1'"),
    "version a bool": (lambda m: m.update(version=True), "version is True"),
    "key missing": (lambda m: m.pop("processor"), "'processor'"),
    "key unknown": (lambda m: m.update(python="import os"), "'python'"),
    "config a list": (lambda m: m.update(config=[]), "config is"),
    "dtype": (lambda m: m.update(dtype="int8"), "dtype is 'int8'"),
    "dtype a list": (lambda m: m.update(dtype=["float32"]), "dtype is"),
    "indexer dtype": (lambda m: m.update(indexer_dtype="int4"), "indexer_dtype is 'int4'"),
    "weight format": (lambda m: m.update(weight_format="int4"), "weight_format is 'int4'"),
    "weight format a bool": (lambda m: m.update(weight_format=False), "weight_format is False"),
    "made before there were formats": (lambda m: m.pop("weight_format"), "['weight_format'] are missing"),
    "no weights": (lambda m: m.update(weights={}), "no weights"),
    "group name climbs": (lambda m: m["weights"].update({"../x": m["weights"].pop("text.norm")}), "group '../x'"),
    "group a number": (lambda m: m["weights"].update({"text.norm": 1}), "group 'text.norm'"),
    "layer a string": (lambda m: m["weights"]["text.norm"].update(layer="0"), "layer of weights group 'text.norm'"),
    "layer negative": (lambda m: m["weights"]["text.layers.0"].update(layer=-1), "layer of"),
    "layer missing": (lambda m: m["weights"].pop("text.layers.0"), "lacks a layer"),
    "layer twice": (lambda m: m["weights"]["text.layers.0"].update(layer=1), "stands in text.layers"),
    "layers of two shapes": (
        lambda m: array_of(m, "text.layers.1").update(shape=[2]),
        "another shape or dtype in some layers",
    ),
    "array name": (
        lambda m: m["weights"]["text.norm"]["arrays"].update({"a/b": {"shape": [1], "dtype": "float32"}}),
        "array 'a/b'",
    ),
    "array dtype": (lambda m: array_of(m).update(dtype="object"), "dtype is 'object'"),
    "shape a string": (lambda m: array_of(m).update(shape="32"), "shape is '32'"),
    "extent negative": (lambda m: array_of(m).update(shape=[-32]), "shape of array"),
    "extent a float": (lambda m: array_of(m).update(shape=[32.0]), "shape of array"),
    "more than the files hold": (lambda m: array_of(m).update(shape=[1 << 30]), "bytes in files of"),
    "rank": (lambda m: array_of(m).update(shape=[1] * 33), "shape of array"),
    "file climbs": (lambda m: first_file(m, path="../../etc/passwd"), "file entry '../../etc/passwd'"),
    "file absolute": (lambda m: first_file(m, path="/etc/passwd"), "file entry '/etc/passwd'"),
    "file climbs inside": (lambda m: add_file(m, "weights/../manifest.json"), "file entry"),
    "file with backslashes": (lambda m: add_file(m, "..\\x"), "file entry"),
    "file of a drive": (lambda m: add_file(m, "C:x"), "file entry"),
    "file with a NUL": (lambda m: add_file(m, "a\0b"), "file entry"),
    "file is the folder": (lambda m: add_file(m, "."), "file entry"),
    "file twice": (lambda m: m["files"].append(m["files"][0]), "file entry"),
    "file size negative": (lambda m: first_file(m, bytes=-1), "file entry"),
    "file size a string": (lambda m: first_file(m, bytes="1"), "bytes is '1'"),
    "sha256 short": (lambda m: first_file(m, sha256="00"), "file entry"),
    "file a list": (lambda m: m["files"].append([1]), "file entry"),
    "file with more keys": (lambda m: first_file(m, url="http://x"), "file entry"),
    "file not there": (lambda m: add_file(m, "LICENSE"), "LICENSE is missing from the bundle"),
    "file is a folder": (lambda m: add_file(m, "weights"), "weights is missing from the bundle"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_manifest_is_refused(copy, case):
    change, message = FORGED[case]
    edit(copy, change)
    with pytest.raises(InputError) as caught:
        Bundle.open(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_edited_manifest_is_refused(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"text.norm"', '"text.horm"', 1))
    with pytest.raises(InputError, match="does not have its sha256"):
        Bundle.open(copy)


PLACES = {
    "format": lambda m: (m, "format"),
    "version": lambda m: (m, "version"),
    "config": lambda m: (m, "config"),
    "dtype": lambda m: (m, "dtype"),
    "processor": lambda m: (m, "processor"),
    "weights": lambda m: (m, "weights"),
    "group": lambda m: (m["weights"], "text.norm"),
    "layer": lambda m: (m["weights"]["text.layers.1"], "layer"),
    "arrays": lambda m: (m["weights"]["text.norm"], "arrays"),
    "array": lambda m: (m["weights"]["text.norm"]["arrays"], "text.norm"),
    "shape": lambda m: (array_of(m), "shape"),
    "files": lambda m: (m, "files"),
    "file": lambda m: (m["files"], 0),
    "path": lambda m: (m["files"][0], "path"),
    "bytes": lambda m: (m["files"][0], "bytes"),
    "sha256": lambda m: (m["files"][0], "sha256"),
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child))


@pytest.fixture(scope="module")
def scratch(made, tmp_path_factory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("scratch") / "bundle"))


@given(place=st.sampled_from(sorted(PLACES)), value=JSON)
def test_any_json_at_any_place_of_the_manifest_is_read_or_refused(made, scratch, place, value):
    manifest = json.loads((made / MANIFEST).read_text())
    node, key = PLACES[place](manifest)
    node[key] = value
    write_manifest(scratch, manifest)
    try:
        Bundle.open(scratch)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        # What is left to the model and the store to refuse.
        assert place in ("config", "processor", "arrays", "layer", "shape")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGED = {
    "manifest missing": (lambda r: (r / MANIFEST).unlink(), f"holds no {MANIFEST}"),
    "manifest cut": (lambda r: cut(r / MANIFEST), "cannot be read as JSON"),
    "manifest empty": (lambda r: (r / MANIFEST).write_bytes(b""), "cannot be read as JSON"),
    "manifest nested": (lambda r: (r / MANIFEST).write_text("[" * 100_000), "cannot be read as JSON"),
    "manifest a list": (lambda r: (r / MANIFEST).write_text("[]"), "not the manifest"),
    "manifest huge": (lambda r: os.truncate(r / MANIFEST, 33 << 20), "larger than 32 MiB"),
    "tokenizer missing": (lambda r: (r / "tokenizer.json").unlink(), "tokenizer.json is missing from the bundle"),
    "tokenizer altered": (lambda r: flip(r / "tokenizer.json"), "tokenizer.json differs from its sha256"),
    "weights missing": (lambda r: (r / weight_file(r)).unlink(), "is missing from the bundle"),
    "weights cut": (lambda r: cut(r / weight_file(r)), "in manifest.json; copy the whole bundle again"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_bundle_does_not_open(copy, case):
    damage, message = DAMAGED[case]
    damage(copy)
    with pytest.raises(InputError) as caught:
        Bundle.open(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_altered_weights_fail_verification(copy):
    flip(copy / weight_file(copy))
    bundle = Bundle.open(copy)
    with pytest.raises(InputError, match="differs from its sha256"):
        bundle.verify()


@pytest.mark.parametrize("pattern", ["manifest.ocdbt", "d/*"])
def test_an_unreadable_store_is_an_input_error(copy, pattern):
    for path in (copy / "weights" / "text.layers.1").glob(pattern):
        path.write_bytes(b"\0" * path.stat().st_size)
    bundle = Bundle.open(copy)
    with pytest.raises(InputError, match="cannot read weights") as caught:
        bundle.load_params()
    assert "\n" not in str(caught.value)


def test_arrays_that_are_not_what_the_manifest_says_are_refused(copy):
    edit(copy, lambda m: array_of(m).update(shape=[4, 8]))
    bundle = Bundle.open(copy)
    with pytest.raises(InputError, match=r"text\.norm is float32"):
        bundle.load_params()


def test_links_out_of_the_bundle_are_refused(copy, tmp_path):
    shutil.move(copy / "tokenizer.json", tmp_path / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="link out of the bundle"):
        Bundle.open(copy)


def test_what_is_no_bundle_is_refused_with_the_way_on(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / JOURNAL).touch()
    for path, message in {
        tmp_path / "nothing": "does not exist",
        tmp_path / "file": "is a file",
        tmp_path: "holds no manifest.json",
        tmp_path / "unfinished": "run the same convert command again",
        checkpoint: f"run `python -m convert {checkpoint} BUNDLE`",
    }.items():
        with pytest.raises(InputError) as caught:
            Bundle.open(path)
        assert message in str(caught.value)


def test_a_bundle_without_tokenizer_says_so(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "hf", overrides=SMALL, with_tokenizer=False)
    convert(folder, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").tokenizer_path is None
