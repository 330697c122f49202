"""The whole model with kernels: the golden cases to the last token, and a bfloat16 model against float32."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import cases_weights
from benchmarks.gpu.checks import Outcome, attempt, same_bits
from benchmarks.gpu.model import DTYPE, TINY, Compiler, abstract, abstract_logits, decode_state
from kernels_pallas.dispatch import reference_only
from keye_jax import KeyeConfig, graphs
from keye_jax.cache import CAPACITY_STEP, abstract_cache
from keye_jax.checkpoint import load_params
from keye_jax.params import SCALE, VALUES, WEIGHT_DTYPES, WeightFormat, flatten, param_specs, unflatten
from tests.keye_jax.golden_prompts import CASES, padded_batch

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"

FARTHER = 2.0
"""With kernels, bfloat16 logits may lie this many times as far from float32 ones, in the mean, as without: both round
equally often, at different places."""


class Whole:
    """The checks of the whole model, whose programs are being compiled. `tokens`: of the bfloat16 model's prompt."""

    def __init__(self, compiler: Compiler, tokens: int):
        self._golden = [_Golden(mode, compiler) for mode in ("fp8_off", "fp8_on")]
        self._rounded = Rounded(compiler, tokens)

    def run(self) -> Iterator[tuple[str, Outcome]]:
        """Outcomes by name."""
        for golden in self._golden:
            yield f"golden tokens {golden.mode}", attempt(golden.mode, golden.outcome)
        yield "bfloat16 model", attempt("bfloat16 model", self._rounded.outcome)


@dataclass(frozen=True)
class Prompts:
    """Prompts in one chunk, and what goes on from there.

    Attributes:
        chunk: `graphs.Chunk`.
        state: `graphs.DecodeState` after it.
    """

    config: KeyeConfig
    chunk: Any
    state: Any


