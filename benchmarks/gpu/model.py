"""The model with random weights made on the device, and its programs as the runtime exports them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.published import CONFIG
from examples.tiny_checkpoint import tiny_config
from keye_jax import KeyeConfig, graphs
from keye_jax.cache import Cache, abstract_cache
from keye_jax.params import SCALE, WEIGHT_DTYPES, WeightFormat, abstract_params, flatten, param_specs, unflatten
from keye_jax.sampling import Sampling

TINY_JSON = tiny_config(
    {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "sa_config": {"indexer_num_heads": 4, "indexer_head_dim": 64, "topk": 64},
        "vision_config": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 40},
    }
)
"""Sizes that every kernel takes and a CPU runs in seconds: for trying the benchmark itself."""

JSONS = {"30b": CONFIG, "tiny": TINY_JSON}
"""What config.json holds of each."""

CONFIGS = {name: KeyeConfig.from_hf(json) for name, json in JSONS.items()}

TINY = CONFIGS["tiny"]

DTYPE = jnp.bfloat16

STD = 0.02
"""Of random weights."""

_UNIT = {jnp.dtype(jnp.int8): 32.0, jnp.dtype(jnp.float8_e4m3fn): 1.0}
"""How 8-bit values of standard deviation 1 are stored."""

_LARGE = 1 << 26
"""Elements; larger stacks are drawn a layer at a time, for random bits take as much memory again."""

GIB = 1 << 30

Program = Callable[..., Any]


@dataclass
class Model:
    """A configuration and its weights."""

    config: KeyeConfig
    params: dict[str, Any]

    @property
    def text(self) -> dict[str, Any]:
        return self.params["text"]

    @property
    def eyes(self) -> dict[str, Any]:
        """What `graphs.vision` takes."""
        return {name: self.params[name] for name in ("vision", "projector")}


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal, of standard deviation 0.02; of 1 in 8-bit numbers, which integers hold as `_UNIT`."""
    noise = _UNIT.get(jnp.dtype(dtype), STD) * jax.random.normal(key, shape, jnp.float32)
    if dtype == jnp.int8:
        noise = jnp.clip(jnp.round(noise), -127, 127)
    return noise.astype(dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _zeros(_: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


@partial(jax.jit, donate_argnums=0)
def _draw_layer(stack: jax.Array, layer: jax.Array, key: jax.Array) -> jax.Array:
    return stack.at[layer].set(_noise(jax.random.fold_in(key, layer), stack.shape[1:], stack.dtype))


def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """As `_noise`, large stacks layer by layer in place."""
    stack = _zeros(0, shape, dtype)
    for layer in range(shape[0]):
        stack = _draw_layer(stack, jnp.int32(layer), key)
    return stack


def random_model(config: KeyeConfig, seed: int = 0, weights: WeightFormat = "none") -> Model:
    """Weights as `keye_jax.params.init_params` draws them in kind, not in value: another generator, which compiles and
    runs in seconds at 31 billion weights. 8-bit weights are drawn as such, with equal scales."""
    key, leaves = jax.random.key(seed, impl="rbg"), {}
    for number, (path, spec) in enumerate(flatten(param_specs(config, weights))):
        own, dtype = jax.random.fold_in(key, number), spec.as_dtype(DTYPE)
        size = spec.nbytes(DTYPE) // dtype.itemsize
        if path[-1] == SCALE:
            leaves[path] = jnp.full(spec.shape, STD / _UNIT[jnp.dtype(WEIGHT_DTYPES[weights])], dtype)
        elif spec.init != "normal":
            leaves[path] = jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)
        elif spec.stacked and size > _LARGE:
            leaves[path] = draw(own, spec.shape, dtype)
        else:
            leaves[path] = _noise(own, spec.shape, dtype)
    return Model(config, unflatten(leaves))


def random_cache(config: KeyeConfig, batch: int, capacity: int, length: int, seed: int = 1) -> Cache:
    """A cache as if `length` random tokens had been prefilled: what a decode step costs does not depend on values,
    but for which tokens are selected, and those are spread evenly."""
    key, cache = jax.random.key(seed, impl="rbg"), {}
    for number, (name, leaf) in enumerate(abstract_cache(config, batch, capacity, DTYPE).items()):
        if name == "length":
            cache[name] = jnp.full(leaf.shape, length, leaf.dtype)
        elif name == "idx_scale":
            cache[name] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            cache[name] = draw(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
    return cache


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(config: KeyeConfig, batch: int, capacity: int) -> Cache:
    """On the device at once."""
    shapes = abstract_cache(config, batch, capacity, DTYPE)
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}


def chunks(config: KeyeConfig, context: int, length: int, seed: int = 2) -> list[graphs.Chunk]:
    """A prompt of random text in chunks, for batch 1."""
    tokens = jax.random.randint(jax.random.key(seed), (1, context), 0, config.image_token_id, jnp.int32)
    rows = jnp.zeros((1, length, config.text.hidden_size), DTYPE)
    return [
        graphs.Chunk(
            tokens=tokens[:, first : first + length],
            positions=jnp.tile(jnp.arange(first, first + length, dtype=jnp.int32), (3, 1, 1)),
            vision_rows=rows,
            is_vision=jnp.zeros((1, length), bool),
            valid=jnp.array([length], jnp.int32),
        )
        for first in range(0, context, length)
    ]


def decode_state(batch: int) -> graphs.DecodeState:
    """Greedy decoding without an end."""
    return graphs.DecodeState(
        delta=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        budget=jnp.full(batch, 1 << 30, jnp.int32),
        stop_ids=jnp.full(graphs.STOP_IDS, graphs.NO_TOKEN, jnp.int32),
        sampling=Sampling(
            temperature=jnp.zeros(batch, jnp.float32),
            top_p=jnp.ones(batch, jnp.float32),
            top_k=jnp.zeros(batch, jnp.int32),
            seed=jnp.zeros(batch, jnp.uint32),
        ),
    )


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lower_prefill(
    program: Program, config: KeyeConfig, context: int, chunk: Any, weights: WeightFormat = "none"
) -> Any:
    """`graphs.prefill`, or a variant of it, for one row, such chunks and a cache of `context` tokens."""
    carried = (abstract_cache(config, 1, context, DTYPE), abstract_logits(config, 1))
    return _lower(program, config, weights, *carried, abstract(chunk))


def lower_decode(program: Program, config: KeyeConfig, context: int, batch: int, weights: WeightFormat = "none") -> Any:
    """`graphs.decode`, or a variant of it."""
    carried = (abstract_cache(config, batch, context, DTYPE), abstract_logits(config, batch))
    state = jax.eval_shape(lambda: decode_state(batch))
    return _lower(program, config, weights, *carried, state, jax.ShapeDtypeStruct((), jnp.int32))


def lower_vision(config: KeyeConfig, frames: int, side: int) -> Any:
    """`graphs.vision` for batches of `frames` frames of side x side patches."""
    v, params = config.vision, abstract_params(config, DTYPE)
    patches = jax.ShapeDtypeStruct((frames * side**2, v.num_channels, v.patch_size, v.patch_size), jnp.float32)
    eyes = {name: params[name] for name in ("vision", "projector")}
    return jax.jit(partial(graphs.vision, config=config)).lower(
        eyes, patches, jax.ShapeDtypeStruct((frames, 3), jnp.int32)
    )


def _lower(program: Program, config: KeyeConfig, weights: WeightFormat, *args: Any) -> Any:
    # A function of its own: `jit` would remember a trace made with other kernels in place.
    run = jax.jit(lambda *args: program(*args, config=config), donate_argnums=(1, 2))
    return run.lower(abstract_params(config, DTYPE, weights)["text"], *args)


def abstract_logits(config: KeyeConfig, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, config.text.vocab_size), jnp.float32)


