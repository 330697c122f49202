"""A checkpoint's own chat template, rendered without trusting it or the messages.

The template sees the shape of the conversation, not its words: every string that came from outside is
replaced by a sentinel, an unguessable run of digits, before rendering, and put back as plain text
afterwards. So whatever the template does, text stays text; only what the template itself writes can become a
control token.

What a template can still do with the words: test them for emptiness, strip white space (it is left around
the sentinel), join them, put them through `tojson`. What it cannot: look into them. `'x' in content`,
`content.split`, `content | length` and changes of case see the sentinel. Thoughts are therefore cut off
assistant turns before (`reasoning_content` holds them), which is what published templates look into the
content for.
"""

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.chat import Message, Segment, Trusted
from runtime.errors import InputError
from runtime.media_items import MediaItem

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_RENDERED_CHARACTERS = 4 << 20  # sentinels stand for the words, so this bounds the template's own text
TIMEOUT_SECONDS = 10
CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30

PADS = {"<|image_pad|>": "image", "<|video_pad|>": "video"}

# Words of JSON schema that templates look up or compare; all other keys and values of a tool are hidden.
_SCHEMA_KEYS = {"type", "function", "name", "description", "parameters", "properties", "required", "items"}
_SCHEMA_TYPES = {"function", "object", "string", "number", "integer", "boolean", "array", "null"}


def render_template(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
) -> list[Segment]:
    """Render a conversation, ending where the model's turn begins, as `chat.render_chatml` does.

    special_tokens: variables like eos_token for the template. Raises InputError if the template is too
    large, fails, exceeds its limits, or leaves out a message, a tool or an image or video.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS}")
    hidden = _Hidden()
    try:
        shape = [_message(message, hidden, f"messages[{i}]") for i, message in enumerate(messages)]
        declared = [_tool(tool, hidden, f"tools[{i}]") for i, tool in enumerate(tools)]
    except RecursionError as error:
        raise InputError("tools or tool calls are nested too deeply; flatten them") from error
    variables = {
        **special_tokens,
        "messages": shape,
        "tools": declared or None,
        "add_generation_prompt": True,
    }
    segments = hidden.put_back(_run(template, variables, hidden.pattern.pattern))
    media = [part for message in messages for part in message.content if isinstance(part, MediaItem)]
    return _with_media(segments, media)


class _Hidden:
    """Strings replaced by sentinels `_NONCE_KIND_INDEX_`; kind 1 is set by `tojson` and means: escape as
    JSON."""

    def __init__(self) -> None:
        # Digits only: changes of case, HTML escaping and URL quoting leave a sentinel alone.
        self._nonce = str(secrets.randbelow(9 * 10**39) + 10**39)
        self.pattern = re.compile(f"_({self._nonce})_([01])_([0-9]+)_")
        self._texts: list[str] = []
        self._required: dict[int, str] = {}

    def hide(self, text: str, required: str | None = None) -> str:
        """A stand-in for `text`. With `required`, the name of a place, leaving it out is an error."""
        core = text.strip()
        if not core:
            return text
        if required is not None:
            self._required[len(self._texts)] = required
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        self._texts.append(core)
        return f"{before}_{self._nonce}_0_{len(self._texts) - 1}_{after}"

    def hide_values(self, value: Any) -> Any:
        """The same JSON value with all its strings hidden, except the words that describe a schema."""
        if isinstance(value, str):
            return value if value in _SCHEMA_TYPES else self.hide(value)
        if isinstance(value, Mapping):
            return {
                key if key in _SCHEMA_KEYS else self.hide(str(key)): self.hide_values(item)
                for key, item in value.items()
            }
        return [self.hide_values(item) for item in value] if isinstance(value, list | tuple) else value

    def put_back(self, rendered: str) -> list[Segment]:
        segments: list[Segment] = []
        seen, end = set(), 0
        for match in self.pattern.finditer(rendered):
            segments.append(Trusted(rendered[end : match.start()]))
            index, end = int(match[3]), match.end()
            if index >= len(self._texts):
                raise InputError("the chat template changes the words of a message; it cannot be used")
            seen.add(index)
            text = self._texts[index]
            segments.append(json.dumps(text, ensure_ascii=False)[1:-1] if match[2] == "1" else text)
        segments.append(Trusted(rendered[end:]))
        missing = [place for index, place in self._required.items() if index not in seen]
        if missing:
            raise InputError(f"the chat template leaves out {missing[0]}; it does not serve such conversations")
        # A piece of a sentinel is left where the template cut a message in two.
        ours = "".join(segment.text for segment in segments if isinstance(segment, Trusted))
        if self._nonce[:8] in ours or self._nonce[-8:] in ours:
            raise InputError("the chat template cuts a message in pieces; it cannot be used")
        return segments


def _message(message: Message, hidden: _Hidden, place: str) -> dict[str, Any]:
    shaped: dict[str, Any] = {"role": message.role}
    if any(isinstance(part, MediaItem) for part in message.content):
        shaped["content"] = [
            {"type": part.kind, part.kind: ""}
            if isinstance(part, MediaItem)
            else {"type": "text", "text": hidden.hide(part, place)}
            for part in message.content
        ]
    else:
        shaped["content"] = hidden.hide("".join(map(str, message.content)), place)
    if message.thinking is not None:
        shaped["reasoning_content"] = hidden.hide(message.thinking)
    if message.tool_calls:
        shaped["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": hidden.hide(call.name, f"{place}.tool_calls"),
                    "arguments": hidden.hide_values(json.loads(call.arguments)),
                },
            }
            for call in message.tool_calls
        ]
    return shaped


def _tool(tool: Mapping[str, Any], hidden: _Hidden, place: str) -> dict[str, Any]:
    shaped = hidden.hide_values(tool)
    shaped["function"]["name"] = hidden.hide(tool["function"]["name"], place)
    return shaped


def _with_media(segments: Sequence[Segment], media: Sequence[MediaItem]) -> list[Segment]:
    """Put the media, in order, where the template wrote their pad tokens."""
    waiting = list(media)
    out: list[Segment] = []
    for segment in segments:
        if not isinstance(segment, Trusted):
            out.append(segment)
            continue
        for part in re.split("(" + "|".join(map(re.escape, PADS)) + ")", segment.text):
            if part not in PADS:
                out.append(Trusted(part))
            elif waiting and waiting[0].kind == PADS[part]:
                out.append(waiting.pop(0))
            else:
                raise InputError(f"the chat template writes {part} where no {PADS[part]} is; it cannot be used")
    if waiting:
        raise InputError(f"the chat template leaves out the {waiting[0].kind} {waiting[0].label!r}")
    return [segment for segment in out if segment != Trusted("")]


def _run(template: str, variables: dict[str, Any], sentinel: str) -> str:
    job = {
        "template": template,
        "variables": variables,
        "sentinel": sentinel,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
        "max_characters": MAX_RENDERED_CHARACTERS,
    }
    # What a dynamic linker may need; nothing else of the environment is the template's business.
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    child = str(Path(__file__).with_name("template_child.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-I", child],
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
            env=environment,
            check=True,
        )
        result = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise InputError(
            f"the chat template did not finish within {TIMEOUT_SECONDS} s, {CPU_SECONDS} s of CPU and "
            f"{MEMORY_BYTES >> 20} MiB; use a checkpoint without it"
        ) from error
    if "error" in result:
        reason = " ".join(str(result["error"]).split())[:300]
        raise InputError(f"the chat template cannot render this conversation ({reason})")
    return result["text"]
