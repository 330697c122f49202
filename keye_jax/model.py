"""`KeyeVL`: the model as a Flax NNX module, for use as a library."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from keye_jax.cache import CAPACITY_STEP, init_cache
from keye_jax.checkpoint import load_params
from keye_jax.config import IndexerDtype, KeyeConfig
from keye_jax.decoder import decoder, embed, lm_head
from keye_jax.ops import reference_only, runs_kernels
from keye_jax.params import Params, WeightFormat, flatten, param_specs, unflatten
from keye_jax.vision import vision_tokens

PREFILL_CHUNK = 512
"""Tokens per step of a full forward pass: memory grows with chunk x context, never with context squared."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class KeyeVL(nnx.Module):
    """Keye-VL-2.0.

    Attributes:
        config: the `KeyeConfig`.
        params: nested dictionaries with an `nnx.Param` at every leaf `keye_jax.params.param_specs` declares.
    """

    def __init__(self, config: KeyeConfig, params: Params, weights: WeightFormat = "none"):
        """Wraps weights shaped as `param_specs(config, weights)`.

        Raises:
            ValueError: a weight is missing, extra, misshapen, or has another dtype where that is declared.
        """
        given, declared = dict(flatten(params)), dict(flatten(param_specs(config, weights)))
        if given.keys() != declared.keys():
            odd = sorted("/".join(path) for path in given.keys() ^ declared.keys())
            raise ValueError(f"params do not fit the config: {odd[0]} is missing or not declared")
        for path, spec in declared.items():
            if given[path].shape != spec.shape:
                raise ValueError(f"params: {'/'.join(path)} is {given[path].shape}, declared {spec.shape}")
            if spec.dtype is not None and given[path].dtype != spec.dtype:
                raise ValueError(f"params: {'/'.join(path)} is {given[path].dtype}, declared {jnp.dtype(spec.dtype)}")
        self.config = config
        self.params = nnx.data(unflatten({path: nnx.Param(array) for path, array in given.items()}))

    @classmethod
    def from_hf(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "bfloat16",
        indexer_dtype: IndexerDtype | None = None,
        weights: WeightFormat = "none",
    ) -> "KeyeVL":
        """Reads a checkpoint in the official Hugging Face layout; needs no torch.

        Args:
            folder: holds config.json and model*.safetensors.
            dtype: "bfloat16" or "float32", of weights and activations.
            indexer_dtype: "fp8" (default, as the official server), "bf16" or "float32".
            weights: "int8" or "fp8" keeps the text decoder's large matrices with 8 bits and a scale for each output
                channel.

        Raises:
            ConfigError: config.json is not one this library runs.
            CheckpointError: a tensor is missing, unexpected, misshapen, damaged or not finite.
            ValueError: unknown dtype or weights.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if weights not in get_args(WeightFormat):
            raise ValueError(f"weights {weights!r} is not one of {', '.join(get_args(WeightFormat))}")
        config = KeyeConfig.from_hf(folder, indexer_dtype=indexer_dtype)
        return cls(config, load_params(folder, config, DTYPES[dtype], weights=weights), weights)

    def arrays(self) -> dict[str, Any]:
        """The weights as nested dictionaries of `jax.Array`: what the pure functions take."""
        return jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def encode_vision(self, patches: jax.Array, grid_thw: jax.Array) -> jax.Array:
        """Vision rows of images and video frames.

        Args:
            patches: [N, 3, P, P] normalised pixels, frame after frame, row-major inside a frame.
            grid_thw: [M, 3] integers (frames, patch rows, patch columns).

        Returns:
            [N / merge ** 2, D], rows in the order of the pad tokens they stand for.

        Raises:
            ValueError: the grids do not cover the patches, or a grid side cannot be merged.
        """
        grid = jnp.asarray(grid_thw, jnp.int32)
        merge, vision = self.config.vision.spatial_merge_size, self.config.vision
        shape = (vision.num_channels, vision.patch_size, vision.patch_size)
        if patches.ndim != 4 or patches.shape[1:] != shape or grid.ndim != 2 or grid.shape[1] != 3:
            raise ValueError(f"patches {patches.shape} must be [N, {shape}] and grid_thw {grid.shape} [M, 3]")
        if int(jnp.sum(jnp.prod(grid, axis=1))) != patches.shape[0]:
            raise ValueError(f"grid_thw {grid.tolist()} does not add up to {patches.shape[0]} patches")
        if bool(jnp.any(grid < 1)) or bool(jnp.any(grid[:, 1:] % merge)):
            raise ValueError(f"grid_thw {grid.tolist()}: sides must be positive multiples of {merge}")
        params = self.arrays()
        tower = {"vision": params["vision"], "projector": params["projector"]}
        with _bodies():
            return _encode(tower, jnp.asarray(patches), grid, vision)

    def __call__(
        self, input_ids: jax.Array, position_ids: jax.Array, vision_rows: jax.Array | None = None
    ) -> jax.Array:
        """Logits at every position. Rows of unequal length are padded on the right with any token.

        Args:
            input_ids: [B, T] integers.
            position_ids: [3, B, T] integers, time, row and column positions.
            vision_rows: [R, D], one for each image or video pad token, in reading order over the batch.

        Returns:
            [B, T, V] float32.

        Raises:
            ValueError: shapes that do not fit, or as many rows as there are not pad tokens.
        """
        ids = jnp.asarray(input_ids, jnp.int32)
        positions = jnp.asarray(position_ids, jnp.int32)
        if ids.ndim != 2 or positions.shape != (3, *ids.shape):
            raise ValueError(f"input_ids {ids.shape} must be [B, T] and position_ids {positions.shape} [3, B, T]")
        is_vision = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        pads, given = int(is_vision.sum()), 0 if vision_rows is None else vision_rows.shape[0]
        if pads != given:
            raise ValueError(f"input_ids hold {pads} image and video pad tokens, vision_rows {given} rows")
        if vision_rows is None or not pads:
            vision_rows = jnp.zeros((1, self.config.text.hidden_size), jnp.float32)
        with _bodies():
            return _forward(self.arrays()["text"], ids, positions, jnp.asarray(vision_rows), is_vision, self.config)


def _bodies() -> AbstractContextManager[None]:
    """Kernels where the default device runs them, the plain bodies on other GPUs."""
    return nullcontext() if runs_kernels(jax.devices()[0]) else reference_only()


@partial(jax.jit, static_argnames="config")
def _encode(params: Params, patches: jax.Array, grid: jax.Array, config: Any) -> jax.Array:
    return vision_tokens(dict(params), patches, grid, config)


@partial(jax.jit, static_argnames="config")
def _forward(
    params: dict[str, Any],
    ids: jax.Array,
    positions: jax.Array,
    vision_rows: jax.Array,
    is_vision: jax.Array,
    config: KeyeConfig,
) -> jax.Array:
    """The prefill loop over a whole prompt, keeping every position's logits."""
    B, T = ids.shape
    dtype = params["embed_tokens"].dtype
    chunk = min(PREFILL_CHUNK, -(-T // 8) * 8)
    steps = -(-T // chunk)
    source = (jnp.cumsum(is_vision.reshape(-1)) - 1).reshape(B, T)

    def split(x: jax.Array) -> jax.Array:
        """[..., T] → [steps, ..., chunk]."""
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, steps * chunk - T)])
        return jnp.moveaxis(padded.reshape(*x.shape[:-1], steps, chunk), -2, 0)

    def step(cache: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        ids, positions, is_vision, source = part
        h = embed(params, ids, vision_rows[jnp.maximum(source, 0)], is_vision)
        hidden, cache = decoder(params, h, cache, positions, jnp.full((B,), chunk, jnp.int32), config)
        return cache, hidden

    capacity = -(-steps * chunk // CAPACITY_STEP) * CAPACITY_STEP
    parts = (split(ids), split(positions), split(is_vision), split(source))
    _, hidden = lax.scan(step, init_cache(config, B, capacity, dtype), parts)
    hidden = jnp.moveaxis(hidden, 0, 1).reshape(B, steps * chunk, -1)[:, :T]
    return lm_head(params, hidden)
