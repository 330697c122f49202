"""Messages in the OpenAI schema: checked here, then written as ChatML.

A rendered conversation is a list of segments, so that what a user wrote is never mixed with what we wrote:
`Trusted` text is ours and its control tokens count, a plain str is somebody's text and stays text, a
`MediaItem` stands for its pad tokens. Concatenating the segments gives the prompt; nothing is ever escaped
or searched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from runtime.errors import InputError
from runtime.media_items import MediaItem, media_item
from runtime.output import split_thinking

Role = Literal["system", "user", "assistant", "tool"]
MAX_MESSAGES = 10_000
MAX_CHARACTERS = 16 << 20  # 262,144 tokens are about 1.2 million characters
MAX_TOOLS = 1_000

_MESSAGE_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls"},
    # The format has no room for the call's id and name: results follow the calls in order.
    "tool": {"role", "content", "tool_call_id", "name"},
}
_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True)
class ChatSettings:
    """What the model's own template would fix, for checkpoints that come without one."""

    default_system: str | None = None
    """System prompt of a conversation that has none; None: no system turn."""
    open_think: bool = True
    """The prompt ends in `<think>` and a line break, so the model starts inside its thinking."""


@dataclass(frozen=True)
class Trusted:
    """Text written by us or by the checkpoint's template: control tokens in it become control tokens."""

    text: str


Segment = Trusted | str | MediaItem


@dataclass(frozen=True)
class PastCall:
    """A call in an assistant's earlier turn."""

    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: tuple[str | MediaItem, ...]
    thinking: str | None = None
    tool_calls: tuple[PastCall, ...] = ()


def frame_label(seconds: float | None) -> str:
    """The text before a video frame's pad tokens: its time with one decimal, if it has one."""
    return "<|frame|>" if seconds is None else f"<|frame|>{seconds:.1f}"


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Check a conversation. Raises InputError naming the place of the first thing that is not understood.

    Roles system, user, assistant (with `reasoning_content`, `tool_calls`) and tool; content is a string or a
    list of parts, see `media_items.media_item` for those that are not text. A key whose value is null counts
    as absent.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"messages must be a list of objects, not {type(messages).__name__}")
    if len(messages) > MAX_MESSAGES:
        raise InputError(f"{len(messages)} messages are too many; at most {MAX_MESSAGES}")
    parsed = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    if not parsed or parsed[-1].role not in ("user", "tool"):
        last = f"ends with the role {parsed[-1].role!r}" if parsed else "is empty"
        raise InputError(f"the conversation {last}; the last message must come from 'user' or 'tool'")
    characters = sum(len(part) for message in parsed for part in message.content if isinstance(part, str))
    if characters > MAX_CHARACTERS:
        raise InputError(f"messages hold {characters} characters; at most {MAX_CHARACTERS}")
    return parsed


def parse_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[dict[str, Any], ...]:
    """Check function declarations {"type": "function", "function": {"name": ..., ...}}.

    Raises InputError naming the one that is not understood.
    """
    if not tools:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes) or len(tools) > MAX_TOOLS:
        raise InputError(f"tools must be a list of at most {MAX_TOOLS} function declarations")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or tool.get("type") != "function":
            raise InputError(f'tools[{i}] must be {{"type": "function", "function": {{"name": ..., ...}}}}')
    if len(to_json(list(tools), "tools")) > MAX_CHARACTERS:
        raise InputError(f"tools hold more than {MAX_CHARACTERS} characters as JSON; describe them shorter")
    return tuple(dict(tool) for tool in tools)


