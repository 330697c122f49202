"""Runs the programs: prompts of tokens and patches in, tokens out. Knows nothing of text."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runtime import buckets
from runtime.errors import GenerationError, InputError
from runtime.patches import packed
from runtime.processes import ALONE, Processes
from runtime.processor import Prompt
from runtime.programs import Program, Programs
from runtime.sampling import SamplingOptions

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while a stage goes on."""

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
    attention_path: str = ""
    """`dsa/<keys>/<index format>/<backend>` of what has run so far; see `Result.attention_path`."""
    explain: bool = False
    """Keep the cache for `Executor.selected`, for as long as this object lives."""
    cache: Any = None


@dataclass(frozen=True)
class ModelFacts:
    """What the executor must know of a model besides its programs."""

    pad_ids: tuple[int, int]
    """Ids of image and video pad tokens."""
    merge_size: int
    """A vision row stands for merge_size x merge_size patches."""
    max_position_embeddings: int
    topk: int
    indexer_dtype: str


class Executor:
    """Weights on the device and the programs that use them.

    Args:
        programs: compiles on demand.
        params: weights, nested dictionaries as `programs` expects them.
        facts: of the model.
        progress: told how far long stages are.
        processes: that the programs run in.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        facts: ModelFacts,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ):
        self.programs = programs
        self._processes = processes
        self._text = params["text"]
        self._vision = {name: params[name] for name in ("vision", "projector")}
        self._facts = facts
        self._limit = buckets.context_limit(facts.max_position_embeddings)
        self._progress = progress or (lambda stage, done, total: None)

    def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingOptions],
        max_new_tokens: Sequence[int],
        stop_ids: Sequence[int],
        *,
        explain: bool = False,
    ) -> Run:
        """Generates for a batch of prompts of any lengths. Rows do not influence each other.

        Args:
            explain: the run will be explained by `selected`.

        Raises (while iterating):
            InputError: a prompt with its new tokens exceeds the model's context.
            GenerationError: logits that are not finite.
        """
        for prompt, new in zip(prompts, max_new_tokens, strict=True):
            buckets.context(len(prompt.token_ids) + new, self._limit)
        run = Run(iter(()), Timings(), explain=explain)
        run.steps = self._steps(run, prompts, sampling, max_new_tokens, stop_ids)
        return run

    def _steps(
        self,
        run: Run,
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingOptions],
        max_new_tokens: Sequence[int],
        stop_ids: Sequence[int],
    ) -> Iterator[list[list[int]]]:
        timings = run.timings
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
        while not np.all(np.asarray(state["done"])):
            steps = min(steps, max(1, self._limit - longest - produced))
            context = max(cache["kv"].shape[2], self._context(longest + produced + steps))
            decode = self._timed(timings, self.programs.decode, batch, context)
            cache = _grown(cache, decode)
            state["stop_ids"] = _padded(stop_ids, decode.args[3]["stop_ids"].shape[0])
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
            run.cache = cache if run.explain else None
            run.attention_path = self._attention_path(int(np.max(cache["length"])), decode.kernels)
            yield [[int(t) for t in row if t >= 0] for row in tokens]
            if spent < _STEP_SECONDS / 2:
                steps = min(2 * steps, tokens.shape[1])
            # Every process measures another time, and all must run as many steps.
            steps = int(self._processes.shared(str(steps).encode))

    def selected(self, run: Run, prompt: Prompt, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """How often the steps that produced an answer selected each token before it.

        Those steps go through the layers once more, on the cache that they left.

        Args:
            run: of `prompt` alone, with `explain`; finished, or stopped between two steps.
            prompt: its last token is text.
            tokens: all that it produced.
            first: the answer begins at tokens[first].

        Returns:
            float64 [T + n - 1] for T prompt and n produced tokens: the share of (step, layer) pairs that selected each.
        """
        cache, size = run.cache, buckets.EXPLAIN_CHUNK
        layers, _, context = cache["kv"].shape[:3]
        # The step that produced a token had the one before it as input.
        inputs = np.array([prompt.token_ids[-1], *tokens[:-1]], np.int32)[first:]
        begin, end = len(prompt.token_ids) - 1 + first, len(prompt.token_ids) - 1 + len(tokens)
        program = self._timed(run.timings, self.programs.explain, 1, size, context)
        total = np.zeros(context, np.int64)
        cache = {**cache, "length": np.array([begin], np.int32)}
        for start in range(begin, end, size):
            valid = min(size, end - start)
            chunk = {name: np.zeros(array.shape, array.dtype) for name, array in program.args[2].items()}
            chunk["tokens"][0, :valid] = inputs[start - begin :][:valid]
            chunk["positions"][:] = np.arange(start, start + size) + prompt.delta
            chunk["valid"][:] = valid
            cache, counts = program(self._text, cache, chunk)
            total += np.asarray(counts)[0, :valid].sum(axis=0, dtype=np.int64)
            self._progress("explaining tokens", start + valid - begin, end - begin)
        run.cache = cache
        return total[:end] / (layers * (end - begin))

    def _context(self, tokens: int) -> int:
        return buckets.context(tokens, self._limit, self.programs.mesh.size)

    def _attention_path(self, context: int, kernels: Sequence[str]) -> str:
        keys = "all-keys" if context <= self._facts.topk else f"top-{self._facts.topk}"
        return f"dsa/{keys}/{self._facts.indexer_dtype}-index/{'pallas' if kernels else 'xla'}"

    def _encode(self, prompt: Prompt, timings: Timings) -> np.ndarray | None:
        """Vision rows of all of a prompt's images and frames, in host memory: [R, D] of the model's dtype."""
        pads = int(np.isin(prompt.token_ids, self._facts.pad_ids).sum())
        if not pads:
            return None
        area = self._facts.merge_size**2
        parts: list[np.ndarray] = []
        done = 0
        devices = self.programs.mesh.size
        most = buckets.batch_patches(self.programs.platform, self.programs.plain)
        batches = prompt.patch_batches(buckets.share(pads * area, devices, most))
        while shares := list(islice(batches, devices)):
            size = buckets.patches(max(len(patches) for patches, _ in shares))
            program = self._timed(timings, self.programs.vision, size)
            begin = time.perf_counter()
            # Of several processes each hands out what its own devices take.
            inputs = zip(packed(shares, devices, size, area), program.shardings[1:], strict=True)
            placed = [jax.make_array_from_callback(array.shape, to, array.__getitem__) for array, to in inputs]
            rows = np.asarray(program(self._vision, *placed))
            for share, (patches, _) in zip(np.split(rows, devices), shares, strict=False):
                parts.append(share[: len(patches) // area])
                done += len(parts[-1])
            timings.vision_s += time.perf_counter() - begin
            self._progress("vision tokens", done, pads)
        return np.concatenate(parts)

    def _prefill(
        self, prompts: Sequence[Prompt], rows: Sequence[np.ndarray | None], timings: Timings
    ) -> tuple[Any, Any]:
        lengths = np.array([len(p.token_ids) for p in prompts])
        longest, batch = int(lengths.max()), len(prompts)
        context = self._context(longest)
        size = self.programs.chunk(batch, context, longest)
        program = self._timed(timings, self.programs.prefill, batch, size, context)
        begin = time.perf_counter()
        # Zeros, not empty memory: unwritten slots take part in masked sums, where a NaN would survive.
        cache, logits = program.zeros(1, 2)
        inputs = program.args[3]
        # Which row of a prompt's vision rows each of its tokens takes; only read at pad tokens.
        pads = [np.isin(p.token_ids, self._facts.pad_ids) for p in prompts]
        source = [np.cumsum(pad) - 1 for pad in pads]
        for first in range(0, longest, size):
            chunk = {name: np.zeros(array.shape, array.dtype) for name, array in inputs.items()}
            chunk["valid"][:] = np.clip(lengths - first, 0, size)
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

    def _timed(self, timings: Timings, compile_program: Callable[..., Any], *shape: int) -> Any:
        begin = time.perf_counter()
        program = compile_program(*shape)
        timings.compile_s += time.perf_counter() - begin
        return program


def _padded(stop_ids: Sequence[int], slots: int) -> np.ndarray:
    """int32 [slots]; -1 is no token."""
    if len(stop_ids) > slots:
        raise InputError(f"{len(stop_ids)} stop tokens are too many; this graph compares with at most {slots}")
    return np.array([*stop_ids, *[-1] * (slots - len(stop_ids))], np.int32)


def _grown(cache: Any, program: Program) -> Any:
    """The cache with room for as many tokens as the program's has; every token keeps its sequence index."""
    shapes = program.args[1]
    if cache["kv"].shape == shapes["kv"].shape:
        return cache

    def pad(cache: Any) -> Any:
        return {
            name: jnp.pad(array, [(0, new - old) for old, new in zip(array.shape, shapes[name].shape, strict=True)])
            for name, array in cache.items()
        }

    return jax.jit(pad, out_shardings=program.shardings[1])(cache)
