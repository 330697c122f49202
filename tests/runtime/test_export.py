"""`python -m runtime.export`: graphs for any platform from a host without it."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import runtime.export
from benchmarks.published import CONFIG, PACKING_TABLE, PARAMETERS, write_published_config
from convert.convert import convert
from keye_jax import KeyeConfig, sharding
from keye_jax.params import count_params
from runtime import buckets, graphs
from runtime.bundle import Bundle
from runtime.export import main
from runtime.graphs import GraphKey


@pytest.fixture(autouse=True)
def one_vision_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MAX_PATCHES", 256)


def export_only(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Leaves out the graphs that a test does not look at."""
    whole = buckets.all_shapes

    def shapes(*args: Any, **options: Any) -> list[tuple[str, tuple[int, ...]]]:
        return [shape for shape in whole(*args, **options) if shape[0] in programs]

    monkeypatch.setattr(buckets, "all_shapes", shapes)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model without its weights."""
    folder = write_published_config(tmp_path_factory.mktemp("published") / "hf")
    return convert(folder, folder.parent / "bundle", shapes_only=True).path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small model without weights whose context is no bucket."""
    from examples.tiny_checkpoint import tiny_config

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tiny_config({"max_position_embeddings": 1000})))
    return convert(tmp_path / "hf", tmp_path / "bundle", shapes_only=True).path


def entries(bundle: Path) -> dict[str, graphs.GraphEntry]:
    return {key.name: entry for key, entry in Bundle.open(bundle).graphs.items()}


def test_the_published_configuration_has_the_published_size() -> None:
    assert count_params(KeyeConfig.from_hf(CONFIG)) + PACKING_TABLE == PARAMETERS == 31_122_082_160


@pytest.mark.slow
def test_an_export_holds_every_shape_that_the_model_can_need(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny), "--platform", "cpu"]) == 0
    found = entries(tiny)
    assert set(found) == {
        "vision-cpu-d1-patches256",
        "prefill-cpu-d1-batch1-chunk64-context512",
        "prefill-cpu-d1-batch1-chunk512-context512",
        "prefill-cpu-d1-batch1-chunk512-context1024",
        "decode-cpu-d1-batch1-context512",
        "decode-cpu-d1-batch1-context1024",
    }
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)
    assert "6 graphs for 1 x cpu" in printed


@pytest.mark.parametrize("platform", graphs.PLATFORMS)
def test_every_platform_is_exported_here(tiny: Path, platform: str) -> None:
    assert main([str(tiny), "--platform", platform, "--context", "512", "--chunk", "64"]) == 0
    found = entries(tiny).values()
    assert {entry.key.program for entry in found} == {"vision", "prefill", "decode"}
    for entry in found:
        assert (entry.jax_version, entry.device_kind, entry.mesh) == (jax.__version__, "any", {"model": 1})
        assert graphs.load(tiny, entry).platforms == (platform,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "options", "devices"), [("tpu", ["--topology", "v5e:2x4"], 8), ("cuda", ["--devices", "4"], 4)]
)
def test_the_published_model_is_exported_without_weights(
    published: Path, monkeypatch: pytest.MonkeyPatch, platform: str, options: list[str], devices: int
) -> None:
    # The smaller contexts' graphs are more of the same.
    monkeypatch.setattr(buckets, "CONTEXTS", (32768,))
    small = ["--context", "32768", "--chunk", "512"]
    assert main([str(published), "--platform", platform, *options, *small]) == 0
    found = {key: entry for key, entry in Bundle.open(published).graphs.items() if key.platform == platform}
    assert {(key.program, key.devices) for key in found} == {(p, devices) for p in ("vision", "prefill", "decode")}
    for key, entry in found.items():
        # 62 GB of weights are arguments; what is stored is the program.
        assert entry.bytes < 1_000_000
        assert entry.mesh == {"model": devices}
        assert entry.device_kind == ("TPU v5 lite" if platform == "tpu" else "any")
        weights = graphs.arguments(graphs.load(published, entry))[0]
        used = sum(leaf.size for leaf in jax.tree.leaves(weights))
        if key.program != "vision":
            assert used == 30_532_122_624 + 108_536_832
            chunk = {"tpu": "attend_bits", "cuda": "attend_lists"}[platform]
            attention = {"prefill": chunk, "decode": "attend_ids"}[key.program]
            assert f'name = "{attention}"' in graphs.load(published, entry).mlir_module()


