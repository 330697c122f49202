"""The command line as a user types it: answers, errors, exit codes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.generate import main
from tests.runtime.media import real_clip, real_photo

CONTRACT = ("text", "token_ids", "finish_reason", "prompt_tokens", "attention_path", "frames", "timings")


def run_json(capsys: pytest.CaptureFixture[str], *args: object) -> dict:
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a refused command prints."""
    assert main([*map(str, args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_token_ids_give_the_golden_tokens(
    golden: dict[str, np.ndarray], golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(map(str, golden["text_long/input_ids"]))
    result = run_json(capsys, golden_bundle, "--token-ids", ids, "--max-new-tokens", 16)
    assert result["token_ids"] == golden["text_long/fp8_on/decode_tokens"].tolist()
    assert result["text"] is None
    assert result["prompt_tokens"] == 112
    assert set(CONTRACT) <= set(result)


def test_a_real_clip_and_a_real_photograph_in_one_prompt(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = ["--video", real_clip(), "--image", real_photo(), "--max-frames", 4, "--max-pixels", 50176]
    result = run_json(capsys, tiny_bundle, *media, "--prompt", "What is this?", "--max-new-tokens", 4)
    (video,) = result["frames"]
    assert 2 <= len(video["timestamps"]) <= 4
    assert video["source"] == real_clip().name
    # 64 tokens an image or frame at this size, and the words around them.
    assert result["prompt_tokens"] > 40 * (len(video["timestamps"]) + 1)


def test_the_answer_streams_to_stdout_and_the_rest_to_stderr(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), "--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert "finish: " in captured.err
    assert "prompt tokens" not in captured.out


def test_messages_files_hold_conversations_and_tools(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = {"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What time is it?"},
    ]
    plain, tools = tmp_path / "plain.json", tmp_path / "tools.json"
    plain.write_text(json.dumps(messages))
    tools.write_text(json.dumps({"messages": messages, "tools": [tool]}))
    short = run_json(capsys, tiny_bundle, "--messages", plain, "--max-new-tokens", 2)
    long = run_json(capsys, tiny_bundle, "--messages", tools, "--max-new-tokens", 2)
    assert long["prompt_tokens"] > short["prompt_tokens"]


def test_sampling_flags_replace_the_checkpoints_settings(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (tiny_bundle, "--prompt", "Hello", "--max-new-tokens", 6)
    sampled = run_json(capsys, *common, "--temperature", 5.0, "--top-p", 1.0, "--top-k", 0, "--seed", 5)
    assert sampled["options"]["seed"] == 5
    assert sampled["options"]["temperature"] == 5.0
    again = run_json(capsys, *common, "--temperature", 5.0, "--top-p", 1.0, "--top-k", 0, "--seed", 5)
    other = run_json(capsys, *common, "--temperature", 5.0, "--top-p", 1.0, "--top-k", 0, "--seed", 6)
    assert sampled["token_ids"] == again["token_ids"] != other["token_ids"]


def test_bad_bundles_are_named(golden_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent" in refused(capsys, tmp_path / "absent", "--prompt", "x")
    checkpoint = Path(__file__).parents[1] / "golden" / "checkpoint"
    assert "python -m convert" in refused(capsys, checkpoint, "--prompt", "x")
    assert "--token-ids" in refused(capsys, golden_bundle, "--prompt", "x")


def test_bad_media_are_named(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text = tmp_path / "empty.png", tmp_path / "text.mp4"
    empty.touch()
    text.write_text("no video")
    thin = tmp_path / "thin.png"
    Image.new("RGB", (3000, 2)).save(thin)
    ask = (tiny_bundle, "--prompt", "x")
    assert "absent.jpg" in refused(capsys, *ask, "--image", tmp_path / "absent.jpg")
    assert "empty.png" in refused(capsys, *ask, "--image", empty)
    assert "thin.png" in refused(capsys, *ask, "--image", thin)
    assert "text.mp4" in refused(capsys, *ask, "--video", text)
    assert "empty.png" in refused(capsys, *ask, "--video", empty)
    assert "http" in refused(capsys, *ask, "--video", "http://localhost/clip.mp4")
    assert "fps" in refused(capsys, *ask, "--video", real_clip(), "--fps", "-1")


def test_bad_requests_are_named(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, roleless = tmp_path / "broken.json", tmp_path / "roleless.json"
    broken.write_text("{")
    roleless.write_text('[{"role": "judge", "content": "x"}]')
    assert "broken.json" in refused(capsys, tiny_bundle, "--messages", broken)
    assert "judge" in refused(capsys, tiny_bundle, "--messages", roleless)
    assert "absent.json" in refused(capsys, tiny_bundle, "--messages", tmp_path / "absent.json")
    assert "--token-ids" in refused(capsys, tiny_bundle, "--token-ids", "1,x")
    assert "99999" in refused(capsys, tiny_bundle, "--token-ids", "1,99999")
    assert "context" in refused(capsys, tiny_bundle, "--prompt", "x", "--max-new-tokens", 1 << 20)
    assert "max_new_tokens" in refused(capsys, tiny_bundle, "--prompt", "x", "--max-new-tokens", 0)
    assert "temperature" in refused(capsys, tiny_bundle, "--prompt", "x", "--temperature", "-1")
    assert "--system" in refused(capsys, tiny_bundle, "--token-ids", "1", "--system", "x")


def test_a_prompt_longer_than_the_context_says_how_to_shorten_it(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tiny_bundle, "--prompt", "x", "--max-new-tokens", 33000)
    assert "--max-frames" in line


def test_debug_shows_the_traceback(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        main([str(tiny_bundle), "--prompt", "x", "--image", "absent.png", "--debug"])


def test_ctrl_c_prints_what_there_is(tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "runtime.generate", str(tiny_bundle), "--prompt", "Hello"]
    command += ["--max-new-tokens", "30000", "--temperature", "0"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as process:
        assert process.stderr is not None
        seen = b""
        while b"(thinking) " not in seen:
            byte = process.stderr.read(1)
            assert byte, seen
            seen += byte
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode(errors="replace")
    assert process.returncode == 130
    assert "finish: interrupted" in rest
    assert "Traceback" not in rest
