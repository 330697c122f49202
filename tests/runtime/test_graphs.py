"""Graphs in a bundle: described in full, and loaded only if they are what the manifest says, made by a JAX that fits.

Graphs here are toys with the arguments of real ones: nothing is traced from the model and nothing is compiled.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from runtime import bundle as bundle_module
from runtime import graphs
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.graphs import SHAPE_NAMES, GraphEntry, GraphKey
from runtime.manifest import MANIFEST, parse_graphs
from tests.bundles import copy_without_graphs
from tests.bundles import edit_manifest as edit

ROOT = Path(__file__).parents[2]
KEY = GraphKey("decode", "cpu", 1, (1, 512))
OTHER = GraphKey("decode", "cpu", 1, (1, 2048))


def toy(key: GraphKey, *, platform: str | None = None, devices: int | None = None) -> export.Exported:
    """A graph with the arguments by which `key` is known; platform and devices may contradict it."""
    if key.program == "vision":
        rest: tuple[Any, ...] = (jax.ShapeDtypeStruct((key.shape[0], 3, 14, 14), jnp.float32),)
    else:
        batch, context = key.shape[0], key.shape[-1]
        kv = jax.ShapeDtypeStruct((1, batch, context, 2, 1, 8), jnp.float32)
        names = {"decode": ("delta", (batch,))}
        name, shape = names.get(key.program, ("tokens", key.shape[:2]))
        logits = () if key.program == "explain" else (jax.ShapeDtypeStruct((batch, 16), jnp.float32),)
        rest = ({"kv": kv}, *logits, {name: jax.ShapeDtypeStruct(shape, "int32")})
    devices = devices or key.devices
    options: dict[str, Any] = {}
    if devices > 1:
        sharding = NamedSharding(AbstractMesh((devices,), ("model",)), PartitionSpec())
        options["in_shardings"] = jax.tree.map(lambda _: sharding, ({"w": 0}, *rest))
    function = jax.jit(lambda params, *args: jax.tree.map(lambda x: x + 1, args), **options)
    params = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    return export.export(function, platforms=[platform or key.platform])(params, *rest)


@pytest.fixture
def bundle(golden_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of the golden bundle without graphs, under a name that a shell must quote."""
    return Bundle.open(copy_without_graphs(golden_bundle, tmp_path / "a copy"))


def refusal(root: Path, key: GraphKey = KEY) -> str:
    """The one line with which a bundle refuses to load a graph."""
    with pytest.raises(InputError) as caught:
        graphs.load(root, Bundle.open(root).graphs[key])
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = st.text("abz019-", min_size=1, max_size=8)
EXTENTS = st.integers(1, graphs._MAX_EXTENT)


@st.composite
def keys(draw: st.DrawFn) -> GraphKey:
    program = draw(st.sampled_from(sorted(SHAPE_NAMES)))
    shape = tuple(draw(EXTENTS) for _ in SHAPE_NAMES[program])
    platform, devices = draw(st.sampled_from(graphs.PLATFORMS)), draw(EXTENTS)
    preset = draw(st.sampled_from(graphs.PRESETS)) if devices > 1 else graphs.SINGLE
    return GraphKey(program, platform, devices, shape, draw(st.booleans()), preset)


ENTRIES = st.builds(
    GraphEntry,
    key=keys(),
    file=NAMES.map(lambda name: f"graphs/{name}.stablehlo"),
    bytes=EXTENTS,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    jax_version=st.text(max_size=20),
    calling_convention_version=st.integers(),
    created=st.text(max_size=30),
    device_kind=st.text(max_size=30),
    mesh=st.dictionaries(NAMES, EXTENTS, max_size=2),
    kernels=st.dictionaries(NAMES, st.booleans(), max_size=2),
)


@given(ENTRIES)
def test_an_entry_survives_the_manifest(entry: GraphEntry) -> None:
    stored = json.loads(json.dumps(entry.to_json()))
    assert GraphEntry.from_json(stored) == entry
    assert parse_graphs([stored]) == {entry.key: entry}


@given(keys(), keys())
def test_different_graphs_have_different_names(a: GraphKey, b: GraphKey) -> None:
    assert (a.name == b.name) == (a == b)
    assert graphs._FILE.fullmatch(f"graphs/{a.name}-0123abcd.stablehlo")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child))
PLACES = sorted(f.name for f in dataclasses.fields(GraphEntry) if f.name != "key")
PLACES += ["program", "platform", "devices", "shape", "shape/context", "mesh/model", "kernels/x", "unknown"]


@given(entry=ENTRIES, place=st.sampled_from(PLACES), value=JSON)
def test_any_json_at_any_place_of_an_entry_is_read_or_refused(entry: GraphEntry, place: str, value: Any) -> None:
    raw = json.loads(json.dumps(entry.to_json()))
    *parents, name = place.split("/")
    node = raw[parents[0]] if parents else raw
    node[name] = value
    read_or_refused(raw)


