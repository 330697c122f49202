"""Compiled programs are code: they are kept where only this user can write, and a second start compiles nothing."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from runtime import compile_cache, generate, plan
from runtime.errors import InputError

ROOT = Path(__file__).parents[2]

COUNTING = """
import collections, json, sys
import jax.monitoring
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **kwargs: events.update([name.rsplit("/", 1)[1]]))
from runtime.generate import main
code = main(sys.argv[1:])
print(json.dumps(events), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache will be; jax's own settings come back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    return tmp_path / "xdg" / "keye-jax" / "compiled"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_directory_is_made_private_whatever_the_umask(cache: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert compile_cache.enable() == cache
    finally:
        os.umask(before)
    assert (mode(cache.parent), mode(cache)) == (0o700, 0o700)
    assert compile_cache.enable() == cache


def test_a_directory_that_others_may_read_is_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    for folder in (cache.parent, cache):
        folder.chmod(0o755)
    assert compile_cache.enable() == cache


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("bits", [0o770, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_can_write_is_refused(cache: Path, bits: int, inner: bool) -> None:
    cache.mkdir(parents=True, mode=0o700)
    folder = cache if inner else cache.parent
    folder.chmod(bits)
    with pytest.raises(InputError, match=f"others can write to the compilation cache {folder};.*chmod 700 {folder}"):
        compile_cache.enable()


def test_a_link_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir(parents=True, mode=0o700)
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not a folder of this user"):
        compile_cache.enable()


def test_a_file_in_its_place_is_refused(cache: Path) -> None:
    cache.parent.mkdir(parents=True, mode=0o700)
    cache.touch()
    with pytest.raises(InputError, match="cannot be made"):
        compile_cache.enable()


def test_the_directory_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cache.enable()
    monkeypatch.setattr(os, "getuid", lambda: os.stat(cache).st_uid + 1)
    with pytest.raises(InputError, match="is not a folder of this user; remove it, or set XDG_CACHE_HOME"):
        compile_cache.enable()


def test_a_relative_xdg_folder_is_ignored_as_its_specification_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("here", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert compile_cache.directory() == tmp_path / ".cache" / "keye-jax" / "compiled"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        compile_cache.directory()


@pytest.mark.parametrize("command", [generate.main, plan.main])
def test_commands_refuse_a_cache_that_others_can_write_in_one_line(
    golden_bundle: Path, cache: Path, command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert command([str(golden_bundle), "--token-ids", "1,2", "--max-new-tokens", "1"]) == 2  # pyright: ignore[reportCallIssue]
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(errors) == 1
    assert errors[0].startswith("error: others can write to the compilation cache")


@pytest.mark.slow
def test_a_second_process_compiles_nothing(golden: dict[str, np.ndarray], golden_bundle: Path) -> None:
    ids = ",".join(map(str, golden["text_short/input_ids"]))
    arguments = [golden_bundle, "--token-ids", ids, "--max-new-tokens", "16", "--json"]
    events = {}
    for attempt in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        events[attempt] = json.loads(done.stderr.splitlines()[-1])
        assert json.loads(done.stdout)["token_ids"] == golden["text_short/fp8_on/decode_tokens"].tolist()
    assert events["second"].get("cache_misses", 0) == 0
    assert events["second"]["cache_hits"] == sum(
        events["first"].get(name, 0) for name in ("cache_hits", "cache_misses")
    )
    assert events["second"]["cache_hits"] >= 2
