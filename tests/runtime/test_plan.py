"""`python -m runtime.plan`: what a request will take, said before any of it is spent."""

import importlib.util
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks.published import write_published_config
from convert.convert import convert
from examples.tiny_checkpoint import tiny_config
from runtime import aot, plan, processor
from runtime.bundle import Bundle
from runtime.plan import main
from tests.runtime.media import numbered_picture, real_clip, real_photo, write_video

GIB = 1 << 30
NOTHING = SimpleNamespace(memory=aot.Memory(0, 0, 0, 0))
"""A compiled program that needs no memory."""


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning decodes no video and loads no weights; either would fail here."""
    monkeypatch.setattr(processor, "load_video", None)
    monkeypatch.setattr(Bundle, "load_params", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main([*map(str, arguments)]) == code
    return capsys.readouterr().out


def gib(out: str) -> dict[str, float]:
    """The figures of the memory line by name."""
    line = next(line for line in out.splitlines() if line.startswith("memory"))
    numbers = [float(n) for n in re.findall(r"([\d.]+) GiB", line)]
    return dict(zip(("weights", "cache", "activations", "total"), numbers, strict=True))


def test_a_plan_lists_media_tokens_graphs_and_memory(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = ["--video", real_clip(), "--image", real_photo(), "--max-frames", 4, "--max-pixels", 50176]
    out = run(capsys, tiny_bundle, *media, "--prompt", "What is this?", "--max-new-tokens", 64)
    assert re.search(r"^video bikes.mp4: 4 frames from 0\.0 s to 10\.0 s, each \d+x\d+, \d+ tokens$", out, re.MULTILINE)
    assert re.search(r"^image rocket.jpg: \d+x\d+, \d+ tokens$", out, re.MULTILINE)
    tokens = int(re.search(r"^prompt: (\d+) tokens$", out, re.MULTILINE)[1])  # pyright: ignore[reportOptionalSubscript]
    assert 4 * 60 < tokens < 512 - 64
    for graph in ("prefill-cpu-d1-batch1-chunk512-context512", "decode-cpu-d1-batch1-context512", "vision-cpu-d1-"):
        assert f"graph {graph}" in out
    assert "platform: cpu, 1 device" in out
    assert "it fits" in out


@pytest.mark.slow
def test_the_plan_counts_the_tokens_that_generation_counts(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, golden_bundle, "--token-ids", ",".join(["7"] * 40), "--max-new-tokens", 1)
    assert "prompt: 40 tokens" in out
    weights = sum(a.nbytes for group in Bundle.open(golden_bundle).groups.values() for a in group.arrays.values())
    assert gib(out)["weights"] == round(weights / GIB, 2)


@pytest.fixture
def tiny_shapes(tmp_path: Path) -> Path:
    """A small model without weights, whose heads and experts divide by eight."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tiny_config({"num_hidden_layers": 1})))
    return convert(tmp_path / "hf", tmp_path / "bundle", dtype="float32", shapes_only=True).path


@pytest.mark.slow
def test_what_exceeds_the_device_is_said_and_is_an_exit_code_of_its_own(
    tiny_shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "device_memory", lambda devices: 1 << 20)
    out = run(capsys, tiny_shapes, "--token-ids", "7", "--max-new-tokens", 1, "--devices", 2, code=1)
    assert "each device: 0.00 GiB, it does not fit" in out


