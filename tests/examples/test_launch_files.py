"""The files that start several processes hold together; clusters are not at hand to run them."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.generate import _parser

EXAMPLES = Path(__file__).parents[2] / "examples"
ASKED = ["gs://bucket/bundle", "--video", "a clip.mp4", "--prompt", 'What\'s in "it"; $HOME?']


def jobset() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sh"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = EXAMPLES / script
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("script", "tool", "options"), [("tpu_pod.sh", "gcloud", ["pod", "zone-a"]), ("slurm.sh", "srun", [])]
)
def test_scripts_hand_the_request_over_word_for_word(
    tmp_path: Path, script: str, tool: str, options: list[str]
) -> None:
    # Stands for the launcher: runs what it is to start, with a python that writes its arguments down.
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nshift\nexec "$@"\n')
    for name in ("python", "python3"):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" > {tmp_path / 'words'}\n")
    (tmp_path / "gcloud").write_text('#!/usr/bin/env bash\ncommand=${@: -1:1}\nexec bash -c "${command#--command=}"\n')
    for name in ("gcloud", "srun", "python", "python3"):
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([EXAMPLES / script, *options, *ASKED], env=env, check=True)
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert words == ["-m", "runtime.generate", *ASKED]
    _parser().parse_args(words[2:])


def test_the_jobset_asks_for_every_host_of_its_slice() -> None:
    manifest = jobset()
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == spec["parallelism"] * chips == spec["completions"] * chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert container["command"][:3] == ["python", "-m", "runtime.generate"]
    assert _parser().parse_args(container["command"][3:]).bundle.startswith("gs://")