def to_json(value: object, place: str) -> str:
    """JSON as the model saw it in training: one line, spaces after ':' and ',', characters not escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{place} cannot be written as JSON ({error}); give plain JSON values") from error


def render_chatml(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], settings: ChatSettings
) -> list[Segment]:
    """The conversation in ChatML with Qwen3's tool format, ending where the model's turn begins.

    Thoughts of assistant turns before the last user message are dropped, as Qwen3 does: the model was not
    trained to read them. Between tool calls of the current turn they stay.
    """
    segments: list[Segment] = []
    system: tuple[str | MediaItem, ...] = (settings.default_system,) if settings.default_system else ()
    rest = list(messages)
    if rest[0].role == "system":
        system = rest.pop(0).content
    if system or tools:
        segments += [Trusted("<|im_start|>system\n"), *system]
        if tools:
            segments += [Trusted("\n\n")] if system else []
            segments += _tool_declarations(tools)
        segments.append(Trusted("<|im_end|>\n"))
    last_query = max((i for i, message in enumerate(rest) if message.role == "user"), default=-1)
    for i, message in enumerate(rest):
        if message.role == "tool":
            first = i == 0 or rest[i - 1].role != "tool"
            last = i + 1 == len(rest) or rest[i + 1].role != "tool"
            segments += _tool_response(message, first, last)
        elif message.role == "assistant":
            segments += _assistant_turn(message, keep_thinking=i > last_query)
        else:
            content = _with_media_marks(message.content)
            segments += [Trusted(f"<|im_start|>{message.role}\n"), *content, Trusted("<|im_end|>\n")]
    segments.append(Trusted("<|im_start|>assistant\n" + ("<think>\n" if settings.open_think else "")))
    return segments


def _tool_declarations(tools: Sequence[Mapping[str, Any]]) -> list[Segment]:
    listed: list[Segment] = [Trusted(_TOOLS_BEFORE)]
    for tool in tools:
        listed += [Trusted("\n"), to_json(tool, "tools")]
    return [*listed, Trusted(_TOOLS_AFTER)]


def _assistant_turn(message: Message, *, keep_thinking: bool) -> list[Segment]:
    segments: list[Segment] = [Trusted("<|im_start|>assistant\n")]
    if keep_thinking and message.thinking:
        segments += [Trusted("<think>\n"), message.thinking.strip("\n"), Trusted("\n</think>\n\n")]
    segments += message.content
    for i, call in enumerate(message.tool_calls):
        separator = "\n" if i or message.content else ""
        body = f'{{"name": {to_json(call.name, "tool call")}, "arguments": {call.arguments}}}'
        segments += [Trusted(separator + "<tool_call>\n"), body, Trusted("\n</tool_call>")]
    return [*segments, Trusted("<|im_end|>\n")]


def _tool_response(message: Message, first: bool, last: bool) -> list[Segment]:
    """Results of one batch of calls share a user turn."""
    return [
        Trusted(("<|im_start|>user" if first else "") + "\n<tool_response>\n"),
        *_with_media_marks(message.content),
        Trusted("\n</tool_response>" + ("<|im_end|>\n" if last else "")),
    ]


def _with_media_marks(content: Sequence[str | MediaItem]) -> list[Segment]:
    segments: list[Segment] = []
    for part in content:
        if isinstance(part, MediaItem):
            segments += [Trusted("<|vision_start|>"), part, Trusted("<|vision_end|>")]
        else:
            segments.append(part)
    return segments


def _message(message: Mapping[str, Any], place: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{place} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        raise InputError(f"{place}.role is {role!r:.40}; it must be one of {', '.join(_MESSAGE_KEYS)}")
    given = {key: value for key, value in message.items() if value is not None}
    unknown = sorted(map(repr, given.keys() - _MESSAGE_KEYS[role]))
    if unknown:
        allowed = ", ".join(sorted(_MESSAGE_KEYS[role]))
        raise InputError(f"{place} has the unknown key {unknown[0]:.60}; a {role} message has {allowed}")
    calls = _tool_calls(given.get("tool_calls", []), f"{place}.tool_calls")
    if "content" not in given and not calls:
        raise InputError(f"{place} has no content; give a string or a list of parts")
    content = _content(given.get("content", ""), f"{place}.content")
    if role not in ("user", "tool") and any(isinstance(part, MediaItem) for part in content):
        raise InputError(f"{place} is a {role} message with an image or video; put it in a user message")
    thinking = given.get("reasoning_content")
    if thinking is not None and not isinstance(thinking, str):
        raise InputError(f"{place}.reasoning_content must be a string, not {type(thinking).__name__}")
    if role == "assistant":
        inside, answer = split_thinking("".join(part for part in content if isinstance(part, str)))
        thinking = inside if thinking is None else thinking
        content = (answer,) if answer else ()
    return Message(cast(Role, role), content, thinking, calls)


def _content(content: object, place: str) -> tuple[str | MediaItem, ...]:
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"{place} must be a string or a list of parts, not {type(content).__name__}")
    return tuple(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: object, place: str) -> str | MediaItem:
    if not isinstance(part, Mapping):
        raise InputError(f"{place} must be an object with a type, not {type(part).__name__}")
    if part.get("type") != "text":
        return media_item(part, place)
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise InputError(f'{place} must be {{"type": "text", "text": "..."}} and nothing else')
    return part["text"]


def _tool_calls(calls: object, place: str) -> tuple[PastCall, ...]:
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes) or len(calls) > MAX_TOOLS:
        raise InputError(f"{place} must be a list of at most {MAX_TOOLS} calls")
    return tuple(_tool_call(call, f"{place}[{i}]") for i, call in enumerate(calls))


def _tool_call(call: object, place: str) -> PastCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InputError(f'{place} must be {{"type": "function", "function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = to_json(arguments, f"{place}.arguments")
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}.arguments is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{place}.arguments must be a JSON object, not {type(parsed).__name__}")
    return PastCall(name, arguments)
