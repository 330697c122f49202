"""What a person reads, and what is drawn."""

from typing import Any

import pytest

from benchmarks.gpu.report import floor_of, tables

RESULT: dict[str, Any] = {
    "device": "NVIDIA H200",
    "config": "30b",
    "commit": "abc",
    "versions": {"jax": "1.2.3"},
    "rates": {"tflops": 790.0, "tb_per_s": 4.3},
    "checks": {"a": {"passed": True, "custom_kernel": True}, "b": {"passed": False, "custom_kernel": False}},
    "prefill_s": {
        "131072": {"dsa_random": 5.0, "dsa_local": 4.0, "dense": 13.0, "peer": 15.7},
        "8192": {"dsa_random": 0.15},
    },
    "peak_gib": {"8192": 59.1, "131072": 73.0},
    "decode_ms": {"1": {"131072": {"dsa": 3.2, "dense": 12.8, "peer": 106.0}, "8192": {"peer": 19.5}}},
    "vit_s": 2.0,
    "grouped_gemm_tflops": 455.0,
    "stages": {"decode": {"1x8192": {"select_ids": {"us": 12.5, "calls": 48, "percent_of_floor": 31.0}}}},
    "left_out": {"prefill_s.262144.dense": "would take about 50 s of the 10 s left"},
    "failed": {"vit_s": "RuntimeError: out of memory"},
    "peer": "not run: no torch",
}


def row(text: str, start: str) -> list[str]:
    """The cells of the line that starts with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.removeprefix(start).split()


def test_tables() -> None:
    text = tables(RESULT)
    assert "1 of 2 checks passed, 1 of them with kernels of ours" in text
    cells = row(text, "131,072")
    assert cells == ["5", "4", "13", "15.7", "7", "4", "2.27", "45.4", "26,214", "2.6", "73"]
    assert row(text, "8,192")[1] == "–"
    assert row(text, "1 x 131,072")[:5] == ["3.2", "12.8", "106", "7", "3"]
    assert row(text, "1 x 131,072")[-1] == "4"
    assert row(text, "vision, s") == ["2", "2.5", "1.3"]
    assert row(text, "experts, TFLOP/s") == ["455", "300", "450"]
    assert row(text, "  select_ids") == ["12.5", "48", "0.6", "31"]
    for part in ("left out: prefill_s.262144.dense", "failed: vit_s", "peer not run: no torch"):
        assert part in text


def test_a_result_with_nothing_in_it() -> None:
    assert "0 of 0 checks" in tables({})


def test_floors_follow_the_measured_rates() -> None:
    half = {"rates": {"tflops": 395.0, "tb_per_s": 2.15}}
    assert floor_of(half, context=8192) == pytest.approx(2 * floor_of(RESULT, context=8192))
    assert floor_of(half, context=8192, batch=1) == pytest.approx(2 * floor_of(RESULT, context=8192, batch=1))
    assert floor_of({}, context=131072, dense=True) > floor_of({}, context=131072)


def test_pictures(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot_gpu

    points = plot_gpu.prefill_points(RESULT)
    assert points["dsa_local"] == {131072: 4.0}
    assert set(points["floor"]) == {8192, 131072}
    assert plot_gpu.decode_points(RESULT)["peer"] == {131072: 106.0, 8192: 19.5}
    plot_gpu.draw(points, "title", "seconds", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
