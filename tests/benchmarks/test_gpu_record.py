"""The growing result."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu import options
from benchmarks.gpu.record import Record


def test_every_figure_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "result.json"
    record = Record(path, 100)
    record.put(("prefill_s", 8192, "dense"), 0.5)
    assert json.loads(path.read_text()) == {"prefill_s": {"8192": {"dense": 0.5}}}
    record.put(("prefill_s", 8192, "peer"), 1.5)
    assert Record(path, 1).get("prefill_s", 8192) == {"dense": 0.5, "peer": 1.5}
    assert record.get("prefill_s", 1, "dense") is record.get("nothing") is None


def test_what_does_not_fit_is_left_out_and_named(tmp_path: Path) -> None:
    record = Record(tmp_path / "result.json", 10)
    assert record.attempt(("a",), 5, lambda: 1) == 1
    assert record.attempt(("b", 2), 50, lambda: pytest.fail("there is no time for this")) is None
    assert "50 s" in record.get("left_out")["b.2"]
    assert (record.get("a"), record.failures) == (1, 0)


def test_a_failure_takes_one_figure(tmp_path: Path) -> None:
    record = Record(tmp_path / "result.json", 10)
    assert record.attempt(("a",), 1, lambda: [][1]) is None
    assert record.attempt(("b",), 1, lambda: 2) == 2
    assert "IndexError" in record.get("failed", "a")
    assert record.failures == 1


def test_sizes_depend_on_the_configuration() -> None:
    def read(*argv: str) -> tuple[list[int], list[tuple[int, int]], int]:
        args = options.parse("x", None, ["--out", "f.json", *argv])
        return args.contexts, args.decode, args.chunk

    assert read()[0][-1] == 262144
    assert read("--quick")[0] == [8192, 32768]
    assert read("--config", "tiny")[2] == 128
    assert read("--contexts", "16384", "8192", "--decode", "4x512") == ([8192, 16384], [(4, 512)], 8192)


def test_sections_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    args = options.parse("x", None, ["--out", "f", "--sections", "checks,peer", "--no-peer"])
    assert args.sections == {"checks"}
    for wrong in (["--sections", "checks,cheques"], ["--contexts", "10000"]):
        with pytest.raises(SystemExit):
            options.parse("x", None, ["--out", "f", *wrong])
    assert "cheques" in capsys.readouterr().err
