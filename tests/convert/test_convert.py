"""Conversion ends with a complete bundle or leaves something that no loader accepts and the same command finishes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import convert.__main__ as command
import convert.convert as module
from convert.__main__ import main
from convert.convert import convert
from convert.journal import Journal
from convert.store import OrbaxWriter
from examples.tiny_checkpoint import write_tiny_checkpoint
from keye_jax.checkpoint import Checkpoint
from keye_jax.errors import CheckpointError
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import JOURNAL, MANIFEST, write_manifest
from tests.bundles import read_group
from tests.shards import entry, read_array, read_tensors, write_file

ROOT = Path(module.__file__).parent.parent
SMALL = {
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
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hf"), overrides=SMALL)


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, tmp_path_factory) -> Path:
    return convert(checkpoint, tmp_path_factory.mktemp("whole") / "bundle").path


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def journal_groups(partial: Path) -> int:
    """Groups that a conversion in progress has finished."""
    try:
        return (partial / JOURNAL).read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


def assert_equal_bundles(found: Path, expected: Path) -> None:
    """Same manifest and same arrays; the store gives its files random names, so those cannot be compared."""
    manifests = [json.loads((root / MANIFEST).read_text()) for root in (found, expected)]
    for manifest in manifests:
        del manifest["created"], manifest["sha256"]
        files = manifest.pop("files")
        manifest["small files"] = [file for file in files if not file["path"].startswith("weights/")]
    assert manifests[0] == manifests[1]
    first, second = Bundle.open(found), Bundle.open(expected)
    first.verify()
    for name in second.groups:
        arrays = read_group(first, name)
        for leaf, array in read_group(second, name).items():
            np.testing.assert_array_equal(arrays[leaf], array)
    on_disk = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert on_disk == {*first.files, MANIFEST}


def test_files_for_the_tokenizer_are_copied_as_they_are(checkpoint, uninterrupted):
    copied = {path.name for path in uninterrupted.iterdir() if path.is_file()} - {MANIFEST}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= copied
    assert "config.json" not in copied
    for name in copied:
        assert (uninterrupted / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_command_line_converts_and_verifies(checkpoint, uninterrupted, tmp_path):
    done = run(checkpoint, tmp_path / "new folder" / "bundle", "--verify")
    assert done.returncode == 0, done.stderr
    assert "bundle and checkpoint are equal" in done.stderr
    assert "MB/s" in done.stderr
    assert_equal_bundles(tmp_path / "new folder" / "bundle", uninterrupted)


def kill_after(checkpoint: Path, bundle: Path, groups: int, seconds: float) -> None:
    """Starts the conversion and kills it `seconds` after its journal has `groups` groups."""
    partial = bundle.with_name(bundle.name + ".partial")
    command = [sys.executable, "-m", "convert", checkpoint, bundle]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while journal_groups(partial) < groups or not (partial / JOURNAL).exists():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_conversion_killed_again_and_again_ends_in_the_same_bundle(checkpoint, uninterrupted, tmp_path):
    bundle, partial = tmp_path / "bundle", tmp_path / "bundle.partial"
    moment = random.Random()  # another one every time: there is no point at which it may be lost
    kept = 0
    for more in (0, 0, 1, 2, 2):
        kill_after(checkpoint, bundle, kept + more, moment.uniform(0, 0.03))
        assert not bundle.exists()
        with pytest.raises(InputError, match="run the same convert command again"):
            Bundle.open(partial)
        assert journal_groups(partial) >= kept
        kept = journal_groups(partial)
    reports: list[str] = []
    convert(checkpoint, bundle, report=lambda stage, done, total: reports.append(stage))
    assert_equal_bundles(bundle, uninterrupted)
    assert not partial.exists()
    assert sum(report.startswith("group ") for report in reports) + kept == len(Bundle.open(bundle).groups)


def test_a_stop_just_before_and_just_after_the_end_leaves_nothing_behind(
    checkpoint, uninterrupted, tmp_path, monkeypatch
):
    bundle = tmp_path / "bundle"

    rename = os.rename

    def stop(source, target, **options):
        if Path(target) == bundle:
            raise OSError("stopped by the test")
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(OSError, match="stopped by the test"):
            convert(checkpoint, bundle)
    assert not bundle.exists()
    convert(checkpoint, bundle)
    assert_equal_bundles(bundle, uninterrupted)
    (bundle / JOURNAL).touch()  # as if it had been killed after the bundle got its name
    convert(checkpoint, bundle)
    assert_equal_bundles(bundle, uninterrupted)


@pytest.mark.parametrize(("owner", "method"), [(Checkpoint, "fill"), (OrbaxWriter, "save")])
def test_ctrl_c_says_how_to_go_on(checkpoint, uninterrupted, tmp_path, monkeypatch, capsys, owner, method):
    """At the next safe place, and nothing of the group in work is lost: a save that was cut would spill tracebacks."""
    original, calls = getattr(owner, method), []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == (10 if method == "save" else 60):
            os.kill(os.getpid(), signal.SIGINT)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        assert main([str(checkpoint), str(tmp_path / "bundle")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    groups = journal_groups(tmp_path / "bundle.partial")
    assert groups == 10 if method == "save" else groups > 0
    assert main([str(checkpoint), str(tmp_path / "bundle")]) == 0
    assert_equal_bundles(tmp_path / "bundle", uninterrupted)


def interrupted(checkpoint: Path, bundle: Path, monkeypatch, **options) -> None:
    """Leaves a partial bundle of a few groups."""
    save = OrbaxWriter.save

    def stop(self, folder, arrays, group):
        if journal_groups(bundle.with_name(bundle.name + ".partial")) == 4:
            raise OSError("stopped by the test")
        save(self, folder, arrays, group)

    with monkeypatch.context() as patch:
        patch.setattr(OrbaxWriter, "save", stop)
        with pytest.raises(OSError, match="stopped by the test"):
            convert(checkpoint, bundle, **options)


def test_a_torn_line_of_the_journal_counts_as_not_written(checkpoint, uninterrupted, tmp_path, monkeypatch):
    interrupted(checkpoint, tmp_path / "bundle", monkeypatch)
    journal = tmp_path / "bundle.partial" / JOURNAL
    os.truncate(journal, journal.stat().st_size - 3)
    convert(checkpoint, tmp_path / "bundle")
    assert_equal_bundles(tmp_path / "bundle", uninterrupted)


def test_groups_whose_files_are_damaged_are_written_again(checkpoint, uninterrupted, tmp_path, monkeypatch):
    interrupted(checkpoint, tmp_path / "bundle", monkeypatch)
    groups = sorted((tmp_path / "bundle.partial" / "weights").iterdir())
    shutil.rmtree(groups[0])
    os.truncate(groups[1] / "_METADATA", 3)
    (tmp_path / "bundle.partial" / "weights" / "left.orbax-checkpoint-tmp").mkdir()
    convert(checkpoint, tmp_path / "bundle")
    assert_equal_bundles(tmp_path / "bundle", uninterrupted)


def test_a_partial_bundle_of_other_options_or_files_is_not_resumed(checkpoint, uninterrupted, tmp_path, monkeypatch):
    interrupted(checkpoint, tmp_path / "bundle", monkeypatch, dtype="float32")
    convert(checkpoint, tmp_path / "bundle")
    assert_equal_bundles(tmp_path / "bundle", uninterrupted)


def test_two_conversions_cannot_write_the_same_bundle(checkpoint, tmp_path):
    (tmp_path / "bundle.partial").mkdir()
    with Journal(tmp_path / "bundle.partial" / JOURNAL, "x"), pytest.raises(InputError, match="in use by another"):
        convert(checkpoint, tmp_path / "bundle")


def test_a_complete_bundle_is_left_as_it_is(checkpoint, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    done = run(checkpoint, uninterrupted)
    assert (done.returncode, "is there already" in done.stderr) == (0, True), done.stderr
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def copied_checkpoint(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder))


def test_another_bundle_or_folder_is_not_overwritten(checkpoint, uninterrupted, tmp_path):
    with pytest.raises(InputError, match="other options"):
        convert(checkpoint, uninterrupted, indexer_dtype="bf16")
    changed = copied_checkpoint(checkpoint, tmp_path / "changed")
    (changed / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    with pytest.raises(InputError, match="other files"):
        convert(changed, uninterrupted)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not a bundle"):
        convert(checkpoint, tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a bundle"):
        convert(checkpoint, tmp_path / "file")
    with pytest.raises(InputError, match="is not a bundle"):
        convert(checkpoint, checkpoint)


def test_a_folder_that_only_has_the_name_of_a_partial_bundle_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "bundle.partial").mkdir()
    (tmp_path / "bundle.partial" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not an unfinished conversion"):
        convert(checkpoint, tmp_path / "bundle")
    assert (tmp_path / "bundle.partial" / "thesis.tex").exists()


def test_an_empty_folder_may_become_the_bundle(checkpoint, uninterrupted, tmp_path):
    (tmp_path / "bundle").mkdir()
    convert(checkpoint, tmp_path / "bundle")
    assert_equal_bundles(tmp_path / "bundle", uninterrupted)


def test_too_little_space_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(InputError, match=r"0\.0 GB free and the bundle needs"):
        convert(checkpoint, tmp_path / "bundle")
    assert list((tmp_path / "bundle.partial" / "weights").iterdir()) == []


def test_verification_finds_a_changed_bit(checkpoint, tmp_path):
    """Weights that were changed together with their checksum still differ from the checkpoint's."""
    changed = copied_checkpoint(checkpoint, tmp_path / "changed")
    tensors = read_tensors(changed)
    norm = read_array(tensors, "model.norm.weight").copy()
    norm.view(np.uint32)[3] ^= 1
    for path in changed.glob("model*"):
        path.unlink()
    write_file(changed / "model.safetensors", {**tensors, "model.norm.weight": entry(norm)})
    honest = convert(checkpoint, tmp_path / "honest", dtype="float32")
    forged = convert(changed, tmp_path / "forged", dtype="float32")
    manifest = json.loads((forged.path / MANIFEST).read_text()) | {"source": honest.source}
    write_manifest(forged.path, manifest)
    with pytest.raises(InputError, match=r"weights text\.norm differ from the checkpoint"):
        convert(checkpoint, forged.path, dtype="float32", verify=True)


