"""The arguments that say what is asked, as the processor gets them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InputError
from runtime.media_options import ImageOptions, VideoOptions
from runtime.request import add_request_arguments, prepare_request


class Recorder:
    """Stands for the processor and keeps what it was asked for."""

    def prepare(self, messages: Any, **options: Any) -> str:
        self.messages, self.options = messages, options
        return "from messages"

    def prepare_token_ids(self, ids: Any, media: Any, **options: Any) -> str:
        self.ids, self.media, self.options = ids, media, options
        return "from ids"


def ask(*arguments: object) -> Recorder:
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    recorder: Any = Recorder()
    recorder.prompt = prepare_request(recorder, parser.parse_args([*map(str, arguments)]), lambda *_: None)
    return recorder


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        ask(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_media_keep_the_order_of_the_command_line_and_stand_before_the_question() -> None:
    asked = ask("--video", "a.mp4", "--prompt", "Why?", "--image", "b.png", "--video", "c.mp4", "--system", "Be short.")
    assert asked.messages == [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "a.mp4"},
                {"type": "image", "image": "b.png"},
                {"type": "video", "video": "c.mp4"},
                {"type": "text", "text": "Why?"},
            ],
        },
    ]


def test_one_command_line_leaves_nothing_to_the_next() -> None:
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    parser.parse_args(["--prompt", "x", "--image", "a.png"])
    assert parser.parse_args(["--prompt", "x"]).media == []


def test_token_ids_go_with_media() -> None:
    asked = ask("--token-ids", "1, 2,3", "--image", "a.png")
    assert asked.ids == [1, 2, 3]
    assert asked.media == [{"type": "image", "image": "a.png"}]


def test_options_reach_the_kind_of_medium_they_are_for() -> None:
    timing = ["--fps", 1, "--max-frames", 9, "--video-start", 2, "--video-end", 5]
    options = ask("--prompt", "x", "--max-pixels", 100_352, *timing).options
    assert options["image_options"] == ImageOptions(max_pixels=100_352)
    expected = VideoOptions(max_pixels=100_352, fps=1.0, max_frames=9, video_start=2.0, video_end=5.0)
    assert options["video_options"] == expected
    unset = ask("--prompt", "x").options
    assert (unset["image_options"], unset["video_options"]) == (ImageOptions(), VideoOptions())


def test_messages_come_from_a_file_with_or_without_tools(tmp_path: Path) -> None:
    messages, tools = [{"role": "user", "content": "Hi"}], [{"type": "function"}]
    path = tmp_path / "m.json"
    path.write_text(json.dumps(messages))
    assert ask("--messages", path).messages == messages
    path.write_text(json.dumps({"messages": messages, "tools": tools}))
    asked = ask("--messages", path)
    assert (asked.messages, asked.options["tools"]) == (messages, tools)


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("[]")
    assert "--system goes with --prompt only" in refusal("--messages", path, "--system", "x")
    assert "--system goes with --prompt only" in refusal("--token-ids", "1", "--system", "x")
    assert "name media inside the --messages file" in refusal("--messages", path, "--image", "a.png")


@pytest.mark.parametrize("ids", ["", "1,", "a", "1.5", "1;2", "0x10"])
def test_token_ids_are_whole_numbers(ids: str) -> None:
    assert "must be whole numbers with commas" in refusal("--token-ids", ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[1", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"message": []}', "has the unknown key 'message'"),
        ('{"messages": [], "tool": []}', "has the unknown key 'tool'"),
        ('{"tools": []}', "has no 'messages'"),
    ],
)
def test_messages_files_of_another_form_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)
    assert message in refusal("--messages", path)


def test_messages_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be read (No such file or directory)" in refusal("--messages", tmp_path / "none.json")
    assert "cannot be read (Is a directory)" in refusal("--messages", tmp_path)
    path = tmp_path / "m.json"
    path.write_text("[]" + " " * 10)
    monkeypatch.setattr("runtime.request._MAX_MESSAGES_BYTES", 8)
    assert "name media by path instead" in refusal("--messages", path)
