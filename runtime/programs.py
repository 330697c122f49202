"""The compiled programs: `vision`, `prefill` and `decode` of `keye_jax.graphs` for the static shapes asked for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax import graphs
from keye_jax.cache import abstract_cache
from keye_jax.config import KeyeConfig
from keye_jax.params import abstract_params

Compiling = Callable[[str], None]
"""Called with a program's name and shapes before it is compiled, which can take long."""


class Programs:
    """Compiles each program once per shape.

    Args:
        config: content of config.json.
        dtype: of weights and activations, "float32" or "bfloat16".
        indexer_dtype: "fp8", "bf16" or "float32".
        compiling: told what is about to be compiled.
    """

    def __init__(self, config: Mapping[str, Any], dtype: str, indexer_dtype: Any, compiling: Compiling | None = None):
        self.config = KeyeConfig.from_hf(config, indexer_dtype=indexer_dtype)
        self.dtype = jnp.dtype(dtype)
        self._params = abstract_params(self.config, self.dtype)
        self._compiling = compiling or (lambda name: None)
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache that `prefill` and `decode` take; see `keye_jax.cache`."""
        return abstract_cache(self.config, batch, capacity, self.dtype)

    def vision(self, patches: int) -> Callable[..., jax.Array]:
        """params, patches [N, 3, P, P] float32, grid [N // merge ** 2, 3] int32 → rows [N // merge ** 2, D]."""
        v = self.config.vision
        shape = (patches, v.num_channels, v.patch_size, v.patch_size)
        params = {name: self._params[name] for name in ("vision", "projector")}
        grid = jax.ShapeDtypeStruct((patches // v.spatial_merge_size**2, 3), jnp.int32)
        args = (params, jax.ShapeDtypeStruct(shape, jnp.float32), grid)
        return self._compile(("vision", f"{patches} patches"), graphs.vision, args)

    def prefill(self, batch: int, chunk: int, capacity: int) -> Callable[..., Any]:
        """params, cache, logits, `Chunk` → cache, logits; cache and logits are donated."""
        inputs = {
            "tokens": jax.ShapeDtypeStruct((batch, chunk), jnp.int32),
            "positions": jax.ShapeDtypeStruct((3, batch, chunk), jnp.int32),
            "vision_rows": jax.ShapeDtypeStruct((batch, chunk, self.config.text.hidden_size), self.dtype),
            "is_vision": jax.ShapeDtypeStruct((batch, chunk), jnp.bool_),
            "valid": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }
        args = (self._params["text"], self.cache_shapes(batch, capacity), self._logits(batch), inputs)
        name = ("prefill", f"batch {batch}", f"chunk {chunk}", f"context {capacity}")
        return self._compile(name, graphs.prefill, args, donate=(1, 2))

    def decode(self, batch: int, capacity: int, stop_ids: int) -> Callable[..., Any]:
        """params, cache, logits, `DecodeState`, steps → cache, logits, state, tokens, finite; donated likewise."""

        def row(dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch,), dtype)

        state = {
            "delta": row(jnp.int32),
            "done": row(jnp.bool_),
            "budget": row(jnp.int32),
            "stop_ids": jax.ShapeDtypeStruct((stop_ids,), jnp.int32),
            "sampling": {
                "temperature": row(jnp.float32),
                "top_p": row(jnp.float32),
                "top_k": row(jnp.int32),
                "seed": row(jnp.uint32),
            },
        }
        cache = self.cache_shapes(batch, capacity)
        args = (self._params["text"], cache, self._logits(batch), state, jax.ShapeDtypeStruct((), jnp.int32))
        name = ("decode", f"batch {batch}", f"context {capacity}", f"{stop_ids} stop ids")
        return self._compile(name, graphs.decode, args, donate=(1, 2))

    def _logits(self, batch: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, self.config.text.vocab_size), jnp.float32)

    def _compile(
        self, name: tuple[str, ...], function: Callable[..., Any], args: Any, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        if name not in self._compiled:
            self._compiling(", ".join(name))
            program = jax.jit(partial(function, config=self.config), donate_argnums=donate)
            self._compiled[name] = program.lower(*args).compile()
        return self._compiled[name]
