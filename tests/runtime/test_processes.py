"""`python -m runtime.generate` in several processes, as a user starts them on one machine."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.processes
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.generate import main
from runtime.processes import ALONE, join
from tests.bundles import copy_without_graphs
from tests.runtime.ports import free_port

ROOT = Path(__file__).parents[2]

# Sends this process a signal when the first tokens have come.
SIGNALLED = """
import os, signal, sys
from runtime.executor import Executor
from runtime.generate import main

steps = Executor._steps
def signalled(*args):
    for number, rows in enumerate(steps(*args)):
        yield rows
        if number == 1:
            os.kill(os.getpid(), signal.{signal})
Executor._steps = signalled
sys.exit(main())
"""

# The same engine under a program of one's own: a golden prompt with images and a video.
GOLDEN_MIXED = """
import json, sys
import numpy as np
from runtime.engine import Engine
from runtime.processes import join

bundle, root, _, coordinator, _, count, _, index = sys.argv[1:]
processes = join(coordinator, int(count), int(index))
from tests.runtime.test_executor import generate, golden_prompt

executor = Engine.load(bundle, processes=processes).executor()
with np.load(f"{root}/tests/golden/golden.npz", allow_pickle=False) as golden:
    (row,) = generate(executor, [golden_prompt(golden, "mixed")])
