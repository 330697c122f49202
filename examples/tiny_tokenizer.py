"""The tokenizer of the tiny checkpoint: byte-level BPE over a page of English, with the published control tokens."""

from pathlib import Path

# The control tokens of the published tokenizer, in its order, and whether it marks them special.
# `<think>` and the tool tags are ordinary added tokens there: decoding shows them.
CONTROL_TOKENS: dict[str, bool] = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
    "<|point_start|>": True,
    "<|point_end|>": True,
    "<|ocr_text_start|>": True,
    "<|ocr_text_end|>": True,
    "<|clip_time_start|>": True,
    "<|clip_time_end|>": True,
    "<|frame|>": True,
    "<|fast_video_pad|>": True,
    "<|fast_start|>": True,
    "<|fast_end|>": True,
}

# 256 bytes and up to 224 merges. The default vocabulary keeps 8 ids that no token has, as the published one
# keeps 255 (vocab_size 151936, last token 151680).
LEARNED_TOKENS = 480
BYTE_TOKENS = 256
TRAINING_TEXT = """
A video is a row of pictures, and a model that looks at one reads it frame by frame. Each picture is cut
into small square patches; every patch becomes a vector, and four neighbours are joined into one token.
The words of the question stand before or after the pictures, and the answer is written one token at a
time.
What is happening in this video? A man opens the door, walks into the kitchen and puts a red cup on the
table. The camera moves slowly to the left, then a dog runs across the room. When does the dog appear? It
appears after about two seconds, and it leaves the picture before the end.
Describe the image in one sentence. The photograph shows an astronaut in an orange suit in front of a
flag, smiling at the person behind the camera. How many people are there? There is only one person in the
photograph.
You are a helpful assistant. Think about the question before you answer it, then give a short and exact
answer. If the question cannot be answered from the frames that were shown, say so, and explain which
part of the video was missing.
A sparse decoder does not look at all earlier tokens: an index scores them and the attention reads only
the best ones.
For short prompts this is the same as reading everything; for an hour of video it saves most of the time
and memory.
0.0 0.5 1.0 1.5 2.0 2.5 3.0 3.5 4.0 10.0 20.0 30.0 system user assistant tool name arguments content
description
"""


def control_token_ids(vocab_size: int) -> dict[str, int]:
    """Ids of the control tokens: after the learned tokens, or the last ids of a smaller vocabulary."""
    first = min(vocab_size - len(CONTROL_TOKENS), LEARNED_TOKENS)
    if first < 1:
        raise ValueError(f"vocab_size {vocab_size} has no room for {len(CONTROL_TOKENS)} control tokens")
    return {token: first + i for i, token in enumerate(CONTROL_TOKENS)}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write `folder`/tokenizer.json. The same size gives the same bytes; ValueError if it is too small."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    ids = control_token_ids(vocab_size)
    learned = min(ids.values())
    if learned < BYTE_TOKENS:
        need = BYTE_TOKENS + len(CONTROL_TOKENS)
        raise ValueError(f"vocab_size {vocab_size} is too small for a byte-level tokenizer, which needs {need}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token, special in CONTROL_TOKENS.items()]
    )
    if any(tokenizer.token_to_id(token) != index for token, index in ids.items()):
        raise ValueError(f"the training text gives only {tokenizer.get_vocab_size()} of {learned} tokens")
    tokenizer.save(str(folder / "tokenizer.json"))