def test_verification_finds_a_changed_file(checkpoint, tmp_path):
    bundle = convert(checkpoint, tmp_path / "bundle")
    name = max(bundle.files, key=lambda name: bundle.files[name].bytes if name.startswith("weights/") else 0)
    data = bytearray((bundle.path / name).read_bytes())
    data[-5] ^= 1
    (bundle.path / name).write_bytes(data)
    with pytest.raises(InputError, match="differs from its sha256"):
        convert(checkpoint, bundle.path, verify=True)


def spoil_weights(folder: Path) -> None:
    tensors = read_tensors(folder)
    norm = read_array(tensors, "model.norm.weight").copy()
    norm[0] = np.nan
    for path in folder.glob("model*"):
        path.unlink()
    write_file(folder / "model.safetensors", {**tensors, "model.norm.weight": entry(norm)})


SPOILT = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "unknown key": (
        lambda f: (f / "config.json").write_text(json.dumps(json.loads((f / "config.json").read_text()) | {"new": 1})),
        "unknown key 'new'",
    ),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")], "holds neither"),
    "not finite": (spoil_weights, "tensor 'model.norm.weight' in model.safetensors holds a value"),
    "tokenizer a folder": (
        lambda f: [(f / "tokenizer.json").unlink(), (f / "tokenizer.json").mkdir()],
        "tokenizer.json must be a file",
    ),
    "tokenizer huge": (lambda f: os.truncate(f / "tokenizer.json", 65 << 20), "of at most 64 MiB"),
    "preprocessor broken": (lambda f: (f / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, tmp_path, capsys, case):
    folder = copied_checkpoint(checkpoint, tmp_path / "hf")
    spoil, message = SPOILT[case]
    spoil(folder)
    assert main([str(folder), str(tmp_path / "bundle")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "bundle").exists()


def test_debug_shows_where_an_error_comes_from(checkpoint, tmp_path):
    folder = copied_checkpoint(checkpoint, tmp_path / "hf")
    spoil_weights(folder)
    with pytest.raises(CheckpointError):
        main([str(folder), str(tmp_path / "bundle"), "--debug"])


def test_a_target_that_cannot_be_written_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(checkpoint), str(tmp_path / "file" / "bundle")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_without_tokenizer_converts_with_a_note(tmp_path, capsys):
    folder = write_tiny_checkpoint(tmp_path / "hf", overrides=SMALL, with_tokenizer=False)
    assert main([str(folder), str(tmp_path / "bundle")]) == 0
    assert "note: no tokenizer.json" in capsys.readouterr().err


def test_experts_and_heads_are_stored_one_to_a_chunk(uninterrupted):
    """A device that holds some of them reads no others."""
    import tensorstore

    leaves = {"gate_up_proj": 0, "down_proj": 0, "q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 0}
    for name, axis in leaves.items():
        expert = axis == 0 and name != "o_proj"
        group = f"text.layers.0.{name}" if expert else "text.layers.0"
        folder = {"driver": "file", "path": f"{uninterrupted / 'weights' / group}/"}
        leaf = f"text.layers.{'moe' if expert else 'attn'}.{name}"
        store = {"driver": "ocdbt", "base": folder, "path": f"{leaf}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
        expected = [*array.shape]
        expected[axis] = 1
        assert array.chunk_layout.read_chunk.shape == tuple(expected), name


def test_arrays_are_not_copied_before_they_are_written(checkpoint, tmp_path, monkeypatch):
    """Orbax would copy them all, which doubles the memory of a conversion."""
    import copy

    copied: list[int] = []
    original = copy.deepcopy

    def deepcopy(value, *arguments):
        result = original(value, *arguments)
        if isinstance(value, np.ndarray) and result is not value:
            copied.append(value.nbytes)
        return result

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    convert(checkpoint, tmp_path / "bundle")
    assert copied == []


@pytest.mark.parametrize("read_bytes", [0, 1 << 30])
def test_reading_ahead_or_not_gives_the_same_bundle(checkpoint, uninterrupted, tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(module, "_READ_BYTES", read_bytes)
    convert(checkpoint, tmp_path / "bundle", verify=True)
    assert_equal_bundles(tmp_path / "bundle", uninterrupted)


def test_progress_tells_rate_and_remaining_time(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    progress = command._Progress()
    progress("resuming", 400_000_000, 1_000_000_000)  # what was there before counts for no rate
    now[0] += 5
    progress("group 7/9", 500_000_000, 1_000_000_000)
    now[0] += 5
    progress("group 8/9", 520_000_000, 1_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "resuming · 400/1,000 MB",
        "group 7/9 · 500/1,000 MB · 20 MB/s · 25 s left",
        "group 8/9 · 520/1,000 MB · 12 MB/s · 40 s left",
    ]


def test_an_address_is_no_folder(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["gs://bucket/hf", "bundle"], [str(checkpoint), "gs://bucket/bundle"]):
        assert main(arguments) == 2
        assert "is an address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_shapes_needs_only_the_config_and_cannot_be_run(checkpoint, tmp_path):
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    shapes = convert(folder, tmp_path / "shapes", dtype="float32", shapes_only=True)
    whole = convert(checkpoint, tmp_path / "whole", dtype="float32")
    assert shapes.abstract_params() == whole.abstract_params()
    with pytest.raises(InputError, match="holds none"):
        shapes.load_params()
    with pytest.raises(InputError, match="--verify"):
        convert(folder, tmp_path / "other", verify=True, shapes_only=True)