@given(JSON)
def test_any_json_in_the_place_of_an_entry_is_refused(value: Any) -> None:
    assert not read_or_refused(value)


def read_or_refused(raw: Any) -> bool:
    try:
        entry = GraphEntry.from_json(raw)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return False
    assert entry.to_json() == raw
    return True


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(file="graphs/../../x.stablehlo"),
        lambda entry: entry.update(file="/etc/passwd"),
        lambda entry: entry.update(bytes=0),
        lambda entry: entry.update(bytes=1 << 40),
        lambda entry: entry["shape"].update(context=True),
        lambda entry: entry["shape"].pop("batch"),
        lambda entry: entry.update(sha256="0" * 63),
        lambda entry: entry.update(devices=0),
    ],
)
def test_a_forged_entry_keeps_the_bundle_from_opening(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    bundle.add_graph(KEY, toy(KEY))
    edit(bundle.path, lambda manifest: change(manifest["graphs"][0]))
    with pytest.raises(InputError, match=r"damaged.*copy the whole bundle again or convert again"):
        Bundle.open(bundle.path)


def test_two_entries_of_one_graph_are_refused(bundle: Bundle) -> None:
    bundle.add_graph(KEY, toy(KEY))
    edit(bundle.path, lambda manifest: manifest["graphs"].append(manifest["graphs"][0]))
    with pytest.raises(InputError, match=f"{KEY.name} is listed twice"):
        Bundle.open(bundle.path)


def test_an_edited_entry_is_noticed_by_the_manifests_own_sha256(bundle: Bundle) -> None:
    entry = bundle.add_graph(KEY, toy(KEY))
    path = bundle.path / MANIFEST
    path.write_text(path.read_text().replace(entry.sha256, "0" * 64))
    with pytest.raises(InputError, match="does not have its sha256"):
        Bundle.open(bundle.path)


def test_a_stored_graph_is_described_and_loads(bundle: Bundle) -> None:
    bundle.add_graph(KEY, toy(KEY), device_kind="any")
    again = Bundle.open(bundle.path)
    entry = again.graphs[KEY]
    assert again.graphs == bundle.graphs
    assert (entry.jax_version, entry.device_kind, entry.mesh) == (jax.__version__, "any", {"model": 1})
    assert entry.calling_convention_version == toy(KEY).calling_convention_version
    assert entry.bytes == (bundle.path / entry.file).stat().st_size
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", entry.created)
    loaded = graphs.load(again.path, entry)
    assert graphs.arguments(loaded)[1]["kv"].shape == (1, 1, 512, 2, 1, 8)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit changed": (flip, "is not the file that manifest.json lists"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 1), "is not the file that manifest.json lists"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is not the file that manifest.json lists"),
    "empty": (lambda path: path.write_bytes(b""), "is not the file that manifest.json lists"),
    "missing": (lambda path: path.unlink(), "cannot be read (No such file or directory)"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_graph_is_refused_with_the_command_that_makes_it_again(bundle: Bundle, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(bundle.path / bundle.add_graph(KEY, toy(KEY)).file)
    error = refusal(bundle.path)
    assert message in error
    assert error.endswith(f"python -m runtime.export '{bundle.path}' --platform cpu --context 512 --batch 1")


def test_swapped_files_are_refused(bundle: Bundle) -> None:
    a, b = (bundle.path / bundle.add_graph(key, toy(key)).file for key in (KEY, OTHER))
    content = a.read_bytes()
    shutil.copyfile(b, a)
    b.write_bytes(content)
    for key in (KEY, OTHER):
        assert "is not the file that manifest.json lists" in refusal(bundle.path, key)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (toy(KEY, platform="cuda"), "is for 1 x cuda, manifest.json says 1 x cpu"),
        (toy(KEY, devices=2), "is for 2 x cpu, manifest.json says 1 x cpu"),
        (toy(OTHER), "takes arrays of other shapes than decode-cpu-d1-batch1-context512"),
        (toy(GraphKey("vision", "cpu", 1, (512,))), "takes arrays of other shapes"),
        (toy(GraphKey("prefill", "cpu", 1, (1, 512, 512))), "takes arrays of other shapes"),
        (toy(GraphKey("explain", "cpu", 1, (1, 64, 512))), "takes arrays of other shapes"),
    ],
    ids=["platform", "devices", "context", "vision", "prefill", "explain"],
)
def test_a_graph_under_the_key_of_another_is_refused(bundle: Bundle, graph: export.Exported, message: str) -> None:
    bundle.add_graph(KEY, graph)
    error = refusal(bundle.path)
    assert message in error
    assert "; make it again: python -m runtime.export" in error