def capacity(tokens: int, devices: int = 1) -> int:
    """Of a cache for such a prompt and one call of decode."""
    step = CAPACITY_STEP * devices
    return -(-(tokens + graphs.MAX_DECODE_STEPS) // step) * step


def golden_prompts(mode: str) -> tuple[Prompts, dict[str, Any], np.ndarray]:
    """All golden prompts as one batch, the float32 weights, and the 16 greedy tokens of each row."""
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as arrays:
        golden = dict(arrays)
    config = KeyeConfig.from_hf(GOLDEN / "checkpoint", indexer_dtype=INDEXER[mode])
    batch = padded_batch(golden, config)
    chunk = graphs.Chunk(**{name: batch[name] for name in graphs.Chunk.__annotations__})
    state = {**decode_state(len(CASES)), "delta": batch["delta"]}
    expected = np.stack([golden[f"{case}/{mode}/decode_tokens"] for case in CASES])
    params = load_params(GOLDEN / "checkpoint", config, jnp.float32)["text"]
    return Prompts(config, chunk, state), params, expected


INDEXER: dict[str, Any] = {"fp8_off": "float32", "fp8_on": "fp8"}
"""Modes of golden.npz → formats of the index keys."""


ROWS = 2
"""Prompts of `small_prompts`."""


def small_prompts(tokens: int) -> tuple[Prompts, dict[str, Any], dict[str, Any]]:
    """Prompts for a model of the kernels' own widths, whose queries select a quarter of `tokens`; its random weights in
    bfloat16, and the same in float32."""
    rows, config = ROWS, dataclasses.replace(TINY, sparse=dataclasses.replace(TINY.sparse, topk=tokens // 4))
    specs = list(flatten(param_specs(config)["text"]))
    keys = jax.random.split(jax.random.key(9), len(specs))
    narrow = {
        path: (0.08 * jax.random.normal(key, spec.shape) + (spec.init == "ones")).astype(spec.as_dtype(DTYPE))
        for key, (path, spec) in zip(keys, specs, strict=True)
    }
    chunk = graphs.Chunk(
        tokens=jax.random.randint(jax.random.key(10), (rows, tokens), 0, config.image_token_id, jnp.int32),
        positions=jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (3, rows, 1)),
        vision_rows=jnp.zeros((rows, tokens, config.text.hidden_size), DTYPE),
        is_vision=jnp.zeros((rows, tokens), bool),
        valid=jnp.array([tokens, tokens * 2 // 3], jnp.int32),
    )
    wide = {path: leaf.astype(jnp.float32) for path, leaf in narrow.items()}
    return Prompts(config, chunk, decode_state(rows)), unflatten(narrow), unflatten(wide)


class _Golden:
    """All golden prompts in one batch, in float32; the error is the number of wrong tokens of 16 greedy ones each."""

    def __init__(self, mode: str, compiler: Compiler):
        self.mode = mode
        self._prompts, self._params, self._expected = golden_prompts(mode)
        self._programs = _Programs(f"golden {mode}", jnp.float32, self._prompts, compiler)

    def outcome(self) -> Outcome:
        runs = [self._programs(self._params)[0] for _ in range(2)]
        wrong = int(np.sum(np.asarray(runs[0])[:, : self._expected.shape[1]] != self._expected))
        return Outcome(wrong, 0, bool(same_bits(*runs)), self._programs.kernels)


class Rounded:
    """A small model of the kernels' own widths, in bfloat16 with kernels and without, and in float32 without.

    Args:
        tokens: of a prompt.
        weights: 8-bit ones stay what they are in float32.
        options: XLA's.
    """

    def __init__(self, compiler: Compiler, tokens: int, weights: WeightFormat = "none", **options: Any):
        prompts, narrow, wide = small_prompts(tokens)
        self._narrow, self._wide = eight_bits(narrow, prompts.config, weights), wide
        if weights != "none":
            self._wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == DTYPE else x, self._narrow)
        make = partial(_Programs, prompts=prompts, compiler=compiler, weights=weights, **options)
        self._kernels = make(f"bfloat16 with kernels, {weights}", DTYPE)
        with reference_only():
            self._plain = make(f"bfloat16, {weights}", DTYPE)
            self._exact = make(f"float32, {weights}", jnp.float32)

    def outcome(self) -> Outcome:
        ours, again = (self._kernels(self._narrow) for _ in range(2))
        error = farther(ours[1], self._plain(self._narrow)[1], self._exact(self._wide)[1])
        return Outcome(error, FARTHER, bool(same_bits(ours, again)), self._kernels.kernels)


def eight_bits(params: dict[str, Any], config: KeyeConfig, weights: WeightFormat) -> dict[str, Any]:
    """The decoder's parameters with what `weights` says kept with 8 bits; "none": as they are."""
    specs, kept = dict(flatten(param_specs(config)["text"])), {}
    for path, leaf in flatten(params):
        if weights == "none" or not specs[path].contracted:
            kept[path] = leaf
        else:
            rounded = cases_weights.quantised(leaf, specs[path].contracted, WEIGHT_DTYPES[weights])
            kept |= {(*path, VALUES): rounded.values, (*path, SCALE): rounded.scale}
    return unflatten(kept)


def farther(ours: Any, plain: Any, exact: Any) -> float:
    """How many times as far from float32 logits ours lie as those of the reference in bfloat16, in the mean."""
    errors = [float(jnp.mean(jnp.abs(logits - exact))) for logits in (ours, plain)]
    return errors[0] / errors[1]


class _Programs:
    """Prefill of one chunk and one call of decode."""

    def __init__(
        self,
        name: str,
        dtype: Any,
        prompts: Prompts,
        compiler: Compiler,
        weights: WeightFormat = "none",
        **options: Any,
    ):
        config, self._prompts = prompts.config, prompts
        batch, tokens = prompts.chunk["tokens"].shape
        self._carried = abstract_cache(config, batch, capacity(tokens), dtype), abstract_logits(config, batch)
        self._keys, self._compiler = ((name, "prefill"), (name, "decode")), compiler
        specs = param_specs(config, weights)["text"]
        params = unflatten({p: jax.ShapeDtypeStruct(s.shape, s.as_dtype(dtype)) for p, s in flatten(specs)})
        rest = ((abstract(prompts.chunk),), (abstract(prompts.state), jax.ShapeDtypeStruct((), jnp.int32)))
        for key, function, more in zip(self._keys, (graphs.prefill, graphs.decode), rest, strict=True):
            program = jax.jit(lambda *args, function=function: function(*args, config=config))
            compiler.add(key, partial(program.lower, params, *self._carried, *more), **options)

    @property
    def kernels(self) -> bool:
        """Whether there are kernels of ours in both programs."""
        return set(self._keys) <= self._compiler.kernels

    def __call__(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Greedy tokens [B, MAX_DECODE_STEPS] and the logits of the prompts' ends [B, V]."""
        prefill, decode = (self._compiler.get(key) for key in self._keys)
        cache, logits = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._carried)
        cache, logits = prefill(params, cache, logits, self._prompts.chunk)
        return decode(params, cache, logits, self._prompts.state, jnp.int32(graphs.MAX_DECODE_STEPS))[3], logits
