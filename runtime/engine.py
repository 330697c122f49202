"""`Engine`: a bundle that answers messages. Joins the processor (text, pixels) and the executor (tokens, arrays)."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from runtime import buckets
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.explain import Explanation, Part, check_prompt, explain_answer
from runtime.media_options import ImageOptions, VideoOptions
from runtime.output import Piece, ThinkingSplitter, ToolCall, parse_tool_calls
from runtime.processes import ALONE, Processes
from runtime.processor import Processor, ProcessorSettings, Prompt
from runtime.sampling import SamplingOptions
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.executor import Executor, Run

DEFAULT_MAX_NEW_TOKENS = 1024

Progress = Callable[[str, int, int], None]
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Result:
    """A finished or interrupted answer, with everything that shaped it."""

    text: str | None
    """The answer without thinking and tool calls; None where the bundle has no tokenizer."""
    thinking: str | None
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    """All tokens produced, the stop token included."""
    finish_reason: FinishReason
    prompt_tokens: int
    attention_path: str
    """`dsa/<keys>/<index format>/<backend>`; keys is `all-keys` where the context never exceeded top-k."""
    frames: tuple[dict[str, Any], ...]
    """For each video: its name, frame size, and the timestamps in seconds of the frames used."""
    options: dict[str, Any]
    """The options in effect."""
    warnings: tuple[str, ...]
    timings: dict[str, float]
    """Seconds by stage."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Generation:
    """An answer in the making: iterate it for `Piece`s of text, then read `result`.

    Closing it early, or Ctrl-C while iterating, keeps what there is: `result` then says "interrupted".

    Args:
        explain: makes the explanation from all tokens, the number of the first one to explain, their text, and what
            they are; None where none was asked for.
    """

    def __init__(
        self,
        prompt: Prompt,
        run: "Run",
        splitter: ThinkingSplitter | None,
        options: dict[str, Any],
        explain: Callable[[Sequence[int], int, str, Part], Explanation] | None = None,
    ):
        self._prompt, self._run, self._splitter, self._options = prompt, run, splitter, options
        self._explain = explain
        self._answer_from = 0
        self._stop_ids = options["stop_ids"]
        self._tokens: list[int] = []
        self._finish: FinishReason = "interrupted"
        self._started = time.perf_counter()
        self._first_token: float | None = None

    def __iter__(self) -> Iterator[Piece]:
        for rows in self._run.steps:
            if self._first_token is None:
                self._first_token = time.perf_counter() - self._started
            for token in rows[0]:
                self._tokens.append(token)
                # The stop token ends the turn; it is no part of the text.
                if self._splitter is not None and token not in self._stop_ids:
                    yield from self._splitter.push(token)
                    if not self._splitter.answer:
                        self._answer_from = len(self._tokens)
        stopped = bool(self._tokens) and self._tokens[-1] in self._stop_ids
        self._finish = "stop" if stopped else "length"
        if self._splitter is not None:
            yield from self._splitter.flush()

    def explanation(self) -> Explanation:
        """What the answer looked at; of a generation with `explain` that was iterated to its end.

        Where nothing followed the thinking, or the bundle has no tokenizer, all tokens produced count.

        Raises:
            ValueError: `explain` was not asked for, or the answer is not finished.
        """
        if self._explain is None or self._finish == "interrupted":
            raise ValueError("only a finished generation that was started with explain=True can be explained")
        result, tokens = self.result, self._tokens
        if tokens[-1] in self._stop_ids and len(tokens) > 1:
            tokens = tokens[:-1]
        if self._splitter is None:
            return self._explain(tokens, 0, "", "tokens")
        if self._answer_from >= len(tokens):
            return self._explain(tokens, 0, result.thinking or "", "thinking")
        return self._explain(tokens, self._answer_from, result.text or "", "answer")

    @property
    def result(self) -> Result:
        """What there is so far; final once the iteration has ended."""
        text = thinking = None
        calls: tuple[ToolCall, ...] = ()
        warnings = self._prompt.warnings
        if self._splitter is not None:
            if self._finish == "interrupted":
                self._splitter.flush()
            parsed = parse_tool_calls(self._splitter.answer)
            text, thinking, calls = parsed.text, self._splitter.thinking, parsed.tool_calls
            warnings = (*warnings, *parsed.malformed)
        timings = asdict(self._run.timings)
        timings["first_token_s"] = self._first_token or 0.0
        timings["total_s"] = time.perf_counter() - self._started
        return Result(
            text=text,
            thinking=thinking,
            tool_calls=calls,
            token_ids=tuple(self._tokens),
            finish_reason=self._finish,
            prompt_tokens=len(self._prompt.token_ids),
            attention_path=self._run.attention_path,
            frames=tuple(_frames(self._prompt)),
            options=self._options,
            warnings=warnings,
            timings={name: round(seconds, 4) for name, seconds in timings.items()},
        )