@pytest.mark.slow
def test_graphs_for_a_topology_hold_its_chips_sizes(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A v5p's two cores share a list and merge; without a topology, and for a v5e, one takes it whole."""
    export_only(monkeypatch, "decode")
    merges = []
    for options in (["--devices", "4"], ["--topology", "v5p:2x2x1"], ["--topology", "v5e:2x2"]):
        assert main([str(published), "--platform", "tpu", *options, "--context", "512"]) == 0
        key = GraphKey("decode", "tpu", 4, (1, 512), preset="context")
        graph = graphs.load(published, Bundle.open(published).graphs[key])
        merges.append('kernel_name = "merge_splits"' in graph.mlir_module())
    assert merges == [False, True, False]


def test_graphs_for_hopper_and_for_other_gpus_stand_side_by_side(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_only(monkeypatch, "decode")
    command = [str(tiny), "--platform", "cuda", "--context", "512", "--chunk", "64"]
    assert main(command) == main([*command, "--plain"]) == 0
    found = Bundle.open(tiny).graphs
    assert sorted(key.plain for key in found) == [False, True]
    for key, entry in found.items():
        assert ("--plain" in key.export_command(tiny)) is key.plain
        # What XLA itself calls is left; no kernel of ours is.
        ours = [name for name in entry.kernels if "triton" in name or "mosaic" in name]
        assert bool(ours) is not key.plain


def test_what_explains_answers_is_exported_when_asked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_only(monkeypatch, "explain")
    assert main([str(tiny), "--platform", "cpu", "--context", "512", "--chunk", "64", "--explain"]) == 0
    (key,) = Bundle.open(tiny).graphs
    assert key.shape == (1, 64, 512)
    assert key.export_command(tiny).endswith("--context 512 --explain --batch 1")
    assert graphs.load(tiny, Bundle.open(tiny).graphs[key]).platforms == ("cpu",)


def test_only_gpus_have_kernels_to_leave_out(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny), "--platform", "cpu", "--plain"]) == 2
    assert "--plain leaves GPU kernels out" in capsys.readouterr().err


