"""The benchmark over several devices: what it reads off compiled programs; a broken figure costs no other one."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_mesh
from benchmarks.gpu import mesh_checks, mesh_model
from benchmarks.gpu.mesh_programs import Graph, collectives, kernel_calls
from benchmarks.gpu.model import TINY, TINY_JSON
from benchmarks.gpu.record import Record
from keye_jax.config import KeyeConfig
from runtime.graphs import GraphKey


def custom_call(target: str, scope: str) -> str:
    return f'f32[8]{{0}} custom-call(%x), custom_call_target="{target}", metadata={{op_name="jit(call)/{scope}"}}'


TEXT = f"""HloModule jit_call, num_partitions=2

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum.1 = f32[] add(%a, %b)
}}

%body (carry: (f32[8])) -> (f32[8]) {{
  %all-reduce.1 = f32[8]{{0}} all-reduce(%x), to_apply=%add
  %call.1 = {custom_call("__gpu$xla.gpu.triton", "while/body/cond/branch_0_fun/attend_ids/pallas_call")}
  %all-gather-start.1 = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%y), dimensions={{0}}
  %all-gather-done.1 = f32[8]{{0}} all-gather-done(%all-gather-start.1)
  %all-reduce.2 = f32[8]{{0}} all-reduce(%all-gather-done.1), to_apply=%add
  %call.2 = {custom_call("mosaic_gpu_v2", "body/jit(select_block)/index_scores/mpmd_map")}
  %all-gather.2 = f32[8]{{0}} all-gather(%call.2), dimensions={{0}}
  %call.3 = {custom_call("__cublas$lt$matmul", "dot_general")}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %all-reduce.3 = f32[8]{{0}} all-reduce(%p), to_apply=%add
}}
"""


def test_communication_is_told_for_a_layer_and_beside_the_layers() -> None:
    assert collectives(TEXT, 2) == ({"all-reduce": 1, "all-gather": 1}, {"all-reduce": 1})


def test_kernels_of_ours_are_named_and_others_are_not() -> None:
    assert kernel_calls(TEXT) == {"attend_ids": 1, "index_scores": 1}


def test_the_tiny_model_is_what_its_graphs_are_exported_from() -> None:
    assert KeyeConfig.from_hf(TINY_JSON) == TINY
    checks = mesh_checks.Checks([("context", 2), ("expert", 2)], "cpu", tokens=256)
    found = checks.graphs()
    assert len(set(found)) == len(found) == 16
    assert {graph.key.plain for graph in found if graph.key.devices == 1} == {True}
    small = [graph for graph in found if graph.dtype == "bfloat16"]
    assert {graph.key.shape for graph in small} == {(2, 256, 512), (2, 512)}


def test_a_plan_names_every_program_once() -> None:
    layouts = (("single", 1), ("context", 2), ("expert", 2))
    plan = mesh_model.Plan("30b", layouts, (32768, 131072), (8192, 131072), 8192, 2, "cuda")
    names = [graph.key.name for layout in layouts for graph in plan.graphs(layout).values()]
    assert len(set(names)) == len(names) == 12
    assert "prefill-cuda-d2-context-batch1-chunk8192-context131072" in names


def test_logits_are_compared_with_those_of_one_device(tmp_path: Path) -> None:
    """Also by a process that was begun again, which has not seen them."""

    def differences(devices: int, logits: list[float]) -> Any:
        full = object.__new__(mesh_model.FullSize)
        full._folder = tmp_path
        program: Any = type(
            "Program", (), {"key": GraphKey("decode", "cpu", devices, (1, 128), preset=presets[devices])}
        )
        return full._against_one(program, "whole-128", jnp.array(logits).__array__())

    presets = {1: "single", 2: "context"}
    assert differences(2, [1.0]) is None
    assert differences(1, [1.0, -4.0]) == {"largest": 0.0, "mean": 0.0, "same_token": True}
    assert differences(2, [2.0, -4.0]) == {"largest": 0.25, "mean": 0.125, "same_token": True}
    assert differences(2, [-5.0, -4.0])["same_token"] is False


def test_links_are_measured() -> None:
    found = mesh_model.links(2, 1 << 16)
    assert set(found) == {"us_8_kb", "gb_per_s"}
    assert min(found.values()) > 0


def run(script: str, out: Path, seconds: float = 20) -> tuple[int, str]:
    """`_watch` on a process that runs Python code."""
    return gpu_mesh._watch([sys.executable, "-c", script], {}, out, time.monotonic() + seconds)


def test_a_process_that_dies_or_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "r.json", 1)
    record.put(("doing",), "prefill.512.1")
    assert run("raise SystemExit(1)", record.path) == (1, "the process ended in it, exit code 1")
    assert run("import os; os.abort()", record.path)[0] == 1
    assert run("import time; time.sleep(60)", record.path, seconds=0.5) == (1, "time was over")
    monkeypatch.setattr(gpu_mesh, "STUCK", 0.5)
    record.put(("doing",), "prefill.512.1")
    assert run("import time; time.sleep(60)", record.path) == (1, "hung for 0 s")


def test_the_figures_after_a_broken_one_are_found_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each figure is tried once: neither what is known nor what broke the process is begun again."""
    out, tried = tmp_path / "r.json", []

    def worker(*_: Any) -> tuple[int, str]:
        def find(name: str) -> Callable[[], float]:
            def found() -> float:
                tried.append(name)
                if name == "b":
                    raise KeyboardInterrupt  # what no figure survives
                return 1.0

            return found

        try:
            gpu_mesh._measure((((name,), find(name)) for name in "abc"), Record(out, 60))
        except KeyboardInterrupt:
            return 1, "the process ended in it"
        return 0, ""

    monkeypatch.setattr(gpu_mesh, "_watch", worker)
    assert gpu_mesh.main(["--out", str(out), "--config", "tiny", "--commit", "abc"]) == 0
    assert tried == ["a", "b", "c"]
    record = Record(out, 0)
    assert (record.get("a"), record.get("b"), record.get("c"), record.get("doing")) == (1.0, None, 1.0, None)
    assert record.get("failed") == {"b": "the process ended in it"}
    assert record.get("command").startswith("python -m benchmarks.gpu_mesh --out")


def test_a_graph_has_a_file_of_its_own() -> None:
    key = GraphKey("decode", "cpu", 1, (1, 128))
    files = {Graph("{}", dtype, "fp8", key).file for dtype in ("float32", "bfloat16")}
    assert len(files) == 2


def test_the_table_shows_the_speed_up_and_what_is_missing() -> None:
    check = {"passed": True, "error": 0.0, "bound": 0, "kernels": ["attend_ids"]}
    data = {
        "checks": {"golden tokens fp8_on": {"2 context": check}},
        "prefill": {"32768": {"1": {"seconds": 1.0}, "2 context": {"seconds": 0.5}}},
        "decode": {"8192": {"2 context": {"ms": 3.5}}},
        "failed": {"decode.8192.1": "hung for 60 s"},
    }
    text = gpu_mesh.table(data)
    for part in ("attend_ids", "2.00 x", "3.5 ms", "failed: decode.8192.1: hung"):
        assert part in text


def test_devices_that_answer() -> None:
    assert gpu_mesh._devices_answer()
    assert len(jax.devices()) >= 2
