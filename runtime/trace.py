"""Traces the model's programs into exported graphs. The only module of the runtime that imports `keye_jax`.

Needs no accelerator: shapes stand in for weights, and an abstract mesh for devices.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from runtime.bundle import Bundle

_RESULTS = {"prefill": 1, "decode": 4, "explain": 1}
"""Results after the cache; every device has them whole."""

_GPU = AbstractDevice("NVIDIA H200", num_cores=None, platform="gpu")

_UNSTABLE_CALLS = ("__gpu$xla.gpu.triton",)
"""Kernels whose format jax.export does not promise to keep; a JAX that cannot compile them says how to export again."""


class Tracer:
    """Traces the graphs of one model.

    Args:
        config: content of config.json.
        dtype: of weights and activations.
        indexer_dtype: "fp8", "bf16" or "float32".
        weights: format of the large matrices: "none", "int8" or "fp8".

    Raises:
        InputError: a configuration this library does not run.
    """

    def __init__(self, config: Mapping[str, Any], dtype: str, indexer_dtype: Any, weights: Any):
        try:
            self._config = KeyeConfig.from_hf(config, indexer_dtype=indexer_dtype)
        except ConfigError as error:
            raise InputError(str(error)) from None
        self._dtype = jnp.dtype(dtype)
        self._weights = weights
        self._params = abstract_params(self._config, self._dtype, weights)

    @classmethod
    def of(cls, bundle: "Bundle") -> "Tracer":
        """For the model of a bundle. Raises InputError likewise."""
        return cls(bundle.config, bundle.dtype, bundle.indexer_dtype, bundle.weight_format)

    def export(self, key: GraphKey, chip: AbstractDevice | None = None) -> export.Exported:
        """The graph that `key` names: weights sharded over its devices by rule, everything else replicated. TPU kernels
        get the sizes of `chip`, or without one those that fit all chips."""
        function, names, rest = getattr(self, f"_{key.program}")(key)
        params: Any = {name: self._params[name] for name in names}
        if names == ("text",):
            params = params["text"]
        program = partial(function, config=self._config)
        options: dict[str, Any] = {"donate_argnums": DONATED[key.program]}
        if key.devices > 1:
            program, options["in_shardings"] = self._spread(program, names, rest, key, chip)
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in _UNSTABLE_CALLS]
        make = export.export(jax.jit(program, **options), platforms=[key.platform], disabled_checks=checks)
        with _target(key, chip):
            return make(params, *rest)

    def _spread(
        self, program: Any, names: tuple[str, ...], rest: tuple[Any, ...], key: GraphKey, chip: AbstractDevice | None
    ) -> tuple[Any, Any]:
        """The program over the devices of `key`, and its arguments' shardings: weights and cache as the preset says,
        patches by shares of frames, everything else on every device."""
        whole, mesh = sharding.WHOLE, _mesh(key, chip)
        program = partial(program, layout=sharding.layout(key.preset, key.devices))
        weights: Any = sharding.param_partitions(self._config, key.preset, key.devices, self._weights)
        if names == ("text",):
            slots = sharding.cache_partitions(rest[0], key.preset)
            partitions: Any = (weights["text"], slots, *[whole] * (len(rest) - 1))
            results: Any = (slots, *[whole] * _RESULTS[key.program])
        else:
            partitions, results = ({name: weights[name] for name in names}, *[sharding.FRAMES] * len(rest)), whole
        return sharding.spread(program, mesh, partitions, results), sharding.shardings(partitions, mesh)

    def _vision(self, key: GraphKey) -> Any:
        v, patches = self._config.vision, key.devices * key.shape[0]
        pixels = _array((patches, v.num_channels, v.patch_size, v.patch_size), jnp.float32)
        grid = _array((patches // v.spatial_merge_size**2, 3), jnp.int32)
        return graphs.vision, ("vision", "projector"), (pixels, grid)

    def _prefill(self, key: GraphKey) -> Any:
        batch, chunk, context = key.shape
        inputs = {
            "tokens": _array((batch, chunk), jnp.int32),
            "positions": _array((3, batch, chunk), jnp.int32),
            "vision_rows": _array((batch, chunk, self._config.text.hidden_size), self._dtype),
            "is_vision": _array((batch, chunk), jnp.bool_),
            "valid": _array((batch,), jnp.int32),
        }
        return graphs.prefill, ("text",), (*self._carried(batch, context), inputs)

    def _decode(self, key: GraphKey) -> Any:
        batch, context = key.shape
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

    def _explain(self, key: GraphKey) -> Any:
        batch, chunk, context = key.shape
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
def _target(key: GraphKey, chip: AbstractDevice | None) -> Iterator[None]:
    """Tells the kernels which chip they are lowered for, or keeps them out."""
    mesh = _mesh(key, chip)
    if key.plain:
        with ops.reference_only():
            yield
    elif mesh.abstract_device is not None and key.devices == 1:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    else:
        yield


def _mesh(key: GraphKey, chip: AbstractDevice | None) -> AbstractMesh:
    """The graph's devices, with the chip that kernels are lowered for where there is one."""
    return sharding.abstract_mesh(key.devices, {"cuda": _GPU, "tpu": chip}.get(key.platform))


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
