"""tokenizer.json: text to token ids and back, with a hard wall between text and control tokens.

Control tokens are all added tokens of the file: turn marks, media pads, and also those it does not flag as
special (`<think>`, `<tool_call>`), because a user who could write these could forge a thought or a call just
as well. They come into a prompt only by id, or through `split_control` on text that we wrote ourselves.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtime.errors import InputError

MAX_FILE_BYTES = 128 << 20  # the published file has 11 MB
MAX_CONTROL_TOKENS = 100_000

# Markup that the reader of the output needs to see, whether or not the file flags it as special.
_OUTPUT_MARKUP = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})


class Tokenizer:
    """A byte-level BPE tokenizer read from the text of a tokenizer.json.

    control_ids: control token -> id. vocab_size: largest id + 1 (a model may have more embedding rows).
    Raises InputError for a file that is not such a tokenizer.
    """

    control_ids: Mapping[str, int]
    vocab_size: int

    def __init__(self, document: str):
        from tokenizers import Tokenizer as Encoder

        spec = _parse(document)
        added = _control_tokens(spec)
        # Without added tokens the encoder has no way from text to a control token. A truncation or padding
        # setting stored in the file would cut or fill prompts silently.
        plain = spec | {"added_tokens": [], "truncation": None, "padding": None}
        try:
            self._encoder = Encoder.from_str(json.dumps(plain))
        except Exception as error:
            raise InputError(f"tokenizer.json is not usable ({error}); convert the folder again") from error
        self.control_ids = MappingProxyType({token["content"]: token["id"] for token in added})
        self._check_ids()
        self._control_names = {index: name for name, index in self.control_ids.items()}
        self._hidden = {token["id"] for token in added if token["special"]} - {
            self.control_ids.get(name) for name in _OUTPUT_MARKUP
        }
        self._bytes_of = _byte_alphabet()
        self.vocab_size = max([-1, *self._encoder.get_vocab().values(), *self.control_ids.values()]) + 1
        names = sorted(self.control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, names))) if names else None

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read `path`/tokenizer.json. Raises InputError if it is missing, too large or broken."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                "this bundle has no tokenizer.json, so it cannot take text; "
                "pass --token-ids or convert a folder that has tokenizer.json"
            )
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{file} has {size} bytes, more than the {MAX_FILE_BYTES} a tokenizer may have")
        try:
            return cls(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text ({error}); copy it again") from error

    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text. Control tokens written in it are spelt out as ordinary characters.

        `decode` gives the text back as the file's normaliser leaves it (NFC for the published tokenizer).
        Raises InputError for text with lone surrogates, which is not Unicode text.
        """
        if not _is_unicode(text):
            raise InputError("text holds a lone surrogate (half of a UTF-16 pair) and is no Unicode text; remove it")
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        forged = self._control_names.keys() & set(ids)
        if forged:
            # Only a file whose learned merges spell a control token gets here: no answer beats a forged turn.
            names = sorted(self._control_names[index] for index in forged)
            raise InputError(f"tokenizer.json turns plain text into the control token {names[0]!r}; use another")
        return ids

    def split_control(self, text: str) -> Iterator[str | int]:
        """Cut text that we trust into control token ids and the plain text between them, in order."""
        if self._control_pattern is None:
            yield text
            return
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            yield self.control_ids[match.group()]
            end = match.end()
        if end < len(text):
            yield text[end:]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: what `Detokenizer` yields for them, joined."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """UTF-8 bytes of one token, perhaps half a character; empty for special tokens and unused ids."""
        if index in self._hidden or not 0 <= index < self.vocab_size:
            return b""
        if index in self._control_names:
            return self._control_names[index].encode()
        symbols = self._encoder.id_to_token(index) or ""
        return b"".join(self._bytes_of.get(symbol) or symbol.encode() for symbol in symbols)

    def _check_ids(self) -> None:
        if len(set(self.control_ids.values())) != len(self.control_ids):
            raise InputError("tokenizer.json gives two added tokens the same id; it is damaged, copy it again")
        for name, index in self.control_ids.items():
            if self._encoder.id_to_token(index) not in (None, name):
                raise InputError(f"tokenizer.json gives id {index} of {name!r} to another token too; copy it again")
            if self._encoder.token_to_id(name) not in (None, index):
                raise InputError(f"tokenizer.json gives {name!r} a second id beside {index}; copy it again")


class Detokenizer:
    """Turns a stream of ids into pieces of text that never end inside a character.

    The pieces of any ids, joined, and the last one from `flush`, equal `Tokenizer.decode` of all of them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The characters that this token completes; bytes that are no UTF-8 become U+FFFD."""
        return self._decoder.decode(self._tokenizer.token_bytes(index))

    def flush(self) -> str:
        """What was left of an unfinished character: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


def _parse(document: str) -> dict[str, Any]:
    try:
        spec = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise InputError(f"tokenizer.json is not valid JSON ({error}); copy it again") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise InputError("tokenizer.json has no 'model' object; it is not a tokenizers file, copy the right one")
    decoder = spec.get("decoder")
    kinds = spec["model"].get("type"), decoder.get("type") if isinstance(decoder, dict) else None
    if kinds != ("BPE", "ByteLevel"):
        raise InputError(f"tokenizer.json holds model and decoder {kinds}; only byte-level BPE (Keye-VL) is supported")
    if spec["model"].get("dropout"):
        raise InputError("tokenizer.json has BPE dropout, which makes prompts random; set 'dropout' to null")
    return spec


def _control_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_CONTROL_TOKENS:
        raise InputError("tokenizer.json: 'added_tokens' is not a list of reasonable length; copy it again")
    for token in added:
        content, index = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(content, str) or not content or not isinstance(token.get("special"), bool):
            raise InputError(f"tokenizer.json: added token {token!r:.80} is malformed; copy the file again")
        if type(index) is not int or not 0 <= index < 2**31 or not _is_unicode(content):
            raise InputError(f"tokenizer.json: added token {token!r:.80} is malformed; copy the file again")
        # These flags make the token swallow neighbouring text; no Keye-VL or Qwen tokenizer sets them.
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags:
            raise InputError(f"tokenizer.json: added token {content!r} sets {flags[0]!r}, which is not supported")
    return added


def _is_unicode(text: str) -> bool:
    """False for a string with lone surrogates, which JSON escapes can smuggle in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _byte_alphabet() -> dict[str, bytes]:
    """Character -> byte of byte-level BPE: printable Latin-1 is itself, other bytes are 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
