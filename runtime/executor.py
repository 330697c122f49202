"""Runs the programs: prompts of tokens and patches in, tokens out. Knows nothing of text."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime import buckets
from runtime.errors import GenerationError
from runtime.processor import Prompt
from runtime.programs import Programs
from runtime.sampling import SamplingOptions

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while a stage goes on."""

MAX_DECODE_STEPS = 16
# A call of the decode loop should end within this many seconds, so that text streams and Ctrl-C is heard.
_STEP_SECONDS = 0.05


@dataclass
class Timings:
    """Seconds spent, each stage without compilation, which is counted apart."""

    compile_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass
class Run:
    """A batch in generation: iterate `steps`. Each item holds the new tokens of every row, possibly none."""

    steps: Iterator[list[list[int]]]
    timings: Timings
    attention_path: str = field(default="")


class Executor:
    """Weights on the device and the programs that use them.

    Args:
        programs: compiles on demand.
        params: weights, nested dictionaries as `programs` expects them.
        pad_ids: the ids of image and video pad tokens.
        progress: told how far long stages are.
    """

    def __init__(self, programs: Programs, params: Any, pad_ids: tuple[int, int], progress: Progress | None = None):
        self._programs = programs
        self._text = params["text"]
        self._vision = {name: params[name] for name in ("vision", "projector")}
        self._pad_ids = pad_ids
        self._progress = progress or (lambda stage, done, total: None)

    def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingOptions],
        max_new_tokens: Sequence[int],
        stop_ids: Sequence[int],
    ) -> Run:
        """Generates for a batch of prompts of any lengths. Rows do not influence each other.

        Raises (while iterating):
            InputError: a prompt with its new tokens exceeds the model's context.
            GenerationError: logits that are not finite.
        """
        config = self._programs.config
        limit = buckets.context_limit(config.text.max_position_embeddings)
        longest = 0
        for prompt, new in zip(prompts, max_new_tokens, strict=True):
            total = len(prompt.token_ids) + new
            buckets.context(total, limit)
            longest = max(longest, total)
        timings = Timings()
        keys = "all-keys" if longest <= config.sparse.topk else f"top-{config.sparse.topk}"
        path = f"dsa/{keys}/{config.sparse.indexer_dtype}-index/xla"
        return Run(self._steps(prompts, sampling, max_new_tokens, stop_ids, timings), timings, path)

    def _steps(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingOptions],
        max_new_tokens: Sequence[int],
        stop_ids: Sequence[int],
        timings: Timings,
    ) -> Iterator[list[list[int]]]:
        rows = [self._encode(prompt, timings) for prompt in prompts]
        cache, logits = self._prefill(prompts, rows, timings)
        state = {
            "delta": np.array([p.delta for p in prompts], np.int32),
            "done": np.array([new < 1 for new in max_new_tokens]),
            "budget": np.array(max_new_tokens, np.int32),
            "stop_ids": np.array(stop_ids, np.int32),
            "sampling": {
                "temperature": np.array([s.temperature for s in sampling], np.float32),
                "top_p": np.array([s.top_p for s in sampling], np.float32),
                "top_k": np.array([s.top_k for s in sampling], np.int32),
                "seed": np.array([s.seed for s in sampling], np.uint32),
            },
        }
        produced, steps, batch = 0, 1, len(prompts)
        longest = max(len(p.token_ids) for p in prompts)
        limit = buckets.context_limit(self._programs.config.text.max_position_embeddings)
        while not np.all(np.asarray(state["done"])):
            steps = min(steps, max(1, limit - longest - produced))
            cache = self._grow(cache, longest + produced + steps, limit)
            decode = self._timed(timings, self._programs.decode, batch, cache["kv"].shape[2], len(state["stop_ids"]))
            begin = time.perf_counter()
            cache, logits, state, tokens, finite = decode(self._text, cache, logits, state, np.int32(steps))
            tokens, finite = np.asarray(tokens), np.asarray(finite)
            spent = time.perf_counter() - begin
            timings.decode_s += spent
            if not finite.all():
                raise GenerationError(
                    f"the logits of row {int(np.argmin(finite))} are not finite after {produced} new tokens; "
                    "check the weights (python -m convert ... --verify) or use --dtype float32"
                )
            produced += steps
            yield [[int(t) for t in row if t >= 0] for row in tokens]
            if spent < _STEP_SECONDS / 2:
                steps = min(2 * steps, MAX_DECODE_STEPS)

    def _encode(self, prompt: Prompt, timings: Timings) -> np.ndarray | None:
        """Vision rows of all of a prompt's images and frames, in host memory: [R, D] of the model's dtype."""
        pads = int(np.isin(prompt.token_ids, self._pad_ids).sum())
        if not pads:
            return None
        merge = self._programs.config.vision.spatial_merge_size
        rows = np.empty((pads, self._programs.config.text.hidden_size), self._programs.dtype)
        done = 0
        for patches, grid in prompt.patch_batches(buckets.MAX_BATCH_PATCHES):
            count = len(patches)
            size = buckets.patches(count)
            program = self._timed(timings, self._programs.vision, size)
            begin = time.perf_counter()
            padded = np.zeros((size, *patches.shape[1:]), np.float32)
            padded[:count] = patches
            grids = np.zeros((size // merge**2, 3), np.int32)
            grids[: len(grid)] = grid
            tokens = count // merge**2
            rows[done : done + tokens] = np.asarray(program(self._vision, padded, grids))[:tokens]
            done += tokens
            timings.vision_s += time.perf_counter() - begin
            self._progress("vision tokens", done, pads)
        return rows

    def _prefill(
        self, prompts: Sequence[Prompt], rows: Sequence[np.ndarray | None], timings: Timings
    ) -> tuple[Any, Any]:
        lengths = np.array([len(p.token_ids) for p in prompts])
        longest, batch = int(lengths.max()), len(prompts)
        config = self._programs.config
        limit = buckets.context_limit(config.text.max_position_embeddings)
        size, capacity = buckets.chunk(longest), buckets.context(longest, limit)
        program = self._timed(timings, self._programs.prefill, batch, size, capacity)
        begin = time.perf_counter()
        shapes = self._programs.cache_shapes(batch, capacity)
        cache: Any = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        logits: Any = jnp.zeros((batch, config.text.vocab_size), jnp.float32)
        # Which row of a prompt's vision rows each of its tokens takes; only read at pad tokens.
        pads = [np.isin(p.token_ids, self._pad_ids) for p in prompts]
        source = [np.cumsum(pad) - 1 for pad in pads]
        for first in range(0, longest, size):
            chunk = {
                "tokens": np.zeros((batch, size), np.int32),
                "positions": np.zeros((3, batch, size), np.int32),
                "vision_rows": np.zeros((batch, size, config.text.hidden_size), self._programs.dtype),
                "is_vision": np.zeros((batch, size), bool),
                "valid": np.clip(lengths - first, 0, size).astype(np.int32),
            }
            for b, prompt in enumerate(prompts):
                part, n = slice(first, first + size), int(chunk["valid"][b])
                chunk["tokens"][b, :n] = prompt.token_ids[part]
                chunk["positions"][:, b, :n] = prompt.position_ids[:, part]
                chunk["is_vision"][b, :n] = pads[b][part]
                vision = rows[b]
                if vision is not None:
                    here = pads[b][part]
                    chunk["vision_rows"][b, :n][here] = vision[source[b][part][here]]
            cache, logits = program(self._text, cache, logits, chunk)
            # One chunk in flight: progress and Ctrl-C follow the device, not the queue.
            jax.block_until_ready(logits)
            self._progress("prefill tokens", min(first + size, longest), longest)
        timings.prefill_s += time.perf_counter() - begin
        return cache, logits

    def _grow(self, cache: Any, tokens: int, limit: int) -> Any:
        """The cache, moved to the next capacity if `tokens` would not fit."""
        capacity = cache["kv"].shape[2]
        if tokens <= capacity:
            return cache
        shapes = self._programs.cache_shapes(cache["kv"].shape[1], buckets.context(tokens, limit))
        return {
            name: jnp.pad(array, [(0, new - old) for old, new in zip(array.shape, shapes[name].shape, strict=True)])
            for name, array in cache.items()
        }

    def _timed(self, timings: Timings, compile_program: Callable[..., Any], *shape: int) -> Any:
        begin = time.perf_counter()
        program = compile_program(*shape)
        timings.compile_s += time.perf_counter() - begin
        return program
