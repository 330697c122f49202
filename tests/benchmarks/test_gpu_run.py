"""The benchmark itself, on a CPU with a tiny model: that every section runs and leaves what it promises."""

import json
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.gpu import __main__, check, measure
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.record import Record

SIZES = ["--config", "tiny", "--contexts", "128", "--decode", "1x256", "--stage-contexts", "128"]


@pytest.mark.slow
def test_all_timed_sections(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert measure.main(["--out", str(path), *SIZES, "--sections", "prefill,decode,vision,stages"]) == 0
    result = json.loads(path.read_text())
    assert set(result["prefill_s"]["128"]) == {"dsa_random", "dsa_local", "dense"}
    assert set(result["decode_ms"]["1"]["256"]) == {"dsa", "dense"}
    assert result["vit_s"] > 0
    assert result["peak_gib"]["128"] > 0
    assert result["grouped_gemm_tflops"] >= 0
    assert {"select_bits", "attend_bits random", "attend_bits local"} <= set(result["stages"]["prefill"]["128"])
    assert {"select_ids", "attend_ids"} <= set(result["stages"]["decode"]["1x256"])
    assert result["failed_to_compile"] == []
    assert "failed" not in result


def test_a_wrong_result_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of ours is timed."""
    started: list[list[str]] = []

    def process(command: list[str], **_: Any) -> mock.MagicMock:
        """In the place of a process that takes a line and ends with an exit code."""
        started.append(command)
        fake = mock.MagicMock()
        fake.wait.return_value = 1
        fake.poll.return_value = 1
        return fake

    monkeypatch.setattr(subprocess, "Popen", process)
    path = tmp_path / "result.json"
    assert __main__.main(["--out", str(path), *SIZES, "--no-peer", "--commit", "abc"]) == 1
    assert json.loads(path.read_text())["checks_passed"] is False
    checks = [command[command.index("--parts") + 1] for command in started if "--parts" in command]
    assert checks == ["selection", "attention", "products", "whole"]


def test_outcomes_are_written_and_judged(tmp_path: Path) -> None:
    right = Outcome(error=0.5, bound=1, repeats=True, custom_kernel=True)
    wrong = Outcome(error=float("inf"), bound=1, repeats=True, custom_kernel=True)
    restless = Outcome(error=0, bound=1, repeats=False, custom_kernel=True)
    for number, (outcomes, passed) in enumerate([([right], True), ([right, wrong], False), ([restless], False)]):
        record = Record(tmp_path / f"{number}.json", 1)
        assert check.check(((f"kernel {n}", outcome) for n, outcome in enumerate(outcomes)), record) is passed
        assert len(json.loads(record.path.read_text())["checks"]) == len(outcomes)
