"""What the model wrote, taken apart: thinking, answer, tool calls."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from runtime.tokenizer import Detokenizer, Tokenizer

OPEN, CLOSE = "<think>", "</think>"
MAX_TOOL_CALLS = 128
MAX_CALL_CHARACTERS = 1 << 20

Channel = Literal["thinking", "answer"]


@dataclass(frozen=True)
class Piece:
    """Some streamed text and what it is. Never empty, never cut inside a character or a tag."""

    channel: Channel
    text: str


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ParsedAnswer:
    """text: the answer without its calls. malformed: one line for each call left in the text as
    unreadable."""

    text: str
    tool_calls: tuple[ToolCall, ...]
    malformed: tuple[str, ...]


def split_thinking(text: str, *, open_think: bool = False) -> tuple[str | None, str]:
    """Split a whole turn into (thinking, answer); thinking is None where there is none.

    The turn is cut at the first `</think>`; a `<think>` at its start is dropped and may be missing, for the
    prompt may have opened it. Without `</think>` everything is thinking if it was opened, by the text or by
    the prompt (`open_think`), else everything is answer. Line breaks around the thinking and before the
    answer go.
    """
    head, close, tail = text.partition(CLOSE)
    start = head.lstrip()
    opened = start.startswith(OPEN)
    if not (close or opened or open_think):
        return None, text
    return (start[len(OPEN) :] if opened else head).strip("\n"), tail.lstrip("\n")


class ThinkingSplitter:
    """Splits a stream of token ids as `split_thinking` splits the whole, piece by piece.

    Where the tokenizer has `<think>` and `</think>` as tokens only these count as tags, not the same
    characters spelt out; else the characters do. If `</think>` comes although no thinking was open, the
    pieces so far went out as answer and turn out to be thinking: `thinking` and `answer` say so, the stream
    cannot.
    """

    def __init__(self, tokenizer: Tokenizer, *, open_think: bool):
        ids = tokenizer.control_ids
        self._tags = {ids[tag]: tag for tag in (OPEN, CLOSE) if OPEN in ids and CLOSE in ids}
        self._scanner = None if self._tags else _TagScanner()
        self._detokenizer = Detokenizer(tokenizer)
        self._state = _ThinkingState(open_think)

    @property
    def thinking(self) -> str | None:
        """All thinking so far; None if none was opened."""
        return self._state.thinking

    @property
    def answer(self) -> str:
        """All of the answer so far."""
        return self._state.answer

    def push(self, index: int) -> list[Piece]:
        """The pieces that this token completes: none, one, or rarely more."""
        if index in self._tags:
            return self._text(self._detokenizer.flush()) + self._state.tag(self._tags[index])
        return self._text(self._detokenizer.push(index))

    def flush(self) -> list[Piece]:
        """What was held back; call it once, when generation has ended for whatever reason."""
        pieces = self._text(self._detokenizer.flush())
        if self._scanner is not None:
            pieces += self._state.text(self._scanner.flush())
        return pieces + self._state.end()

    def _text(self, text: str) -> list[Piece]:
        if self._scanner is None:
            return self._state.text(text)
        pieces = []
        for part in self._scanner.push(text):
            pieces += self._state.tag(part) if part in (OPEN, CLOSE) else self._state.text(part)
        return pieces


def parse_tool_calls(answer: str) -> ParsedAnswer:
    """Take `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` out of a finished answer.

    Nothing raises: a call that is cut off, too long, one too many or no such JSON stays in the text and is
    reported.
    """
    kept, calls, malformed = [], [], []
    rest = answer
    while True:
        before, tag, after = rest.partition("<tool_call>")
        kept.append(before)
        if not tag:
            break
        body, end, rest = after.partition("</tool_call>")
        call = _read_call(body) if end else "it is cut off"
        if len(calls) == MAX_TOOL_CALLS and isinstance(call, ToolCall):
            call = f"there are more than {MAX_TOOL_CALLS}"
        if isinstance(call, ToolCall):
            calls.append(call)
        else:
            malformed.append(f"tool call {len(calls) + len(malformed)} is not usable: {call}")
            kept.append(tag + body + end)
    text = "".join(kept)
    return ParsedAnswer(text.rstrip() if calls else text, tuple(calls), tuple(malformed))


def _read_call(body: str) -> ToolCall | str:
    """The call, or why it is none."""
    if len(body) > MAX_CALL_CHARACTERS:
        return f"it has {len(body)} characters, more than {MAX_CALL_CHARACTERS}"
    try:
        call = json.loads(body, parse_constant=_refuse_constant)
        name, arguments = (call.get("name"), call.get("arguments", {})) if isinstance(call, dict) else (None, None)
        if isinstance(arguments, str):
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return "it is not an object with a name and an object of arguments"
    return ToolCall(name, arguments)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _ThinkingState:
    """Sorts text and tags, in the order of the turn, into the two channels."""

    def __init__(self, open_think: bool):
        self._inside = open_think
        self._closed = False
        self._may_open = True  # only white space so far: `<think>` here is a tag, later it is text
        self._at_start = True  # of a channel whose leading line breaks go
        self._held = ""  # white space whose fate the next text decides
        self._parts: dict[Channel, list[str]] = {"thinking": [], "answer": []}

    @property
    def thinking(self) -> str | None:
        return "".join(self._parts["thinking"]) if self._inside or self._closed else None

    @property
    def answer(self) -> str:
        return "".join(self._parts["answer"])

    def text(self, text: str) -> list[Piece]:
        if self._closed:
            return self._emit("answer", text.lstrip("\n") if self._at_start else text)
        text = self._held + text
        self._held = ""
        if self._may_open and not text.strip():
            self._held = text
            return []
        self._may_open = False
        if not self._inside:
            return self._emit("answer", text)
        if self._at_start:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        return self._emit("thinking", body)

    def tag(self, tag: str) -> list[Piece]:
        if self._closed or (tag == OPEN and not self._may_open):
            return self.text(tag)
        if tag == OPEN:
            self._inside, self._may_open, self._held = True, False, ""
            return []
        if not self._inside:
            self._parts["thinking"] = [(self.answer + self._held).strip("\n")]
            self._parts["answer"] = []
            pieces = []
        else:
            pieces = self.end()
        self._inside, self._closed, self._at_start, self._held = False, True, True, ""
        return pieces

    def end(self) -> list[Piece]:
        """What is still held when the turn or its thinking is over."""
        rest, self._held = self._held, ""
        return self._emit("thinking", rest.strip("\n")) if self._inside else self._emit("answer", rest)

    def _emit(self, channel: Channel, text: str) -> list[Piece]:
        if not text:
            return []
        self._at_start = False
        self._parts[channel].append(text)
        return [Piece(channel, text)]


class _TagScanner:
    """Finds the tags in streamed text; holds back what may be the beginning of one."""

    def __init__(self) -> None:
        self._rest = ""

    def push(self, text: str) -> Iterator[str]:
        """Texts and tags in order, a tag always by itself."""
        self._rest += text
        while True:
            found = [(at, tag) for tag in (OPEN, CLOSE) if (at := self._rest.find(tag)) >= 0]
            if not found:
                break
            at, tag = min(found)
            yield self._rest[:at]
            yield tag
            self._rest = self._rest[at + len(tag) :]
        tail = self._rest.rfind("<")
        if tail < 0 or not any(tag.startswith(self._rest[tail:]) for tag in (OPEN, CLOSE)):
            tail = len(self._rest)
        ready, self._rest = self._rest[:tail], self._rest[tail:]
        yield ready

    def flush(self) -> str:
        rest, self._rest = self._rest, ""
        return rest
