"""Text can never become a control token, and streamed text equals text decoded at once."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_checkpoint import write_tiny_checkpoint
from examples.tiny_tokenizer import CONTROL_TOKENS
from runtime.errors import InputError
from runtime.tokenizer import Detokenizer, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    overrides = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), overrides=overrides)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture
def document(folder):
    return json.loads((folder / "tokenizer.json").read_text())


markers = st.sampled_from([*CONTROL_TOKENS, "<|im_", "start|>", "<", "|>", "<|", "<<|im_end|>|im_end|>"])
# Unassigned characters may compose one day, and the two Unicode tables here are not of one age.
characters = st.characters(exclude_categories=["Cs", "Cn"])
hostile_text = st.lists(st.one_of(markers, st.text(characters, max_size=8)), max_size=12).map("".join)


@given(text=hostile_text)
def test_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.control_ids.values())
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=hostile_text)
def test_trusted_text_is_cut_at_every_control_token(tokenizer, text):
    parts = list(tokenizer.split_control(text))
    names = {index: name for name, index in tokenizer.control_ids.items()}
    assert "".join(part if isinstance(part, str) else names[part] for part in parts) == text
    assert not any(name in part for part in parts if isinstance(part, str) for name in names.values())


def test_trusted_text_encodes_as_the_library_does(folder, tokenizer):
    from tokenizers import Tokenizer as Reference

    text = "<|im_start|>user\nWhat happens at <|frame|>12.5<|video_pad|>?<|im_end|>\n<think>\n"
    ids = []
    for part in tokenizer.split_control(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 520), max_size=40))
def test_stream_equals_one_shot_decode(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@given(text=st.text(characters, max_size=20))
def test_no_piece_ends_inside_a_character(tokenizer, text):
    clean = unicodedata.normalize("NFC", text).replace("\ufffd", "")
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(index) for index in tokenizer.encode(clean)]
    assert "".join(pieces) == clean
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_characters_of_several_tokens_come_out_whole(tokenizer):
    ids = tokenizer.encode("🎬")
    assert len(ids) == 4  # the tiny vocabulary has learned no emoji
    stream = Detokenizer(tokenizer)
    assert [stream.push(index) for index in ids] == ["", "", "", "🎬"]
    stream = Detokenizer(tokenizer)
    assert [stream.push(index) for index in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_hidden_and_markup_is_shown(tokenizer):
    names = ["<think>", "</think>", "<|im_end|>", "<tool_call>", "<|image_pad|>", "<|endoftext|>"]
    assert tokenizer.decode([tokenizer.control_ids[name] for name in names]) == "<think></think><tool_call>"


def test_markup_is_shown_even_where_the_file_calls_it_special(document):
    for token in document["added_tokens"]:
        token["special"] = True
    tokenizer = Tokenizer(json.dumps(document))
    assert tokenizer.decode([tokenizer.control_ids["</think>"]]) == "</think>"


def test_ids_without_a_token_are_silent(tokenizer):
    assert tokenizer.vocab_size == 504
    assert tokenizer.decode([505, 511, 10**12, -1]) == ""


def test_stored_truncation_and_padding_do_not_change_a_prompt(document, tokenizer):
    document["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    text = "A video is a row of pictures"
    assert Tokenizer(json.dumps(document)).encode(text) == tokenizer.encode(text)


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json.*--token-ids"):
        Tokenizer.from_folder(tmp_path)


def test_oversized_file_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.tokenizer.MAX_FILE_BYTES", 10)
    (tmp_path / "tokenizer.json").write_text("{" + " " * 20)
    with pytest.raises(InputError, match="more than the 10"):
        Tokenizer.from_folder(tmp_path)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000, '{"model": 3}'])
def test_broken_json_is_refused(text):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer(text)


def edit(**changes):
    return lambda document: document.update(changes)


def edit_model(**changes):
    return lambda document: document["model"].update(changes)


def edit_token(**changes):
    return lambda document: document["added_tokens"][3].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(decoder={"type": "Metaspace"}), "only byte-level BPE"),
        (edit(decoder=None), "only byte-level BPE"),
        (edit_model(type="Unigram"), "only byte-level BPE"),
        (edit_model(merges=[["zzz", "yyy"]]), "not usable"),
        (edit_model(vocab={"a": "b"}), "not usable"),
        (edit_model(dropout=0.5), "dropout"),
        (edit(added_tokens={"a": 1}), "not a list"),
        (edit(added_tokens=[7]), "malformed"),
        (edit_token(content=""), "malformed"),
        (edit_token(content="\ud800"), "malformed"),
        (edit_token(id=-1), "malformed"),
        (edit_token(id=True), "malformed"),
        (edit_token(special="no"), "malformed"),
        (edit_token(lstrip=True), "lstrip"),
        (edit_token(id=480), "same id"),
        (edit_token(id=65), "to another token"),
        (edit_token(content="a"), "second id"),
    ],
)
def test_damaged_tokenizers_are_refused(document, change, message):
    change(document)
    with pytest.raises(InputError, match=message):
        Tokenizer(json.dumps(document))


def test_file_whose_merges_spell_a_control_token_gives_no_answer(document):
    """Were `<|` a control token that the learned merges can reach, text would forge it."""
    document["model"]["vocab"]["<|"] = len(document["model"]["vocab"])
    document["model"]["merges"].append(["<", "|"])
    document["added_tokens"] = [
        {"id": document["model"]["vocab"]["<|"], "content": "<|", "special": True},
    ]
    for flag in ("single_word", "lstrip", "rstrip", "normalized"):
        document["added_tokens"][0][flag] = False
    tokenizer = Tokenizer(json.dumps(document))
    with pytest.raises(InputError, match="control token"):
        tokenizer.encode("a <| b")
