"""A graph made by the oldest JAX at hand runs under the newest, and gives the same tokens.

The environments are this one and those that `make TARGET PYTHON=...` keeps beside the project.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.bundle import Bundle
from tests.bundles import copy_without_graphs

ROOT = Path(__file__).parents[2]
PROBE = """
import importlib.util, importlib.metadata, sys
needed = ("jax", "flax", "tensorstore", "tokenizers", "jinja2", "PIL", "imageio")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
sys.exit(f"lacks {missing}") if missing else print(importlib.metadata.version("jax"))
"""


def run(python: Path, *arguments: object) -> str:
    # A TPU environment's jax would look for chips.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def environments() -> dict[tuple[int, ...], Path]:
    """Interpreters that can export and run, by their JAX version."""
    found = {}
    for python in [Path(sys.executable), *sorted(ROOT.glob(".venv*/bin/python"))]:
        try:
            version = run(python, "-c", PROBE).strip()
        except (OSError, subprocess.CalledProcessError):
            continue
        found.setdefault(tuple(int(part) for part in version.split(".") if part.isdigit()), python)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("optimising_compiler")
def test_a_graph_of_the_oldest_jax_runs_under_the_newest(
    golden: dict[str, np.ndarray], golden_bundle: Path, tmp_path: Path
) -> None:
    versions = environments()
    oldest, newest = min(versions), max(versions)
    if oldest[:2] == newest[:2]:
        pytest.skip(
            f"only JAX {'.'.join(map(str, oldest))} is installed here; `make quick PYTHON=python3.13` adds a newer one"
        )
    copy = copy_without_graphs(golden_bundle, tmp_path / "copy")
    run(versions[oldest], "-m", "runtime.export", copy, "--platform", "cpu", "--context", "512")
    made = {entry.jax_version for entry in Bundle.open(copy).graphs.values()}
    assert [tuple(map(int, version.split("."))) for version in made] == [oldest]

    before = (copy / "manifest.json").read_bytes()
    ids = ",".join(map(str, golden["text_long/input_ids"]))
    question = ["--token-ids", ids, "--max-new-tokens", "16", "--json"]
    result = json.loads(run(versions[newest], "-m", "runtime.generate", copy, *question))
    assert result["token_ids"] == golden["text_long/fp8_on/decode_tokens"].tolist()
    assert (copy / "manifest.json").read_bytes() == before