print(json.dumps({"devices": executor.programs.mesh.size, "tokens": row}))
sys.exit(processes.end(0))
"""


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    out: str
    err: str


def run_all(commands: list[list[object]], *, programs: dict[int, str] | None = None, devices: int = 1) -> list[Ended]:
    """Runs one process for each list of arguments, side by side.

    Args:
        programs: what a process runs instead of the command line, by its index.
        devices: CPU devices of each.
    """
    # Compiling takes most of the time; what the compiler leaves out changes no token.
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    port, running = free_port(), []
    for index, command in enumerate(commands):
        program = ["-c", (programs or {})[index]] if index in (programs or {}) else ["-m", "runtime.generate"]
        joining = ["--coordinator", f"localhost:{port}", "--num-processes", len(commands), "--process-id", index]
        arguments = [sys.executable, *program, *map(str, [*command, *joining])]
        running.append(
            subprocess.Popen(arguments, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        # A hang is a failure, whatever the machine is busy with besides.
        heard = [process.communicate(timeout=280) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(running, heard, strict=True)]


@pytest.fixture(scope="module")
def bundle(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_without_graphs(golden_bundle, tmp_path_factory.mktemp("processes") / "bundle")


@pytest.mark.slow
def test_four_processes_give_the_golden_tokens_and_only_the_first_speaks(
    golden: dict[str, np.ndarray], bundle: Path, tmp_path: Path
) -> None:
    count = 4
    ids = ",".join(map(str, golden["text_long/input_ids"]))
    command: list[object] = [bundle, "--token-ids", ids, "--max-new-tokens", 16, "--preset", "expert", "--json"]
    # The others have a copy of the bundle, of which they write nothing.
    copy = copy_without_graphs(bundle, tmp_path / "bundle")
    first, *others = run_all([command, *[[copy, *command[1:]]] * (count - 1)])
    assert first.code == 0, first.err
    assert json.loads(first.out)["token_ids"] == golden["text_long/fp8_on/decode_tokens"].tolist()
    assert "compiling decode" in first.err
    assert others == [Ended(0, "", "")] * (count - 1)
    stored = [key.program for key in Bundle.open(bundle).graphs if key.devices == count]
    assert sorted(stored) == ["decode", "prefill"]
    assert not Bundle.open(copy).graphs


@pytest.mark.slow
def test_processes_with_two_devices_each_give_the_golden_tokens_of_images_and_video(
    golden: dict[str, np.ndarray], bundle: Path
) -> None:
    first, second = run_all([[bundle, ROOT]] * 2, programs={0: GOLDEN_MIXED, 1: GOLDEN_MIXED}, devices=2)
    assert first.code == 0, first.err
    for spoken in (first, second):
        assert json.loads(spoken.out) == {"devices": 4, "tokens": golden["mixed/fp8_on/decode_tokens"].tolist()}


@pytest.mark.slow
def test_a_killed_process_ends_the_other_which_names_it(bundle: Path) -> None:
    command = [bundle, "--token-ids", "5,6,7,8", "--max-new-tokens", 300]
    first, second = run_all([command] * 2, programs={1: SIGNALLED.format(signal="SIGKILL")})
    assert second.code == -signal.SIGKILL
    assert first.code == 1
    assert first.out == ""
    assert "no answer from process 1" in first.err


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_ctrl_c_in_one_process_ends_all(bundle: Path, golden_bundle: Path, tmp_path: Path, index: int) -> None:
    # The other one's bundle has no graphs, from which it would choose another length of chunks.
    bundles = (bundle, copy_without_graphs(golden_bundle, tmp_path / "bundle"))
    commands = [[path, "--token-ids", "5,6,7,8", "--max-new-tokens", 300, "--json"] for path in bundles]
    ended = run_all(commands, programs={index: SIGNALLED.format(signal="SIGINT")})
    assert [process.code for process in ended] == [130, 130]
    if index == 0:
        assert json.loads(ended[0].out)["finish_reason"] == "interrupted"
    else:
        assert "process 1: interrupted" in ended[0].err


def test_a_differing_prompt_is_refused_by_all(bundle: Path) -> None:
    ended = run_all([[bundle, "--token-ids", "5,6,7"], [bundle, "--token-ids", "5,6,8"]])
    assert [(process.code, process.out) for process in ended] == [(2, ""), (2, "")]
    for process in ended:
        assert "process 1: this process has other prompt tokens than process 0" in process.err


def test_a_differing_image_is_refused_by_all(tiny_bundle: Path, tmp_path: Path) -> None:
    # Of the same size: only pixels differ.
    for name, colour in (("a.png", "red"), ("b.png", "darkred")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    ended = run_all([[tiny_bundle, "--prompt", "x", "--image", tmp_path / name] for name in ("a.png", "b.png")])
    assert [(process.code, process.out) for process in ended] == [(2, ""), (2, "")]
    assert "other images or frames than" in ended[0].err


def test_differing_options_are_refused_by_all(bundle: Path) -> None:
    common = [bundle, "--token-ids", "5,6,7", "--temperature", 1]
    ended = run_all([[*common, "--seed", 1], [*common, "--seed", 1], [*common, "--seed", 2]])
    assert [process.code for process in ended] == [2, 2, 2]
    assert "process 2: this process has other sampling options" in ended[0].err


@pytest.mark.parametrize("wrong", [0, 1])
def test_bad_input_in_one_process_ends_all_with_its_reason(bundle: Path, wrong: int) -> None:
    begun = time.monotonic()
    ended = run_all([[bundle, "--token-ids", "99999" if index == wrong else "5"] for index in range(2)])
    # Far from any time-out of JAX.
    assert time.monotonic() - begun < 60
    assert [(process.code, process.out) for process in ended] == [(2, ""), (2, "")]
    for process in ended:
        assert f"error: process {wrong}: the token ids hold 99999" in process.err


def test_a_missing_process_is_named_by_the_command_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime.processes, "JOIN_SECONDS", 0.5)
    joining = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "3", "--process-id", "0"]
    assert main([str(bundle), "--prompt", "x", *joining]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: process 0 of 3: processes 1, 2 have not joined" in captured.err


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("host:1", None, None), "go together"),
        ((None, 2, 0), "go together"),
        (("host", 2, 0), "'host' must be HOST:PORT"),
        (("host:0", 2, 0), "'host:0' must be HOST:PORT"),
        (("host:70000", 2, 0), "must be HOST:PORT"),
        (("ho st:80", 2, 0), "must be HOST:PORT"),
        (("::1:80", 2, 0), "must be HOST:PORT"),
        (("host:80", 0, 0), "--num-processes 0"),
        (("host:80", 1 << 20, 0), "--num-processes 1048576"),
        (("host:80", 2, 2), "--process-id 2 must be from 0 to 1"),
        (("host:80", 2, -1), "--process-id -1"),
    ],
)
def test_bad_options_are_named(options: tuple[str | None, int | None, int | None], wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        join(*options)


def test_one_process_joins_nothing_and_does_not_load_jax() -> None:
    assert join("localhost:1", 1, 0) is ALONE
    program = "import sys; from runtime.processes import ALONE, join; assert join(None, None, None) is ALONE; "
    program += "assert 'jax' not in sys.modules"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, check=True)


def test_slurm_says_which_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"JOB_ID": "77", "STEP_NODELIST": "localhost", "NTASKS": "3", "PROCID": "2", "LOCALID": "0"}
    for name, value in {**told, "STEP_NUM_TASKS": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(runtime.processes, "JOIN_SECONDS", 1.0)
    with pytest.raises(InputError, match="process 2 of 3: process 0 has not joined"):
        join(None, None, None)


def test_one_process_of_a_slurm_allocation_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert join(None, None, None) is ALONE
