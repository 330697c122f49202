"""Traces the model's programs into exported graphs. The only module of the runtime that imports `keye_jax`.

Needs no accelerator: shapes stand in for weights, and an abstract mesh for devices.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from keye_jax import graphs, ops, sharding
from keye_jax.cache import abstract_cache
from keye_jax.config import KeyeConfig
from keye_jax.errors import ConfigError
from keye_jax.params import abstract_params
from runtime.errors import InputError
from runtime.graphs import DONATED, GraphKey

_CARRIED = 4
"""Results of decode after the cache; prefill has the first of them."""

_UNSTABLE_CALLS = ("__gpu$xla.gpu.triton",)
"""Kernels whose format jax.export does not promise to keep; a JAX that cannot compile them says how to export again."""


class Tracer:
    """Traces the graphs of one model.

    Args:
        config: content of config.json.
        dtype: of weights and activations.
        indexer_dtype: "fp8", "bf16" or "float32".

    Raises:
        InputError: a configuration this library does not run.
    """

    def __init__(self, config: Mapping[str, Any], dtype: str, indexer_dtype: Any):
        try:
            self._config = KeyeConfig.from_hf(config, indexer_dtype=indexer_dtype)
        except ConfigError as error:
            raise InputError(str(error)) from None
        self._dtype = jnp.dtype(dtype)
        self._params = abstract_params(self._config, self._dtype)

    def export(self, key: GraphKey) -> export.Exported:
        """The graph that `key` names: weights sharded over its devices by rule, everything else replicated."""
        function, names, rest = getattr(self, f"_{key.program}")(*key.shape)
        params: Any = {name: self._params[name] for name in names}
        if names == ("text",):
            params = params["text"]
        program = partial(function, config=self._config)
        options: dict[str, Any] = {"donate_argnums": DONATED[key.program]}
        if key.devices > 1:
            program, options["in_shardings"] = self._spread(program, names, rest, key)
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in _UNSTABLE_CALLS]
        make = export.export(jax.jit(program, **options), platforms=[key.platform], disabled_checks=checks)
        with _target(key):
            return make(params, *rest)

    def _spread(self, program: Any, names: tuple[str, ...], rest: tuple[Any, ...], key: GraphKey) -> tuple[Any, Any]:
        """The program over the devices of `key`, and its arguments' shardings: weights and cache as the preset says,
        everything else on every device."""
        whole, mesh = sharding.WHOLE, _mesh(key)
        weights: Any = sharding.param_partitions(self._config, key.preset, key.devices)
        if names == ("text",):
            slots = sharding.cache_partitions(rest[0], key.preset)
            program = partial(program, layout=sharding.layout(key.preset, key.devices))
            partitions, results = (weights["text"], slots, *[whole] * (len(rest) - 1)), (slots, *[whole] * _CARRIED)
            results = results[: 2 if key.program == "prefill" else None]
            if key.program == "explain":
                # Counts [B, C, S] lie where the cache's slots [L, B, S] do.
                results = (slots, slots["idx_k"])
        else:
            partitions, results = ({name: weights[name] for name in names}, *[whole] * len(rest)), whole
        return sharding.spread(program, mesh, partitions, results), sharding.shardings(partitions, mesh)

    def _vision(self, patches: int) -> Any:
        v = self._config.vision
        pixels = _array((patches, v.num_channels, v.patch_size, v.patch_size), jnp.float32)
        grid = _array((patches // v.spatial_merge_size**2, 3), jnp.int32)
        return graphs.vision, ("vision", "projector"), (pixels, grid)

    def _prefill(self, batch: int, chunk: int, context: int) -> Any:
        inputs = {
            "tokens": _array((batch, chunk), jnp.int32),
            "positions": _array((3, batch, chunk), jnp.int32),
            "vision_rows": _array((batch, chunk, self._config.text.hidden_size), self._dtype),
            "is_vision": _array((batch, chunk), jnp.bool_),
            "valid": _array((batch,), jnp.int32),
        }
        return graphs.prefill, ("text",), (*self._carried(batch, context), inputs)

    def _decode(self, batch: int, context: int) -> Any:
        state = {
            "delta": _array((batch,), jnp.int32),
            "done": _array((batch,), jnp.bool_),
            "budget": _array((batch,), jnp.int32),
            "stop_ids": _array((graphs.STOP_IDS,), jnp.int32),
            "sampling": {
                "temperature": _array((batch,), jnp.float32),
                "top_p": _array((batch,), jnp.float32),
                "top_k": _array((batch,), jnp.int32),
                "seed": _array((batch,), jnp.uint32),
            },
        }
        return graphs.decode, ("text",), (*self._carried(batch, context), state, _array((), jnp.int32))

    def _explain(self, batch: int, chunk: int, context: int) -> Any:
        produced = {
            "tokens": _array((batch, chunk), jnp.int32),
            "positions": _array((3, batch, chunk), jnp.int32),
            "valid": _array((batch,), jnp.int32),
        }
        cache, _ = self._carried(batch, context)
        return graphs.explain, ("text",), (cache, produced)

    def _carried(self, batch: int, context: int) -> tuple[Any, Any]:
        """What prefill and decode hand on: the cache and the logits."""
        logits = _array((batch, self._config.text.vocab_size), jnp.float32)
        return abstract_cache(self._config, batch, context, self._dtype), logits


@contextmanager
def _target(key: GraphKey) -> Iterator[None]:
    """Tells the kernels which chip they are lowered for, or keeps them out."""
    if key.plain:
        with ops.reference_only():
            yield
    elif key.platform == "cuda" and key.devices == 1:
        with jax.sharding.use_abstract_mesh(_mesh(key)):
            yield
    else:
        yield


def _mesh(key: GraphKey) -> AbstractMesh:
    """The graph's devices; on GPUs with the chip that the kernels are lowered for."""
    if key.platform != "cuda":
        return sharding.abstract_mesh(key.devices)
    return sharding.abstract_mesh(key.devices, AbstractDevice("NVIDIA H200", num_cores=None, platform="gpu"))


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