def test_an_answer_that_outgrows_its_cache_is_planned_with_both(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving from 512 to 2,048 slots takes a cache of each for a moment."""
    monkeypatch.setattr(plan, "_GIB", 1 << 10)
    # Programs that need nothing: what is left is the copy.
    monkeypatch.setattr("runtime.programs.Programs._get", lambda self, program, *shape: NOTHING)
    out = run(capsys, golden_bundle, "--token-ids", "7", "--max-new-tokens", 600)
    assert "graph decode-cpu-d1-batch1-context2048: " in out
    assert "graph decode-cpu-d1-batch1-context512: until the answer outgrows it" in out
    assert gib(out)["activations"] == pytest.approx(gib(out)["cache"] / 4, abs=0.01)


def test_a_long_video_is_planned_from_its_index(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour, whose pixels as floats would be gigabytes."""
    pictures = [numbered_picture(n % 1000, 32, 32) for n in range(1800)]
    path = write_video(tmp_path / "hour.mp4", pictures, codec="mpeg4", milliseconds=range(0, 3_600_000, 2000))
    monkeypatch.setattr(processor, "patchify", None)  # counting patches must not make any
    begin = time.perf_counter()
    prompt = ["--video", path, "--max-frames", 400, "--prompt", "When?", "--max-new-tokens", 1]
    monkeypatch.setattr(plan, "_describe_memory", lambda *args: True)
    monkeypatch.setattr(plan, "_measured", lambda *args: None)
    out = run(capsys, tiny_bundle, *prompt)
    assert time.perf_counter() - begin < 20
    assert "400 frames from 0.0 s to 3598.0 s" in out
    tokens = int(re.search(r"^prompt: ([\d,]+) tokens$", out, re.MULTILINE)[1].replace(",", ""))  # pyright: ignore[reportOptionalSubscript]
    assert 400 * 64 < tokens < 32768


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["context", "expert"])
def test_each_device_is_planned_with_its_share(
    tiny_shapes: Path, preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shardings in the graphs; a bundle without weights will do."""
    monkeypatch.setattr(plan, "_GIB", 1 << 10)
    monkeypatch.setattr("runtime.programs.Programs._get", lambda self, program, *shape: NOTHING)
    ids = ["--token-ids", "7", "--max-new-tokens", 1000]
    alone = gib(run(capsys, tiny_shapes, *ids, "--devices", 1))
    out = run(capsys, tiny_shapes, *ids, "--devices", 8, "--preset", preset)
    assert "platform: cpu, 8 devices" in out
    assert f"graph decode-cpu-d8-{preset}-batch1-context1024: " in out
    assert re.search(r"^each device: .* it fits$", out, re.MULTILINE)
    shares, params = gib(out), Bundle.open(tiny_shapes).abstract_params()
    layers, text = params["text"]["layers"], params["text"]
    spread = [text["embed_tokens"], text["lm_head"], *(layers["moe"][name] for name in ("gate_up_proj", "down_proj"))]
    if preset == "context":
        spread += [layers["attn"][name] for name in ("q_proj", "o_proj")]
    saved = sum(leaf.size * leaf.dtype.itemsize for leaf in spread) * 7 / 8 / 1024
    assert shares["weights"] == pytest.approx(alone["weights"] - saved, abs=0.02)
    # One device holds 2,048 slots; eight begin with 1,024, 128 each. A row's length is on every device.
    assert shares["cache"] == pytest.approx(alone["cache"] / (16 if preset == "context" else 2), abs=0.02)


def test_frames_are_planned_as_they_are_divided(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight frames of 16 x 16 patches: one device takes them at once, eight take one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_measured", lambda bundle, target, key: key)
        names: list[str] = []
        patch.setattr(plan, "_describe_memory", lambda bundle, keys, *rest: names.extend(key.name for key in keys))
        for devices in (1, 8):
            media = ["--video", real_clip(), "--max-frames", 8, "--max-pixels", 50176, "--prompt", "What?"]
            run(capsys, tiny_bundle, *media, "--devices", devices, code=1)
    vision = [name for name in names if name.startswith("vision")]
    assert vision == ["vision-cpu-d1-patches2048", "vision-cpu-d8-context-patches256"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here")
def test_a_topology_without_its_compiler_is_planned_by_weights_and_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published model on eight chips of 16 GB, as the compiler counts its arguments."""
    source = write_published_config(tmp_path / "hf")
    bundle = convert(source, tmp_path / "bundle", shapes_only=True).path
    ids = ["--token-ids", ",".join(["7"] * 600), "--max-new-tokens", 200_000]
    out = run(capsys, bundle, *ids, "--topology", "v5e:2x4")
    assert "platform: v5e:2x4, 8 devices" in out
    assert "graph decode-tpu-d8-context-batch1-context262144: not compiled, for want of libtpu" in out
    assert "each device: 15.75 GiB, weights and cache fit, activations are not known" in out
    found, tower = gib(out), Bundle.open(bundle).abstract_params()
    vision = sum(leaf.size * 2 for name in ("vision", "projector") for leaf in jax.tree.leaves(tower[name]))
    assert found["weights"] == pytest.approx((10_850 - 3_175) / 1024 + vision / GIB, abs=0.01)
    assert found["cache"] == pytest.approx(3_175 / 1024, abs=0.01)
    out = run(capsys, bundle, *ids, "--topology", "v5e:1x1", code=1)
    assert "v5e:1x1, 1 device\n" in out
    assert "device: 15.75 GiB, it does not fit" in out


def test_a_program_that_its_compiler_refuses_for_its_size_does_not_fit(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: object, *args: object, **options: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", exhausted)
    out = run(capsys, golden_bundle, "--token-ids", "7", "--max-new-tokens", 1, code=1)
    assert "RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm" in out
    assert "it does not fit" in out


def test_help_says_that_addresses_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "gs://" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-ids", "7", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--token-ids", "7", "--max-new-tokens", "32768"], "32769 tokens do not fit the model's context of 32768"),
        (["--prompt", "Hi"], "no tokenizer.json"),
        (["--token-ids", "7", "--video", "nowhere.mp4"], "nowhere.mp4"),
        (["--token-ids", "7", "--topology", "v5e"], "must look like v5e:2x4"),
        (["--token-ids", "7", "--devices", "99"], "--devices 99 must be from 1 to"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    golden_bundle: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(golden_bundle), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
