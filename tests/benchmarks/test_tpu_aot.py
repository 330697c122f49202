"""What the table of compiled graphs says of a model as a whole."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tpu_aot, tpu_host
from benchmarks.tpu_aot import Row

GIB = 1 << 30
VISION = Row(
    model="published",
    weights="bf16",
    topology="v5e:2x4",
    context=None,
    graph="vision",
    graph_bytes=1,
    seconds=1.0,
    weight_bytes=GIB,
    cache_bytes=0,
    device_bytes=16 * GIB,
    arguments=GIB,
    results=2 * GIB,
    aliased=0,
    temporaries=0,
)
DECODE = replace(
    VISION,
    context=262144,
    graph="decode",
    weight_bytes=8 * GIB,
    cache_bytes=3 * GIB,
    arguments=11 * GIB,
    results=3 * GIB,
    aliased=3 * GIB,
    temporaries=GIB,
)


def test_both_programs_weights_stay_and_the_hungriest_program_counts() -> None:
    """1 + 8 GiB of weights, 3 of cache, and vision's 2 rather than decode's 1."""
    *_, line = tpu_aot._summary([VISION, DECODE])
    assert line.split() == ["published", "bf16", "v5e:2x4", "262,144", "9.00", "3.00", "2.00", "14.00", "16.00", "fits"]


def test_the_tower_is_counted_with_weights_of_any_format() -> None:
    eight = replace(DECODE, weights="int8", weight_bytes=4 * GIB, arguments=7 * GIB)
    *_, bf16, int8 = tpu_aot._summary([VISION, DECODE, eight])
    assert (bf16.split()[4], int8.split()[4]) == ("9.00", "5.00")


@pytest.mark.parametrize(
    "change", [{"device_bytes": 13 * GIB}, {"error": "RESOURCE_EXHAUSTED"}, {"temporaries": 5 * GIB}], ids=str
)
def test_what_does_not_fit_is_said(change: dict[str, object]) -> None:
    tower = replace(VISION, device_bytes=change.get("device_bytes", VISION.device_bytes))
    *_, line = tpu_aot._summary([tower, replace(DECODE, **change)])  # pyright: ignore[reportArgumentType]
    assert line.endswith("does not fit")


def test_a_record_says_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--json", "a file"])
    tpu_host.write_record(tmp_path / "new" / "r.json", "benchmarks.tpu_aot", "0.1", [DECODE], datasheet={"v5e": 1})
    record = json.loads((tmp_path / "new" / "r.json").read_text())
    assert record["command"] == "python -m benchmarks.tpu_aot --json 'a file'"
    assert (record["libtpu"], record["datasheet"]) == ("0.1", {"v5e": 1})
    assert record["rows"][0]["cache_bytes"] == 3 * GIB


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here")
def test_without_libtpu_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x"])
    assert tpu_aot.main() == 2
    assert "pip install" in capsys.readouterr().err
