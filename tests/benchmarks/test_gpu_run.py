"""The benchmark itself, on a CPU with a tiny model: that every section runs and leaves what it promises."""

import json
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.gpu import measure
from benchmarks.gpu.checks import Outcome

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
    """Before anything is timed."""
    wrong = mock.Mock()
    wrong.run.return_value = [("some kernel", Outcome(error=2, bound=1, repeats=True, custom_kernel=True))]
    monkeypatch.setattr(measure.checks, "Checks", lambda cases, compiler: wrong)
    monkeypatch.setattr(measure.whole, "Whole", lambda compiler, tokens: mock.Mock(run=list))
    monkeypatch.setattr(measure, "_add_programs", lambda run, compiler: None)
    monkeypatch.setattr(measure, "_time", lambda run, compiler: pytest.fail("something was timed"))
    path = tmp_path / "result.json"
    assert measure.main(["--out", str(path), *SIZES]) == 1
    result = json.loads(path.read_text())
    assert result["checks_passed"] is False
    assert result["checks"]["some kernel"]["passed"] is False
