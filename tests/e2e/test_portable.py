"""A complete bundle answers wherever jax is: without the model's code, from any folder, for any user."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.export
from runtime import buckets
from runtime.bundle import Bundle
from tests.bundles import copy_without_graphs
from tests.runtime.media import real_photo

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("optimising_compiler")

WITHOUT_THE_MODEL = """
import sys

FORBIDDEN = {"flax", "keye_jax", "kernels_pallas", "convert", "orbax", "torch", "transformers"}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refuse())
from runtime.generate import main

code = main(sys.argv[1:])
assert not FORBIDDEN & set(sys.modules)
sys.exit(code)
"""


def generate(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m runtime.generate` in a process that cannot import the model."""
    command = [sys.executable, "-c", WITHOUT_THE_MODEL, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def answer(*arguments: object, **environment: str) -> dict[str, Any]:
    done = generate(*arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert "exporting" not in done.stderr
    return json.loads(done.stdout)


def export(bundle: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # The larger pictures' graphs are more of the same.
        patch.setattr(buckets, "MAX_PATCHES", 256)
        assert runtime.export.main([str(bundle), "--platform", "cpu", "--context", "512"]) == 0


@pytest.fixture(scope="module")
def complete(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden bundle with its graphs, moved after they were made."""
    made = copy_without_graphs(golden_bundle, tmp_path_factory.mktemp("made") / "bundle")
    export(made)
    return Path(shutil.move(made, tmp_path_factory.mktemp("moved") / "another (name)"))


@pytest.fixture(scope="module")
def question(golden: dict[str, np.ndarray]) -> list[str]:
    return ["--token-ids", ",".join(map(str, golden["text_long/input_ids"])), "--max-new-tokens", "16"]


def test_a_moved_bundle_gives_another_user_the_golden_tokens_without_the_model(
    golden: dict[str, np.ndarray], complete: Path, question: list[str], tmp_path: Path
) -> None:
    """With nothing of the first user's at hand: another home, no XDG folder, an empty compilation cache."""
    before = (complete / "manifest.json").read_bytes()
    (tmp_path / "home").mkdir()
    result = answer(complete, *question, HOME=str(tmp_path / "home"), XDG_CACHE_HOME="")
    assert result["token_ids"] == golden["text_long/fp8_on/decode_tokens"].tolist()
    assert (complete / "manifest.json").read_bytes() == before
    assert list((tmp_path / "home" / ".cache" / "keye-jax" / "compiled").iterdir())


@pytest.mark.slow
def test_it_answers_about_a_photograph_without_the_model(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = copy_without_graphs(tiny_bundle, tmp_path / "copy")
    export(copy)
    photo = ["--image", real_photo(), "--max-pixels", 50176, "--prompt", "What is in this picture?"]
    result = answer(copy, *photo, "--max-new-tokens", 12, "--temperature", 0)
    assert len(result["token_ids"]) == 12 or result["finish_reason"] == "stop"
    assert (result["text"] or "") + (result["thinking"] or "")
    assert result["prompt_tokens"] > 60


def test_a_missing_graph_is_an_error_with_the_command_that_makes_it(
    complete: Path, question: list[str], tmp_path: Path
) -> None:
    lacking = Path(shutil.copytree(complete, tmp_path / "lacking"))
    done = generate(lacking, *question[:-1], "600")
    assert done.returncode == 2
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the bundle has no graph decode-cpu-d1-batch1-context2048" in error
    assert "needs the package 'keye_jax'" in error
    assert error.endswith(f"run: python -m runtime.export {lacking} --platform cpu --context 2048 --batch 1")
    assert "Traceback" not in done.stderr
    assert Bundle.open(lacking).graphs == Bundle.open(complete).graphs
