"""The tokenizer: byte-level BPE over the questions and answers themselves, digits single, published control tokens."""

from pathlib import Path

import numpy as np

from examples.tiny_tokenizer import BYTE_TOKENS, CONTROL_TOKENS, TRAINING_TEXT, control_token_ids
from examples.train_tiny.questions import KINDS, ask
from examples.train_tiny.scenes import sample_scene, states

_CLIPS = 400


def training_text() -> list[str]:
    """What the merges are learned from: the same sentences every time."""
    rng = np.random.default_rng(0)
    times = np.arange(12, dtype=np.float32)
    lines = [TRAINING_TEXT]
    for _ in range(_CLIPS):
        seen = states(sample_scene(rng, times, 12.0), times)
        found = [ask(kind, rng, seen, times) for kind in KINDS]
        lines += [line for q in found if q is not None for line in (q.text, f"{q.thinking}\n", q.answer)]
    return lines


def write_vocabulary(folder: Path, vocab_size: int) -> None:
    """Writes `folder`/tokenizer.json. The same size gives the same bytes. ValueError: too small for 256 bytes and the
    control tokens, or larger than the sentences give merges for."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    ids = control_token_ids(vocab_size)
    learned = min(ids.values())
    if learned < BYTE_TOKENS:
        raise ValueError(f"vocab_size {vocab_size} is below {BYTE_TOKENS + len(CONTROL_TOKENS)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=learned, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training_text(), trainer)
    added = [AddedToken(token, special=special, normalized=False) for token, special in CONTROL_TOKENS.items()]
    tokenizer.add_tokens(added)
    if any(tokenizer.token_to_id(token) != index for token, index in ids.items()):
        raise ValueError(f"the sentences give only {tokenizer.get_vocab_size()} of {learned} tokens")
    tokenizer.save(str(folder / "tokenizer.json"))