def test_shardings_are_in_the_graph(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A device's share of the cache is a multiple of 128 slots.
    key = GraphKey("decode", "tpu", 8, (1, 1024), preset="context")
    export_only(monkeypatch, "decode")
    assert main([str(published), "--platform", "tpu", "--devices", "8", "--context", "512"]) == 0
    shardings = sharding_shapes(graphs.load(published, Bundle.open(published).graphs[key]))
    assert shardings["['embed_tokens']"] == (151936 // 8, 2048)
    assert shardings["['layers']['attn']['q_proj']"] == (48, 2048, 32 // 8, 128)
    assert shardings["['layers']['moe']['gate_up_proj']"] == (48, 128 // 8, 2048, 1536)
    assert shardings["['layers']['moe']['router']"] == (48, 2048, 128)


def test_what_does_not_divide_over_the_devices_is_replicated(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_only(monkeypatch, "decode")
    assert main([str(tiny), "--platform", "tpu", "--devices", "3", "--context", "512", "--chunk", "64"]) == 0
    shapes = sharding_shapes(graphs.load(tiny, entries(tiny)["decode-tpu-d3-context-batch1-context768"]))
    assert shapes["['layers']['attn']['q_proj']"] == (3, 128, 8, 32)  # eight heads
    assert shapes["['layers']['moe']['gate_up_proj']"] == (3, 8, 128, 96)  # eight experts


def test_the_expert_preset_leaves_attention_whole(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_only(monkeypatch, "decode")
    options = ["--devices", "2", "--preset", "expert", "--context", "512", "--chunk", "64"]
    assert main([str(tiny), "--platform", "tpu", *options]) == 0
    shapes = sharding_shapes(graphs.load(tiny, entries(tiny)["decode-tpu-d2-expert-batch1-context512"]))
    assert shapes["['layers']['attn']['q_proj']"] == (3, 128, 8, 32)
    assert shapes["['layers']['moe']['gate_up_proj']"] == (3, 4, 128, 96)


def sharding_shapes(exported: Any) -> dict[str, tuple[int, ...]]:
    """Weights by path, and what one device holds of each."""
    mesh = sharding.abstract_mesh(exported.nr_devices)
    weights, shardings = graphs.arguments(exported)[0], exported.in_shardings_jax(mesh)
    found = {}
    for (path, leaf), place in zip(jax.tree.leaves_with_path(weights), shardings, strict=False):
        found[jax.tree_util.keystr(path)] = place.shard_shape(leaf.shape) if place else leaf.shape
    return found


def test_repeating_an_export_replaces_its_graphs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_only(monkeypatch, "vision", "decode")
    command = [str(tiny), "--platform", "cpu", "--context", "512", "--chunk", "64"]
    assert main(command) == main(command) == 0
    files = {path.name for path in (tiny / graphs.FOLDER).glob("*.stablehlo")}
    assert files == {Path(entry.file).name for entry in entries(tiny).values()}
    assert len(files) == 2


def test_batches_and_chunks_of_ones_own(tiny: Path) -> None:
    assert main([str(tiny), "--platform", "cuda", "--context", "300", "--chunk", "100", "--batch", "5"]) == 0
    assert set(entries(tiny)) == {
        "vision-cuda-d1-patches256",
        "prefill-cuda-d1-batch5-chunk100-context512",
        "decode-cuda-d1-batch5-context512",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--platform", "tpu", "--topology", "v5e"], "must look like v5e:2x4"),
        (["--platform", "tpu", "--topology", "v5e:0x4"], "must look like v5e:2x4"),
        (["--platform", "tpu", "--topology", "v5e:2x-4"], "must look like v5e:2x4"),
        (["--platform", "tpu", "--topology", "v5e:2x4x2x2"], "must look like v5e:2x4"),
        (["--platform", "tpu", "--topology", "h100:2x4"], "'h100' is none of v5e, v5p, v6e, tpu7x; use --devices"),
        (["--platform", "cuda", "--topology", "v5e:2x4"], "use --devices for --platform cuda"),
        (["--platform", "cpu", "--devices", "0"], "--devices 0 must be from 1 to"),
        (["--platform", "cpu", "--preset", "expert"], "--preset expert says what several devices share"),
        (["--platform", "cpu", "--batch", "-1"], "--batch -1 must be from 1 to"),
        (["--platform", "cpu", "--chunk", "2000"], "--chunk 2000 must be from 1 to 1024 for this model"),
        (["--platform", "cpu", "--context", "1025"], "--context 1025 must be from 1 to 1024 for this model"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    tiny: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert entries(tiny) == {}


def test_a_bundle_that_cannot_be_written_is_an_error_here(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because the superuser writes in spite of permissions."""

    def read_only(*args: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("runtime.bundle.write_file", read_only)
    assert main([str(tiny), "--platform", "cpu"]) == 2
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err


def test_an_interrupted_export_keeps_the_graphs_it_has_made(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.trace import Tracer

    whole = Tracer.export

    def interrupted(self: Tracer, key: GraphKey, chip: Any = None) -> Any:
        if key.program == "decode":
            raise KeyboardInterrupt
        return whole(self, key, chip)

    monkeypatch.setattr(Tracer, "export", interrupted)
    assert main([str(tiny), "--platform", "cpu", "--context", "512", "--chunk", "64"]) == 130
    assert {key.program for key in Bundle.open(tiny).graphs} == {"vision", "prefill"}


def test_graphs_are_not_exported_into_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is fetched or traced."""
    assert main(["gs://bucket/bundle", "--platform", "cpu"]) == 2
    assert "error: gs://bucket/bundle is an address; export into the bundle's folder" in capsys.readouterr().err


def test_what_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runtime.export.main([str(tmp_path), "--platform", "cpu"]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
