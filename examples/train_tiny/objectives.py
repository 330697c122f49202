"""What each phase of training minimises, and the compiled steps that do it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.train_tiny.data import Batch
from examples.train_tiny.model import Inputs, Mode, Outputs, forward
from examples.train_tiny.render import render
from examples.train_tiny.scenes import SIDE
from keye_jax.config import KeyeConfig
from keye_jax.params import ParamSpec, flatten, map_specs, param_specs, unflatten

Params = dict[str, Any]
Metrics = dict[str, jax.Array]

BALANCE_WEIGHT = 0.01
"""Of the experts' imbalance beside the next-token loss."""
KL_WEIGHT = 0.3
"""Of the indexer's divergence in sparse adaptation."""
PIXEL_NOISE = 6.0
"""Standard deviation, in grey levels, of the noise that stands for video compression."""


def initial_params(config: KeyeConfig, seed: int) -> Params:
    """Float32 weights; matrices with variance 1 / fan-in, embeddings of size one half."""
    leaves = {}
    for number, (path, spec) in enumerate(flatten(param_specs(config))):
        if spec.init == "normal":
            noise = np.random.default_rng([seed, number]).standard_normal(spec.shape, np.float32)
            leaves[path] = jnp.asarray(noise * np.float32(_scale(path, spec.shape)))
        else:
            leaves[path] = jnp.asarray(np.full(spec.shape, 1 if spec.init == "ones" else 0, np.float32))
    return unflatten(leaves)


def _scale(path: tuple[str, ...], shape: tuple[int, ...]) -> float:
    name = path[-2] if path[-1] == "weight" else path[-1]
    if name in ("embed_tokens", "position_embedding"):
        return 0.5
    if name in ("o_proj", "out_proj"):
        return (shape[1] * shape[2]) ** -0.5
    if name == "lm_head":
        return shape[1] ** -0.5
    if name in ("patch_embedding", "linear_1", "linear_2"):
        return shape[0] ** -0.5
    return shape[2 if name in ("gate_up_proj", "down_proj") else 1] ** -0.5


def model_inputs(batch: Batch, key: jax.Array | None, config: KeyeConfig, dtype: Any) -> Inputs:
    """Draws the frames of a batch. With `key` the pixels get noise and a slight change of brightness, else none."""
    frames = render(batch.states, batch.background, jnp).astype(jnp.float32)
    if key is not None:
        noise, light = jax.random.split(key)
        gain = jax.random.uniform(light, (frames.shape[0], 1, 1, 1, 1), minval=0.9, maxval=1.05)
        frames = frames * gain + PIXEL_NOISE * jax.random.normal(noise, frames.shape, jnp.bfloat16)
        frames = jnp.clip(frames, 0, 255)
    size, side = config.vision.patch_size, SIDE // config.vision.patch_size
    cut = (frames / 127.5 - 1).astype(dtype).reshape(*frames.shape[:2], side, size, side, size, 3)
    patches = cut.transpose(0, 1, 2, 4, 6, 3, 5).reshape(*frames.shape[:2], side * side, -1)
    return Inputs(patches, *map(jnp.asarray, (batch.tokens, batch.positions, batch.segment)))


def compute_params(params: Params, config: KeyeConfig, dtype: Any) -> Params:
    """Master weights in the dtypes that the forward pass has: `dtype`, float32 where the model fixes it."""
    dtypes = map_specs(lambda spec: spec.as_dtype(dtype), config)
    return jax.tree.map(lambda w, to: w.astype(to), params, dtypes)


def objective(outputs: Outputs, batch: Batch, mode: Mode) -> tuple[jax.Array, Metrics]:
    """The phase's loss and what to report of it."""
    targets = jnp.roll(batch.tokens, -1, axis=1)
    learned = batch.learned.astype(jnp.float32)
    count = jnp.maximum(learned.sum(), 1)
    entropy = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, targets)
    token_loss = jnp.sum(entropy * learned) / count
    right = (jnp.argmax(outputs.logits, -1) == targets) * learned
    kl, balance = outputs.divergence.mean(), outputs.imbalance.mean()
    metrics = {
        "loss": token_loss,
        "tokens right": right.sum() / count,
        "kl": kl,
        "recall": outputs.recall.mean(),
        "imbalance": balance,
    }
    if mode == "warm-up":
        return kl, metrics
    return token_loss + BALANCE_WEIGHT * balance + (KL_WEIGHT * kl if mode == "sparse" else 0.0), metrics


def is_indexer(config: KeyeConfig) -> Params:
    """True at the indexer's parameters."""
    return unflatten({path: "indexer" in path for path, _ in flatten(param_specs(config))})


def optimizer(config: KeyeConfig, mode: Mode, peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay over the weights that the phase trains: all but the indexer, the indexer
    alone, or all. Others stay as they are."""
    rising = min(steps // 10 + 1, 200)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, rising, max(steps, rising + 1), 0.02 * peak)
    rule = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.02, mask=map_specs(_is_matrix, config)),
    )
    trained = is_indexer(config)
    if mode == "dense":
        trained = jax.tree.map(lambda flag: not flag, trained)
    if mode == "sparse":
        trained = jax.tree.map(lambda _: True, trained)
    labels = jax.tree.map(lambda flag: "train" if flag else "keep", trained)
    return optax.multi_transform({"train": rule, "keep": optax.set_to_zero()}, labels)


def _is_matrix(spec: ParamSpec) -> bool:
    return spec.init == "normal"


Step = Callable[[Params, Any, Batch, jax.Array], tuple[Params, Any, Metrics]]


def training_step(config: KeyeConfig, mode: Mode, rule: optax.GradientTransformation, dtype: Any) -> Step:
    """A compiled step: (params, optimizer state, batch, key) → (params, optimizer state, metrics)."""

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        inputs = model_inputs(batch, key, config, dtype)
        return objective(forward(compute_params(params, config, dtype), inputs, config, mode), batch, mode)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, batch: Batch, key: jax.Array) -> tuple[Params, Any, Metrics]:
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, state = rule.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state, metrics

    return step


def evaluation_step(config: KeyeConfig, mode: Mode, dtype: Any) -> Callable[[Params, Batch], tuple[jax.Array, Metrics]]:
    """A compiled (params, batch) → (bool [B, T] where the likeliest token is the true one, metrics)."""

    @jax.jit
    def evaluate(params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        inputs = model_inputs(batch, None, config, dtype)
        outputs = forward(compute_params(params, config, dtype), inputs, config, mode)
        right = jnp.argmax(outputs.logits, -1) == jnp.roll(batch.tokens, -1, axis=1)
        return right, objective(outputs, batch, mode)[1]

    return evaluate