@pytest.mark.parametrize("content", [b"\0" * 64, b"StableHLO", bytes(range(256)) * 2, toy(KEY).serialize()[:-40]])
def test_a_listed_file_that_is_no_graph_is_refused(bundle: Bundle, content: bytes) -> None:
    """Even if whoever put it there also wrote its sha256 into the manifest."""
    entry = bundle.add_graph(KEY, toy(KEY))
    (bundle.path / entry.file).write_bytes(content)
    digest = bundle_module.file_sha256(bundle.path / entry.file)
    edit(bundle.path, lambda m: m["graphs"][0].update(bytes=len(content), sha256=digest))
    assert "cannot be loaded by this JAX" in refusal(bundle.path)


@pytest.mark.parametrize(
    "made_by",
    [
        {"jax_version": "0.9.3"},
        {"jax_version": "0.13.0"},
        {"jax_version": "1.0.0"},
        {"jax_version": "nightly"},
        {"calling_convention_version": export.minimum_supported_calling_convention_version - 1},
        {"calling_convention_version": export.maximum_supported_calling_convention_version + 1},
    ],
)
def test_a_graph_of_a_jax_outside_the_window_is_refused_unread(
    bundle: Bundle, made_by: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.add_graph(KEY, toy(KEY))
    edit(bundle.path, lambda manifest: manifest["graphs"][0].update(made_by))
    monkeypatch.setattr(export, "deserialize", None)  # calling it would be a TypeError
    error = refusal(bundle.path)
    assert f"JAX {jax.__version__} here runs conventions" in error
    assert str(next(iter(made_by.values()))) in error
    assert "; make it again: python -m runtime.export" in error


@pytest.mark.parametrize("version", ["0.10.0", "0.10.2", "0.12.0.1", "0.12.9"])
def test_graphs_of_every_jax_in_the_window_are_tried(bundle: Bundle, version: str) -> None:
    bundle.add_graph(KEY, toy(KEY))
    edit(bundle.path, lambda manifest: manifest["graphs"][0].update(jax_version=version))
    graphs.load(bundle.path, Bundle.open(bundle.path).graphs[KEY])


def test_a_new_graph_takes_the_place_of_the_old_one(bundle: Bundle) -> None:
    old = bundle.add_graph(KEY, toy(OTHER))
    new = bundle.add_graph(KEY, toy(KEY))
    assert [path.name for path in (bundle.path / graphs.FOLDER).glob("*.stablehlo")] == [Path(new.file).name]
    assert old.file != new.file
    graphs.load(bundle.path, Bundle.open(bundle.path).graphs[KEY])


@pytest.mark.parametrize("stage", ["write_manifest", "write_file"])
def test_a_crash_while_a_graph_is_stored_leaves_the_bundle_as_it_was(
    bundle: Bundle, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.add_graph(KEY, toy(KEY))
    before = (bundle.path / MANIFEST).read_bytes()

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, stage, crash)
        for key in (KEY, OTHER):
            with pytest.raises(KeyboardInterrupt):
                bundle.add_graph(key, toy(OTHER))
    assert (bundle.path / MANIFEST).read_bytes() == before
    again = Bundle.open(bundle.path)
    assert set(again.graphs) == {KEY}
    graphs.load(again.path, again.graphs[KEY])
    again.add_graph(OTHER, toy(OTHER))
    assert set(Bundle.open(bundle.path).graphs) == {KEY, OTHER}


def test_a_full_disk_leaves_no_half_written_files(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bundle.add_graph(KEY, toy(KEY))
    assert [path.name for path in bundle.path.rglob("*") if "stablehlo" in path.name or path.suffix == ".new"] == []
    assert Bundle.open(bundle.path).graphs == {}


def test_processes_that_add_graphs_at_once_lose_none(bundle: Bundle) -> None:
    program = (
        "import sys\n"
        "from runtime.bundle import Bundle\n"
        "from tests.runtime.test_graphs import GraphKey, toy\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "for size in [512, *map(int, sys.argv[2:])]:\n"
        "    key = GraphKey('vision', 'cpu', 1, (size,))\n"
        "    bundle.add_graph(key, toy(key))\n"
    )
    sizes = range(1, 13)
    started = [
        subprocess.Popen([sys.executable, "-c", program, bundle.path, *map(str, part)], cwd=ROOT)
        for part in (sizes[::2], sizes[1::2])
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    again = Bundle.open(bundle.path)
    assert {key.shape[0] for key in again.graphs} == {512, *sizes}
    for entry in again.graphs.values():
        graphs.load(again.path, entry)
    listed = {Path(entry.file).name for entry in again.graphs.values()}
    assert {path.name for path in (bundle.path / graphs.FOLDER).glob("*.stablehlo")} == listed
