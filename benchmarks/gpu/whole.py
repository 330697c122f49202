"""The whole model with kernels: the golden cases to the last token, and a bfloat16 model against float32."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.checks import Outcome, attempt, same_bits
from benchmarks.gpu.model import DTYPE, TINY, Compiler, abstract, abstract_logits, decode_state
from kernels_pallas.dispatch import reference_only
from keye_jax import KeyeConfig, graphs
from keye_jax.cache import CAPACITY_STEP, abstract_cache
from keye_jax.checkpoint import load_params
from keye_jax.params import flatten, param_specs, unflatten
from tests.keye_jax.golden_prompts import CASES, padded_batch

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"

FARTHER = 2.0
"""With kernels, bfloat16 logits may lie this many times as far from float32 ones, in the mean, as without: both round
equally often, at different places."""


class Whole:
    """The checks of the whole model, whose programs are being compiled. `tokens`: of the bfloat16 model's prompt."""

    def __init__(self, compiler: Compiler, tokens: int):
        self._golden = [_Golden(mode, compiler) for mode in ("fp8_off", "fp8_on")]
        self._rounded = _Rounded(compiler, tokens)

    def run(self) -> Iterator[tuple[str, Outcome]]:
        """Outcomes by name."""
        for golden in self._golden:
            yield f"golden tokens {golden.mode}", attempt(golden.mode, golden.outcome)
        yield "bfloat16 model", attempt("bfloat16 model", self._rounded.outcome)


class _Golden:
    """All golden prompts in one batch, in float32; the error is the number of wrong tokens of 16 greedy ones each."""

    def __init__(self, mode: str, compiler: Compiler):
        self.mode = mode
        with np.load(GOLDEN / "golden.npz", allow_pickle=False) as arrays:
            golden = dict(arrays)
        config = KeyeConfig.from_hf(GOLDEN / "checkpoint", indexer_dtype=_INDEXER[mode])
        self._params = load_params(GOLDEN / "checkpoint", config, jnp.float32)["text"]
        batch = padded_batch(golden, config)
        self._chunk = graphs.Chunk(**{name: batch[name] for name in graphs.Chunk.__annotations__})
        self._state: Any = {**decode_state(len(CASES)), "delta": batch["delta"]}
        self._expected = np.stack([golden[f"{case}/{mode}/decode_tokens"] for case in CASES])
        self._programs = _Programs(f"golden {mode}", config, jnp.float32, self._chunk, compiler)

    def outcome(self) -> Outcome:
        runs = [self._programs(self._params, self._chunk, self._state)[0] for _ in range(2)]
        wrong = int(np.sum(np.asarray(runs[0])[:, : self._expected.shape[1]] != self._expected))
        return Outcome(wrong, 0, bool(same_bits(*runs)), self._programs.kernels)


_INDEXER: dict[str, Any] = {"fp8_off": "float32", "fp8_on": "fp8"}


class _Rounded:
    """A small model of the kernels' own widths, in bfloat16 with kernels and without, and in float32 without."""

    def __init__(self, compiler: Compiler, tokens: int):
        rows, config = 2, dataclasses.replace(TINY, sparse=dataclasses.replace(TINY.sparse, topk=tokens // 4))
        specs = list(flatten(param_specs(config)["text"]))
        keys = jax.random.split(jax.random.key(9), len(specs))
        narrow = {
            path: (0.08 * jax.random.normal(key, spec.shape) + (spec.init == "ones")).astype(spec.as_dtype(DTYPE))
            for key, (path, spec) in zip(keys, specs, strict=True)
        }
        self._narrow = unflatten(narrow)
        self._wide = unflatten({path: leaf.astype(jnp.float32) for path, leaf in narrow.items()})
        self._chunk = graphs.Chunk(
            tokens=jax.random.randint(jax.random.key(10), (rows, tokens), 0, config.image_token_id, jnp.int32),
            positions=jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (3, rows, 1)),
            vision_rows=jnp.zeros((rows, tokens, config.text.hidden_size), DTYPE),
            is_vision=jnp.zeros((rows, tokens), bool),
            valid=jnp.array([tokens, tokens * 2 // 3], jnp.int32),
        )
        self._state = decode_state(rows)
        self._kernels = _Programs("bfloat16 with kernels", config, DTYPE, self._chunk, compiler)
        with reference_only():
            self._plain = _Programs("bfloat16", config, DTYPE, self._chunk, compiler)
            self._exact = _Programs("float32", config, jnp.float32, self._chunk, compiler)

    def outcome(self) -> Outcome:
        ours, again = (self._kernels(self._narrow, self._chunk, self._state) for _ in range(2))
        plain = self._plain(self._narrow, self._chunk, self._state)
        exact = self._exact(self._wide, self._chunk, self._state)[1]
        errors = [float(jnp.mean(jnp.abs(logits - exact))) for logits in (ours[1], plain[1])]
        return Outcome(errors[0] / errors[1], FARTHER, bool(same_bits(ours, again)), self._kernels.kernels)


class _Programs:
    """Prefill of one chunk and one call of decode."""

    def __init__(self, name: str, config: KeyeConfig, dtype: Any, chunk: Any, compiler: Compiler):
        batch, tokens = chunk["tokens"].shape
        capacity = -(-(tokens + graphs.MAX_DECODE_STEPS) // CAPACITY_STEP) * CAPACITY_STEP
        self._carried = abstract_cache(config, batch, capacity, dtype), abstract_logits(config, batch)
        self._keys, self._compiler = ((name, "prefill"), (name, "decode")), compiler
        specs = param_specs(config)["text"]
        params = unflatten({p: jax.ShapeDtypeStruct(s.shape, s.as_dtype(dtype)) for p, s in flatten(specs)})
        rest = ((abstract(chunk),), (abstract(decode_state(batch)), jax.ShapeDtypeStruct((), jnp.int32)))
        for key, function, more in zip(self._keys, (graphs.prefill, graphs.decode), rest, strict=True):
            program = jax.jit(lambda *args, function=function: function(*args, config=config))
            compiler.add(key, partial(program.lower, params, *self._carried, *more))

    @property
    def kernels(self) -> bool:
        """Whether there are kernels of ours in both programs."""
        return set(self._keys) <= self._compiler.kernels

    def __call__(self, params: Any, chunk: Any, state: Any) -> tuple[jax.Array, jax.Array]:
        """Greedy tokens [B, MAX_DECODE_STEPS] and the logits of the prompts' ends [B, V]."""
        prefill, decode = (self._compiler.get(key) for key in self._keys)
        cache, logits = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._carried)
        cache, logits = prefill(params, cache, logits, chunk)
        return decode(params, cache, logits, state, jnp.int32(graphs.MAX_DECODE_STEPS))[3], logits
