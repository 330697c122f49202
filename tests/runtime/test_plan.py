"""`python -m runtime.plan`: what a request will take, said before any of it is spent."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from runtime import plan, processor
from runtime.bundle import Bundle
from runtime.plan import main
from tests.runtime.media import numbered_picture, real_clip, real_photo, write_video

GIB = 1 << 30


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
    line = next(line for line in out.splitlines() if line.startswith("memory: "))
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


def test_the_plan_counts_the_tokens_that_generation_counts(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, golden_bundle, "--token-ids", ",".join(["7"] * 40), "--max-new-tokens", 1)
    assert "prompt: 40 tokens" in out
    weights = sum(a.nbytes for group in Bundle.open(golden_bundle).groups.values() for a in group.arrays.values())
    assert gib(out)["weights"] == round(weights / GIB, 2)


def test_what_exceeds_the_device_is_said_and_is_an_exit_code_of_its_own(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "device_memory", lambda: 1 << 20)
    out = run(capsys, golden_bundle, "--token-ids", "7", "--max-new-tokens", 1, code=1)
    assert "device: 0.00 GiB, it does not fit" in out


def test_an_answer_that_outgrows_its_cache_is_planned_with_both(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving from 512 to 2,048 slots takes a cache of each for a moment."""
    monkeypatch.setattr(plan, "_GIB", 1 << 10)
    seen = []
    describe = plan._describe_memory

    def record(bundle: Any, used: Any, outgrown: float) -> bool:
        seen.append(outgrown)
        return describe(bundle, used, outgrown)

    monkeypatch.setattr(plan, "_describe_memory", record)
    out = run(capsys, golden_bundle, "--token-ids", "7", "--max-new-tokens", 600)
    assert "graph decode-cpu-d1-batch1-context2048" in out
    assert seen == [512 / 2048]
    assert gib(out)["activations"] >= gib(out)["cache"] / 4


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
    monkeypatch.setattr("runtime.programs.Programs._get", lambda self, program, *shape: (program, *shape))
    out = run(capsys, tiny_bundle, *prompt)
    assert time.perf_counter() - begin < 20
    assert "400 frames from 0.0 s to 3598.0 s" in out
    tokens = int(re.search(r"^prompt: ([\d,]+) tokens$", out, re.MULTILINE)[1].replace(",", ""))  # pyright: ignore[reportOptionalSubscript]
    assert 400 * 64 < tokens < 32768


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-ids", "7", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--token-ids", "7", "--max-new-tokens", "32768"], "32769 tokens do not fit the model's context of 32768"),
        (["--prompt", "Hi"], "no tokenizer.json"),
        (["--token-ids", "7", "--video", "nowhere.mp4"], "nowhere.mp4"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    golden_bundle: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(golden_bundle), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