class Engine:
    """A bundle ready to answer. `open` reads no weights, so that bad input is refused before they load; `load` does."""

    def __init__(
        self,
        bundle: Bundle,
        progress: Progress | None = None,
        devices: int | None = None,
        preset: str | None = None,
        processes: Processes = ALONE,
    ):
        self.bundle = bundle
        self._processes = processes
        self._devices, self._preset = devices, preset
        self._progress = progress or (lambda stage, done, total: None)
        tokenizer = Tokenizer.from_folder(bundle.path) if bundle.tokenizer_path else None
        self.processor = Processor(ProcessorSettings.from_dict(bundle.processor_settings), tokenizer)
        self._executor: Executor | None = None

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        devices: int | None = None,
        preset: str | None = None,
        processes: Processes = ALONE,
    ) -> "Engine":
        """Opens a bundle without its weights; they load with the first generation.

        Args:
            bundle: its folder, or its address.
            progress: told how far long stages are.
            devices: how many to spread the model over; None: all accelerators, or one CPU.
            preset: what is spread over several devices, "context" (default) or "expert".
            processes: that `runtime.processes.join` has joined; all of them make the same calls.

        Raises:
            InputError: not a bundle, or a damaged one.
        """
        return cls(Bundle.open(bundle), progress, devices, preset, processes)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        devices: int | None = None,
        preset: str | None = None,
        processes: Processes = ALONE,
    ) -> "Engine":
        """Opens a bundle and loads its weights. Arguments and errors as in `open`."""
        engine = cls.open(bundle, progress=progress, devices=devices, preset=preset, processes=processes)
        engine.executor()
        return engine

    def executor(self) -> "Executor":
        """The weights on the device and the programs; loaded at the first call."""
        if self._executor is None:
            # jax comes in here, a second after bad input has been refused.
            from runtime import compile_cache
            from runtime.executor import Executor, ModelFacts
            from runtime.programs import Programs, choose_devices

            compile_cache.enable()
            bundle, settings = self.bundle, self.processor.settings
            devices = choose_devices(self._devices)
            programs = Programs(bundle, self._report, devices, self._preset, self._processes)
            params = bundle.load_params(
                shardings=programs.param_shardings(),
                progress=lambda done, total: self._progress("weights, bytes", done, total),
            )
            facts = ModelFacts(
                pad_ids=(settings.image_token_id, settings.video_token_id),
                merge_size=settings.merge_size,
                max_position_embeddings=settings.max_position_embeddings,
                topk=bundle.config["sa_config"]["topk"],
                indexer_dtype=bundle.indexer_dtype,
            )
            self._executor = Executor(programs, params, facts, self._progress, self._processes)
        return self._executor

    def _report(self, line: str) -> None:
        self._progress(line, 0, 0)

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
    ) -> Prompt:
        """Messages in the OpenAI schema → tokens, positions and decoded media. Raises InputError."""
        return self.processor.prepare(
            messages,
            tools=tools,
            image_options=image_options,
            video_options=video_options,
            progress=self._progress,
        )

    def prepare_token_ids(
        self,
        token_ids: Sequence[int],
        media: Sequence[Mapping[str, Any]] = (),
        *,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
    ) -> Prompt:
        """Raw token ids, with image and video parts for their runs of pad tokens; needs no tokenizer."""
        return self.processor.prepare_token_ids(
            token_ids, media, image_options=image_options, video_options=video_options, progress=self._progress
        )

    def default_sampling(self) -> SamplingOptions:
        """What the checkpoint's generation_config.json says; greedy where it ships none."""
        defaults = self.processor.settings.generation
        if defaults is None or not defaults.do_sample:
            return SamplingOptions()
        return SamplingOptions(defaults.temperature, defaults.top_p, defaults.top_k)

    def generate(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        explain: bool = False,
    ) -> Generation:
        """Answers a conversation; see `prepare` and `generate_prompt`."""
        prompt = self.prepare(messages, tools=tools, image_options=image_options, video_options=video_options)
        return self.generate_prompt(prompt, max_new_tokens=max_new_tokens, sampling=sampling, explain=explain)

    def generate_prompt(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        explain: bool = False,
    ) -> Generation:
        """Answers a prepared prompt.

        Args:
            max_new_tokens: None: 1,024, or what the context has left.
            sampling: None: what the checkpoint's generation_config.json says; greedy where it ships none.
            explain: keep what `Generation.explanation` needs: the cache, for as long as the generation lives.

        Raises:
            InputError: prompt and new tokens exceed the model's context; nothing in the prompt to explain.
        """
        if explain:
            check_prompt(prompt)
        settings = self.processor.settings
        limit = buckets.context_limit(settings.max_position_embeddings)
        room = limit - len(prompt.token_ids)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_MAX_NEW_TOKENS, room))
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} must be at least 1")
        buckets.context(len(prompt.token_ids) + max_new_tokens, limit)
        sampling = sampling or self.default_sampling()
        stop_ids = tuple(settings.stop_ids)
        if self._processes.count > 1:
            self._processes.same(self._facts(prompt, (max_new_tokens, sampling, stop_ids, explain)))
        executor = self.executor()
        run = executor.run([prompt], [sampling], [max_new_tokens], stop_ids, explain=explain)
        tokenizer = self.processor.tokenizer
        splitter = ThinkingSplitter(tokenizer, open_think=prompt.open_think) if tokenizer else None
        options = {
            "max_new_tokens": max_new_tokens,
            **asdict(sampling),
            "stop_ids": stop_ids,
            "dtype": self.bundle.dtype,
            "weights": self.bundle.weight_format,
            "indexer_dtype": self.bundle.indexer_dtype,
        }

        def explained(tokens: Sequence[int], first: int, text: str, part: Part) -> Explanation:
            selected = executor.selected(run, prompt, tokens, first)
            return explain_answer(
                prompt, selected, len(tokens) - first, self.bundle.config["sa_config"]["topk"], text, part
            )

        return Generation(prompt, run, splitter, options, explained if explain else None)

    def _facts(self, prompt: Prompt, options: Any) -> dict[str, str]:
        """What must be alike in all processes, or their programs would wait for one another for ever."""
        import jax

        media = hashlib.sha256()
        for item in prompt.media:
            media.update(repr((item.kind, item.grid, item.frames.shape)).encode())
            media.update(np.ascontiguousarray(item.frames).data)
        b = self.bundle
        bundle = (b.source, b.dtype, b.weight_format, b.indexer_dtype, b.processor_settings)
        return {
            "JAX": jax.__version__,
            "bundle": hashlib.sha256(repr(bundle).encode()).hexdigest(),
            "devices or preset": repr((self._devices, self._preset)),
            "sampling options": repr(options),
            "prompt tokens": hashlib.sha256(prompt.token_ids.tobytes() + prompt.position_ids.tobytes()).hexdigest(),
            "images or frames": media.hexdigest(),
        }


def _frames(prompt: Prompt) -> Iterator[dict[str, Any]]:
    """What each video contributed."""
    for media in prompt.media:
        if media.kind == "video":
            times = None if media.timestamps is None else [round(float(t), 3) for t in media.timestamps]
            height, width = media.frames.shape[1:3]
            yield {"source": media.label, "height": height, "width": width, "timestamps": times}
