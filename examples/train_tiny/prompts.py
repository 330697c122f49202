"""Token ids and positions of a clip with several questions: exactly those that the runtime makes of each of them.

A clip's frames cost far more than its questions, so one sequence holds the frames once and then every question with
its answer, each continuing the frames as if it stood there alone: `segment` says which tokens may see each other.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.train_tiny.questions import Question
from examples.train_tiny.scenes import SIDE
from runtime.media_options import VideoOptions
from runtime.processor import Processor, ProcessorSettings
from runtime.tokenizer import Tokenizer

_WORD = re.compile(" ?[^ ]+")

PADDING = -1
"""The segment of padding."""


class Sample(NamedTuple):
    """One clip, T tokens."""

    tokens: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [3, T]
    segment: np.ndarray  # int32 [T]: 0 the frames, 1 ... the questions in order
    learned: np.ndarray  # bool [T]: the next token of the same question is one that the model is to write


class Prompts:
    """Makes sequences with a checkpoint's own tokenizer and settings."""

    def __init__(self, folder: str | Path):
        """Reads the tokenizer and the JSON files of the checkpoint `folder`."""
        self.tokenizer = Tokenizer.from_folder(folder)
        # Without a template the runtime renders ChatML itself: the same text as ours, without a child process a prompt.
        settings = replace(ProcessorSettings.from_hf_folder(folder), chat_template=None)
        # `decode` false: frames are needed for their number and size only.
        self._processor = Processor(settings, self.tokenizer, decode=False)
        self._end = self.tokenizer.control_ids["<|im_end|>"]
        self._think_end = self.tokenizer.control_ids["</think>"]
        self._word = lru_cache(maxsize=100_000)(self.tokenizer.encode)
        self._frames = lru_cache(maxsize=10_000)(self._frame_part)

    def sequence(self, times: np.ndarray, questions: Sequence[Question], longest: int) -> tuple[Sample, int]:
        """Frames at `times` [F] seconds with as many of the questions as fit `longest` tokens, and their number."""
        prefix, positions, tail = self._frames(tuple(np.asarray(times, np.float32).tolist()))
        tokens, segment, learned = [*prefix], [0] * len(prefix), [False] * len(prefix)
        places = [positions]
        first, taken = int(positions.max()) + 1, 0
        for question in questions:
            asked = [*self._encode(question.text), *tail]
            written = self._written(question)
            if len(tokens) + len(asked) + len(written) > longest:
                break
            taken += 1
            both = len(asked) + len(written)
            tokens += [*asked, *written]
            segment += [taken] * both
            learned += [False] * (len(asked) - 1) + [True] * len(written) + [False]
            places.append(np.broadcast_to(first + np.arange(both, dtype=np.int32), (3, both)))
        placed = np.concatenate(places, axis=1)
        return Sample(np.array(tokens, np.int32), placed, np.array(segment, np.int32), np.array(learned)), taken

    def _encode(self, text: str) -> list[int]:
        """The tokenizer's ids. It never joins what a single space parts, and a few thousand words are soon known."""
        return [token for word in _WORD.findall(text) for token in self._word(word)]

    def _written(self, question: Question) -> list[int]:
        """What follows the prompt, which ends in `<think>` and a line break."""
        thinking, answer = self._encode(question.thinking + "\n"), self._encode("\n\n" + question.answer)
        return [*thinking, self._think_end, *answer, self._end]

    def _frame_part(self, times: tuple[float, ...]) -> tuple[list[int], np.ndarray, list[int]]:
        """Ids up to the question, their positions, and the ids between question and answer."""
        black: list[Any] = [np.zeros((SIDE, SIDE, 3), np.uint8)] * len(times)
        video = {"type": "video", "video": black, "timestamps": list(times)}
        messages = [{"role": "user", "content": [video, {"type": "text", "text": ""}]}]
        options = VideoOptions(min_frames=len(times))
        prompt = self._processor.prepare(messages, video_options=options)
        ids = prompt.token_ids.tolist()
        end = ids.index(self.tokenizer.control_ids["<|vision_end|>"]) + 1
        return ids[:end], prompt.position_ids[:, :end], ids[end:]