class Compiler:
    """Compiles programs side by side, in the order in which they are added, while others are traced or run.

    Args:
        held: nothing is compiled before `release`; the compiler tries things out on the device.
    """

    def __init__(self, *, held: bool = False) -> None:
        self._pool, self._held = ThreadPoolExecutor(12), threading.Event()
        if not held:
            self.release()
        self._programs: dict[Any, Future[Any]] = {}
        self.failed: dict[str, str] = {}
        """Programs that do not compile, and why."""
        self.kernels: set[Any] = set()
        """Keys of the programs with a kernel of ours in them."""

    def add(self, key: Any, lower: Callable[[], Any], **options: Any) -> None:
        """Lowers a program unless there is one of this key. One that does not trace is named and left out.

        Args:
            options: XLA's, for this program.
        """
        if key not in self._programs:
            self._programs[key] = Future()
            try:
                lowered = lower()
            except Exception as error:  # whatever one program runs into, the others stand
                self._programs[key].set_exception(error)
                return
            if any(name in lowered.as_text() for name in ("mosaic_gpu", "triton")):
                self.kernels.add(key)
            self._programs[key] = self._pool.submit(self._compile, lowered, options)

    def release(self) -> None:
        """Begins to compile."""
        self._held.set()

    def _compile(self, lowered: Any, options: dict[str, Any]) -> Any:
        self._held.wait()
        return lowered.compile(compiler_options=options)

    def get(self, key: Any) -> Any:
        """Waits for a program; None if it was not added or does not compile."""
        if key not in self._programs:
            return None
        try:
            return self._programs[key].result()
        except Exception as error:
            name = " ".join(str(part)[:60] for part in key) if isinstance(key, tuple) else str(key)
            if name not in self.failed:
                self.failed[name] = f"{type(error).__name__}: {str(error)[:600]}"
                print(f"{name}: does not compile: {self.failed[name]}", flush=True)
            return None

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being compiled, or at most so long: what is timed next has the machine to itself."""
        wait(self._programs.values(), seconds)
        for key, program in self._programs.items():
            if program.done():
                self.get(key)


def peak_bytes(program: Any) -> int:
    """Device memory that a compiled program needs: arguments, results that no argument gives its place to, and
    temporaries."""
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
