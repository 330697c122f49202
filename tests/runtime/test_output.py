"""The stream is split where the whole turn would be, however it is cut; tool calls never crash the reader."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from examples.tiny_checkpoint import write_tiny_checkpoint
from runtime import output
from runtime.output import ThinkingSplitter, ToolCall, parse_tool_calls, split_thinking
from runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    overrides = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}}
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), overrides=overrides)
    return (folder / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def with_tags(document):
    return Tokenizer(document)


@pytest.fixture(scope="module")
def without_tags(document):
    """A tokenizer whose tags are ordinary text."""
    spec = json.loads(document)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if "think" not in token["content"]]
    return Tokenizer(json.dumps(spec))


def ids_of(tokenizer, text):
    ids = []
    for part in tokenizer.split_control(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids


def stream(tokenizer, ids, open_think):
    splitter = ThinkingSplitter(tokenizer, open_think=open_think)
    pieces = [piece for index in ids for piece in splitter.push(index)] + splitter.flush()
    return splitter, pieces


@pytest.mark.parametrize(
    ("text", "open_think", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, ("hm", "yes")),
        ("hm\n</think>\n\nyes", True, ("hm", "yes")),
        ("hm</think>yes", False, ("hm", "yes")),
        ("<think>\nhm</think>yes", True, ("hm", "yes")),
        ("</think>\n\nyes", True, ("", "yes")),
        ("just an answer", False, (None, "just an answer")),
        ("cut off while think", True, ("cut off while think", "")),
        ("<think>cut off", False, ("cut off", "")),
        ("a </think> b </think> c", False, ("a ", " b </think> c")),
        ("a <think> b", False, (None, "a <think> b")),
        ("", True, ("", "")),
        ("", False, (None, "")),
    ],
)
def test_whole_turns(text, open_think, expected):
    assert split_thinking(text, open_think=open_think) == expected


turns = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", "\n\n", " ", "<", "<th", "think>", "</", "yes", "é", "🎬"]),
    max_size=10,
).map("".join)


@given(text=turns, open_think=st.booleans())
@example(text="<think>\nhm\n\n</think>\n\nyes\n", open_think=False)
@example(text=" \n </think>x", open_think=True)
def test_stream_equals_whole_turn(with_tags, without_tags, text, open_think):
    expected = split_thinking(text, open_think=open_think)
    for tokenizer in (with_tags, without_tags):
        splitter, pieces = stream(tokenizer, ids_of(tokenizer, text), open_think)
        assert (splitter.thinking, splitter.answer) == expected
        relabelled = expected[0] is not None and not open_think and not text.lstrip().startswith("<think>")
        if not relabelled:
            assert "".join(p.text for p in pieces if p.channel == "thinking") == (expected[0] or "")
            assert "".join(p.text for p in pieces if p.channel == "answer") == expected[1]
        assert all(piece.text for piece in pieces)


@pytest.mark.parametrize("open_think", [False, True])
def test_turn_cut_off_after_any_token(with_tags, without_tags, open_think):
    text = "<think>\nIt is a 🎬.\n</think>\n\nA film <b>\n"
    for tokenizer in (with_tags, without_tags):
        ids = ids_of(tokenizer, text)
        for end in range(len(ids) + 1):
            splitter, _ = stream(tokenizer, ids[:end], open_think)
            whole = split_thinking(tokenizer.decode(ids[:end]), open_think=open_think)
            assert (splitter.thinking, splitter.answer) == whole


def test_spelt_out_tag_is_text_where_a_token_exists(with_tags):
    ids = with_tags.encode("a</think>b")
    splitter, pieces = stream(with_tags, ids, open_think=True)
    assert (splitter.thinking, splitter.answer) == ("a</think>b", "")
    assert {piece.channel for piece in pieces} == {"thinking"}


def test_answer_streams_before_the_turn_ends(with_tags):
    splitter = ThinkingSplitter(with_tags, open_think=True)
    for index in ids_of(with_tags, "hm</think>\n\n"):
        splitter.push(index)
    seen = [splitter.push(index) for index in with_tags.encode("A dog runs.")]
    assert all(pieces for pieces in seen)


def test_unfinished_character_before_a_tag_is_not_lost(with_tags):
    ids = [*with_tags.encode("🎬")[:2], with_tags.control_ids["</think>"], *with_tags.encode("x")]
    splitter, _ = stream(with_tags, ids, open_think=True)
    assert (splitter.thinking, splitter.answer) == ("\ufffd", "x")


def test_calls_are_taken_out_of_the_answer():
    answer = (
        "Let me look.\n<tool_call>\n"
        '{"name": "look", "arguments": {"at": 1.5}}\n</tool_call>\n<tool_call>\n'
        '{"name": "now", "arguments": "{}"}\n</tool_call>'
    )
    parsed = parse_tool_calls(answer)
    assert parsed.text == "Let me look."
    assert parsed.tool_calls == (ToolCall("look", {"at": 1.5}), ToolCall("now", {}))
    assert parsed.malformed == ()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 10_000, "not JSON"),
        ('{"name": "a", "arguments": {"x": NaN}}', "NaN"),
        ('{"name": "", "arguments": {}}', "not an object with a name"),
        ('{"name": "a", "arguments": [1]}', "not an object with a name"),
        ('{"name": "a", "arguments": "{"}', "not JSON"),
        ("[1]", "not an object with a name"),
    ],
)
def test_malformed_calls_are_reported_and_kept(body, reason):
    answer = f"a <tool_call>{body}</tool_call> b"
    parsed = parse_tool_calls(answer)
    assert parsed.text == answer
    assert parsed.tool_calls == ()
    assert len(parsed.malformed) == 1
    assert reason in parsed.malformed[0]


def test_call_that_was_cut_off_is_reported():
    parsed = parse_tool_calls('ok <tool_call>{"name": "a", "argu')
    assert parsed.text == 'ok <tool_call>{"name": "a", "argu'
    assert "cut off" in parsed.malformed[0]


def test_number_and_size_of_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(output, "MAX_TOOL_CALLS", 2)
    call = '<tool_call>{"name": "a"}</tool_call>'
    parsed = parse_tool_calls(call * 3)
    assert len(parsed.tool_calls) == 2
    assert parsed.text == call
    monkeypatch.setattr(output, "MAX_CALL_CHARACTERS", 5)
    assert "characters" in parse_tool_calls(call).malformed[0]


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "a"}', "{", "x", "\n"]), max_size=12))
def test_any_answer_can_be_read(parts):
    parsed = parse_tool_calls("".join(parts))
    assert len(parsed.tool_calls) + len(parsed.malformed) <= parts.count("<tool_call>")
