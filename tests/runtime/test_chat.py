"""Messages are understood exactly or refused with their place; ChatML is written as Qwen3 writes it."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.chat import ChatSettings, Trusted, frame_label, parse_messages, parse_tools, render_chatml
from runtime.errors import InputError
from runtime.media_items import MediaItem

LOOK = {"type": "function", "function": {"name": "look", "description": "Look at a second.", "parameters": {}}}
QUESTION = {"role": "user", "content": "Why?"}


def rendered(messages, tools=None, settings=None):
    """The prompt as one string; media as [kind]."""
    segments = render_chatml(parse_messages(messages), parse_tools(tools), settings or ChatSettings())
    names = [s.text if isinstance(s, Trusted) else f"[{s.kind}]" if isinstance(s, MediaItem) else s for s in segments]
    return "".join(names)


def first_item(part):
    (item,) = parse_messages([{"role": "user", "content": [part]}])[0].content
    assert isinstance(item, MediaItem)
    return item


def test_one_question():
    assert rendered([QUESTION]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_settings_of_a_checkpoint_without_template():
    settings = ChatSettings(default_system="Be brief.", open_think=False)
    question = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered([QUESTION], settings=settings) == f"<|im_start|>system\nBe brief.<|im_end|>\n{question}"
    system = {"role": "system", "content": "Be long."}
    assert rendered([system, QUESTION], settings=settings) == f"<|im_start|>system\nBe long.<|im_end|>\n{question}"


def test_media_stand_where_they_appear():
    content = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": "x.png"},
        {"type": "video", "video": "y.mp4"},
        {"type": "text", "text": "b"},
    ]
    marked = "a<|vision_start|>[image]<|vision_end|><|vision_start|>[video]<|vision_end|>b"
    assert f"user\n{marked}<|im_end|>" in rendered([{"role": "user", "content": content}])


def test_thinking_of_past_turns_is_dropped():
    turns = [
        QUESTION,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
        {"role": "user", "content": "And?"},
    ]
    assert "<|im_start|>assistant\nBecause.<|im_end|>\n" in rendered(turns)
    turns[1] = {"role": "assistant", "reasoning_content": "hm", "content": "Because."}
    assert "hm" not in rendered(turns)


def test_tool_turns_of_the_current_question_keep_their_thinking():
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    turns = [
        QUESTION,
        {"role": "assistant", "content": None, "reasoning_content": "hm\n", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "a dog"},
        {"role": "tool", "tool_call_id": "2", "content": "a cat"},
    ]
    one = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
    assert rendered(turns) == (
        "<|im_start|>user\nWhy?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nhm\n</think>\n\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\na dog\n</tool_response>\n"
        "<tool_response>\na cat\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_tools_are_declared_in_the_system_turn():
    text = rendered([{"role": "system", "content": "Be brief."}, QUESTION], [LOOK])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "look", "description": "Look at a second.", ' in text
    assert text.index("</tools>") < text.index("<|im_end|>")
    assert rendered([QUESTION], [LOOK]).startswith("<|im_start|>system\n# Tools\n\n")


def test_only_our_own_words_are_trusted():
    """Control text is made of constants: nothing of a message, a tool or a call may be in it."""
    mark = "Zq9"
    turns = [
        {"role": "system", "content": mark},
        {"role": "user", "content": [{"type": "text", "text": mark}]},
        {
            "role": "assistant",
            "content": mark,
            "reasoning_content": mark,
            "tool_calls": [{"function": {"name": mark, "arguments": {mark: mark}}}],
        },
        {"role": "tool", "content": mark},
    ]
    tools = [{"type": "function", "function": {"name": mark, "parameters": {mark: mark}}}]
    segments = render_chatml(parse_messages(turns), parse_tools(tools), ChatSettings())
    assert not any(mark in segment.text for segment in segments if isinstance(segment, Trusted))
    assert sum(segment.count(mark) for segment in segments if isinstance(segment, str)) == 11


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "<|frame|>"), (0.0, "<|frame|>0.0"), (12.34, "<|frame|>12.3"), (3600.0, "<|frame|>3600.0")],
)
def test_frame_label(seconds, text):
    assert frame_label(seconds) == text


def test_options_are_read_in_both_places_and_belong_to_one_item():
    inside = {"type": "video_url", "video_url": {"url": "a.mp4", "preprocess_kwargs": {"fps": 1}}}
    beside = {"type": "video_url", "video_url": {"url": "b.mp4"}, "preprocess_kwargs": {"max_frames": 8}}
    both = {
        "type": "image_url",
        "image_url": {"url": "c.png", "preprocess_kwargs": {"min_pixels": 4000}},
        "preprocess_kwargs": {"max_pixels": 8000, "min_pixels": 4000},
    }
    direct = {"type": "image", "image": "d.png", "max_pixels": 9000}
    plain = {"type": "video", "video": "e.mp4"}
    (message,) = parse_messages([{"role": "user", "content": [inside, beside, both, direct, plain]}])
    assert [item.options for item in message.content if isinstance(item, MediaItem)] == [
        {"fps": 1},
        {"max_frames": 8},
        {"min_pixels": 4000, "max_pixels": 8000},
        {"max_pixels": 9000},
        {},
    ]


def test_options_that_contradict_each_other_are_refused():
    part = {
        "type": "video_url",
        "video_url": {"url": "a.mp4", "preprocess_kwargs": {"fps": 1}},
        "preprocess_kwargs": {"fps": 2},
    }
    with pytest.raises(InputError, match="fps = 2 in one place and 1 in another"):
        first_item(part)


@given(data=st.binary(max_size=50))
def test_data_uris_give_their_bytes(data):
    encoded = base64.b64encode(data).decode()
    assert first_item({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}).source == data
    assert first_item({"type": "video", "video": f"data:video/mp4;codecs=x;base64,{encoded}"}).source == data


def test_local_files():
    assert first_item({"type": "image", "image": "a b:c.png"}).source == "a b:c.png"
    item = first_item({"type": "video_url", "video_url": {"url": "file:///tmp/a%20b.mp4"}})
    assert (item.source, item.kind) == ("/tmp/a b.mp4", "video")
    assert first_item({"type": "image", "image": b"\x89PNG"}).source == b"\x89PNG"


def test_list_of_frames():
    part = {"type": "video", "video": ["a.png", b"b"], "timestamps": [0, 0.5], "fps": 2}
    item = first_item(part)
    assert (item.source, item.timestamps, item.options) == (("a.png", b"b"), (0.0, 0.5), {"fps": 2})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("text", "must be an object"),
        ({"type": "audio"}, "type is 'audio'"),
        ({"text": "x"}, "type is None"),
        ({"type": "text", "text": 3}, "nothing else"),
        ({"type": "text", "text": "x", "cache": 1}, "nothing else"),
        ({"type": "image"}, "has no image"),
        ({"type": "image", "image": "x.png", "fps": 2}, "unknown key 'fps'"),
        ({"type": "image", "image": "x.png", "timestamps": []}, "unknown key 'timestamps'"),
        ({"type": "image_url", "image_url": {"url": "x.png", "detail": "low"}}, "unknown key 'detail'"),
        ({"type": "image_url", "image_url": {"url": b"x"}}, "has no image"),
        ({"type": "image_url", "image_url": ["x"]}, "has no image"),
        ({"type": "video", "video": "x.mp4", "preprocess_kwargs": {"nframes": 3}}, "unknown key 'nframes'"),
        ({"type": "video", "video": "x.mp4", "preprocess_kwargs": 3}, "must be an object"),
        ({"type": "video", "video": "x.mp4", "timestamps": [1]}, "for a list of frames"),
        ({"type": "video", "video": ["x.png"], "timestamps": [1, 2]}, "each of the 1 frames"),
        ({"type": "video", "video": ["x.png"], "timestamps": [float("nan")]}, "times are seconds"),
        ({"type": "video", "video": ["http://x/a.png"]}, "network URLs are off"),
        ({"type": "image", "image": "https://x/a.png"}, "network URLs are off"),
        ({"type": "image", "image": "HTTP://x/a.png"}, "network URLs are off"),
        ({"type": "image", "image": "file://host/a.png"}, "not a file of this machine"),
        ({"type": "image", "image": ""}, "no file name"),
        ({"type": "image", "image": "a\0.png"}, "no file name"),
        ({"type": "image", "image": "file:///a%00.png"}, "no file name"),
        ({"type": "image", "image": "data:image/png,abc"}, "without base64"),
        ({"type": "image", "image": "data:image/png;base64,a"}, "broken base64"),
        ({"type": "image", "image": "data:image/png;base64,????"}, "broken base64"),
        ({"type": "image", "image": "data:video/mp4;base64,AAAA"}, "expected image/"),
    ],
)
def test_parts_that_are_not_understood_are_refused(part, message):
    with pytest.raises(InputError, match=message) as error:
        parse_messages([QUESTION, {"role": "user", "content": [part]}])
    assert "messages[1].content[0]" in str(error.value)
    assert "\n" not in str(error.value)


def test_data_uri_size_is_capped(monkeypatch):
    monkeypatch.setattr("runtime.media_items.MAX_DATA_URI_BYTES", 10)
    with pytest.raises(InputError, match="MiB"):
        first_item({"type": "image", "image": "data:image/png;base64," + "A" * 40})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is empty"),
        ("hello", "must be a list"),
        ([3], r"messages\[0\] must be an object"),
        ([{"role": "bot", "content": "x"}], "role is 'bot'"),
        ([{"role": ["user"], "content": "x"}], "role is"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": 3}], "string or a list of parts"),
        ([{"role": "user", "content": "x", "name": "me"}], "unknown key 'name'"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "unknown key 'tool_calls'"),
        ([QUESTION, {"role": "assistant", "content": "x"}], "ends with the role 'assistant'"),
        ([{"role": "system", "content": "x"}], "ends with the role 'system'"),
        ([{"role": "system", "content": [{"type": "image", "image": "x"}]}, QUESTION], "put it in a user message"),
        ([{"role": "assistant", "content": "x", "reasoning_content": 3}, QUESTION], "reasoning_content must be"),
        ([{"role": "assistant", "tool_calls": "x"}, QUESTION], "list of at most"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}, QUESTION], r"tool_calls\[0\] must be"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, QUESTION], "not valid JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}, QUESTION], "JSON object"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": {1}}}]}, QUESTION], "as JSON"),
        ([QUESTION] * 10_001, "too many"),
    ],
)
def test_conversations_that_are_not_understood_are_refused(messages, message):
    with pytest.raises(InputError, match=message):
        parse_messages(messages)


def test_length_is_capped(monkeypatch):
    monkeypatch.setattr("runtime.chat.MAX_CHARACTERS", 3)
    with pytest.raises(InputError, match="hold 4 characters"):
        parse_messages([QUESTION])


def test_null_values_count_as_absent():
    turn = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "audio": None}
    assert parse_messages([turn, QUESTION])[0].content == ("x",)


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    "tools",
    [
        "look",
        [3],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "retrieval", "function": {"name": "x"}}],
        [{"type": "function", "function": {"name": "x", "default": float("nan")}}],
        [{"type": "function", "function": {"name": "x", "parameters": nested(200_000)}}],
        [LOOK] * 1001,
    ],
)
def test_tools_that_are_not_understood_are_refused(tools):
    with pytest.raises(InputError, match="tools"):
        parse_tools(tools)
