"""Every parameter, declared once: shape, logical axes, and dtype where the model fixes it.

The abstract tree, random initialisation and the check of loaded weights all derive from `param_specs`. Parameters of
the decoder's and the vision tower's layers are stacked on a leading "layer" axis in memory (one program serves all
layers, and kernels take the stack and a layer index) and stored layer by layer on disk.

With 8-bit weights a large matrix of the text decoder is a dictionary {"values", "scale"} in its parameter's place. What
decides which keys and experts count (router, indexer) keeps its bits, as do lookups, norms and the vision tower.

Dimension letters: V vocabulary, D hidden, L layers, H query heads, G key/value heads, K head width, J index heads,
I index head width, E experts, F expert width; C vision hidden, M vision MLP, N vision heads, W vision head width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig, TextConfig, VisionConfig

Params = Mapping[str, Any]
"""Nested dictionaries with `jax.Array` leaves, shaped as `param_specs` says."""

Path = tuple[str, ...]

WeightFormat = Literal["none", "int8", "fp8"]
"""How the large matrices of the text decoder are kept; "none": in the model's dtype."""

WEIGHT_DTYPES: Mapping[WeightFormat, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

VALUES, SCALE = "values", "scale"
"""Names of the two arrays that stand for a matrix of 8-bit weights; see `kernels_pallas.quantized`."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
        axes: logical names, by which arrays are spread over devices.
        init: "normal" (0.02), "ones" or "zeros".
        dtype: None: the model's.
        contracted: axes that a product sums over, counted from the last (-1); a matrix that names them may be kept with
            8 bits and a scale for each index of its other axes.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    dtype: Any = None
    contracted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def stacked(self) -> bool:
        """True where the first axis counts layers."""
        return self.axes[0] == "layer"

    def as_dtype(self, model_dtype: Any) -> Any:
        return jnp.dtype(self.dtype or model_dtype)

    def nbytes(self, model_dtype: Any) -> int:
        return math.prod(self.shape) * self.as_dtype(model_dtype).itemsize


def param_specs(config: KeyeConfig, weights: WeightFormat = "none") -> dict[str, Any]:
    """The whole tree: {"text": ..., "vision": ..., "projector": ...} with `ParamSpec` leaves."""
    tree = {
        "text": _text_specs(config),
        "vision": _vision_specs(config.vision),
        "projector": _projector_specs(config.vision, config.text),
    }
    return unflatten({kept: s for path, spec in flatten(tree) for kept, s in kept_as(path, spec, weights).items()})


def kept_as(path: Path, spec: ParamSpec, weights: WeightFormat) -> dict[Path, ParamSpec]:
    """The arrays that stand for a parameter: itself, or 8-bit values and the scale of each output channel."""
    if weights == "none" or not spec.contracted:
        return {path: spec}
    axes = [axis for axis in range(-len(spec.shape), 0) if axis not in spec.contracted]
    shape, names = tuple(spec.shape[axis] for axis in axes), tuple(spec.axes[axis] for axis in axes)
    return {
        (*path, VALUES): ParamSpec(spec.shape, spec.axes, spec.init, WEIGHT_DTYPES[weights]),
        (*path, SCALE): ParamSpec(shape, names, "ones", jnp.float32),
    }


def _text_specs(config: KeyeConfig) -> dict[str, Any]:
    t, s = config.text, config.sparse
    L, D, V = t.num_hidden_layers, t.hidden_size, t.vocab_size
    H, G, K = t.num_attention_heads, t.num_key_value_heads, t.head_dim
    J, I = s.indexer_num_heads, s.indexer_head_dim  # noqa: E741
    E, F = t.num_experts, t.moe_intermediate_size
    attn = {
        "q_proj": ParamSpec((L, D, H, K), ("layer", "embed", "heads", None), contracted=(-3,)),
        "k_proj": ParamSpec((L, D, G, K), ("layer", "embed", "kv_heads", None), contracted=(-3,)),
        "v_proj": ParamSpec((L, D, G, K), ("layer", "embed", "kv_heads", None), contracted=(-3,)),
        "o_proj": ParamSpec((L, H, K, D), ("layer", "heads", None, "embed"), contracted=(-3, -2)),
        "q_norm": ParamSpec((L, K), ("layer", None), "ones"),
        "k_norm": ParamSpec((L, K), ("layer", None), "ones"),
    }
    indexer = {
        "q_proj": ParamSpec((L, D, J, I), ("layer", "embed", "index_heads", None)),
        "gate_proj": ParamSpec((L, D, J), ("layer", "embed", "index_heads")),
        "k_proj": ParamSpec((L, D, I), ("layer", "embed", None)),
        "q_norm": ParamSpec((L, I), ("layer", None), "ones"),
        # float32 as the official server computes it, whatever dtype the file declares.
        "k_norm": ParamSpec((L, I), ("layer", None), "ones", jnp.float32),
        "k_norm_bias": ParamSpec((L, I), ("layer", None), "zeros", jnp.float32),
    }
    expert = ("layer", "expert", "expert_in", "expert_out")
    moe = {
        "router": ParamSpec((L, D, E), ("layer", "embed", None)),
        "gate_up_proj": ParamSpec((L, E, D, 2 * F), expert, contracted=(-2,)),
        "down_proj": ParamSpec((L, E, F, D), expert, contracted=(-2,)),
    }
    return {
        "embed_tokens": ParamSpec((V, D), ("vocab", "embed")),
        "layers": {
            "input_layernorm": ParamSpec((L, D), ("layer", None), "ones"),
            "attn": attn,
            "indexer": indexer,
            "post_attention_layernorm": ParamSpec((L, D), ("layer", None), "ones"),
            "moe": moe,
        },
        "norm": ParamSpec((D,), (None,), "ones"),
        "lm_head": ParamSpec((V, D), ("vocab", "embed"), contracted=(-1,)),
    }


def _vision_specs(v: VisionConfig) -> dict[str, Any]:
    L, C, M, N, W = v.num_hidden_layers, v.hidden_size, v.intermediate_size, v.num_attention_heads, v.head_dim

    def head_proj() -> dict[str, ParamSpec]:
        return {
            "weight": ParamSpec((L, C, N, W), ("layer", "embed", "vision_heads", None)),
            "bias": ParamSpec((L, N, W), ("layer", "vision_heads", None), "zeros"),
        }

    return {
        "patch_embedding": _linear((v.patch_dim, C), (None, "embed")),
        "position_embedding": ParamSpec((v.table_side**2, C), (None, "embed")),
        "layers": {
            "layer_norm1": _layer_norm((L, C), ("layer", None)),
            "q_proj": head_proj(),
            "k_proj": head_proj(),
            "v_proj": head_proj(),
            "out_proj": {
                "weight": ParamSpec((L, N, W, C), ("layer", "vision_heads", None, "embed")),
                "bias": ParamSpec((L, C), ("layer", None), "zeros"),
            },
            "layer_norm2": _layer_norm((L, C), ("layer", None)),
            "fc1": _linear((L, C, M), ("layer", "embed", "mlp")),
            "fc2": _linear((L, M, C), ("layer", "mlp", "embed")),
        },
        "post_layernorm": _layer_norm((C,), (None,)),
    }


def _projector_specs(v: VisionConfig, t: TextConfig) -> dict[str, Any]:
    P = v.merged_dim
    return {
        "pre_norm": _layer_norm((P,), (None,)),
        "linear_1": _linear((P, P), (None, "mlp")),
        "linear_2": _linear((P, t.hidden_size), ("mlp", "embed")),
    }


def _linear(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, ParamSpec]:
    """Weight [..., in, out] and bias [..., out]."""
    return {
        "weight": ParamSpec(shape, axes),
        "bias": ParamSpec((*shape[:-2], shape[-1]), (*axes[:-2], axes[-1]), "zeros"),
    }


def _layer_norm(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, ParamSpec]:
    return {"weight": ParamSpec(shape, axes, "ones"), "bias": ParamSpec(shape, axes, "zeros")}


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Leaves of nested dictionaries with their paths, in declaration order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            for path, leaf in flatten(value):
                yield (name, *path), leaf
        else:
            yield (name,), value


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def map_specs(
    function: Callable[[ParamSpec], Any], config: KeyeConfig, weights: WeightFormat = "none"
) -> dict[str, Any]:
    """A tree of the parameters' shape with `function(spec)` at every leaf."""
    return unflatten({path: function(spec) for path, spec in flatten(param_specs(config, weights))})


def abstract_params(config: KeyeConfig, dtype: Any, weights: WeightFormat = "none") -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct`: what tracing and exporting need, without any weights."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.as_dtype(dtype)), config, weights)


def init_params(config: KeyeConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights: normal with standard deviation 0.02 for matrices, ones and zeros for norms and biases."""
    leaves = {}
    for number, (path, spec) in enumerate(flatten(param_specs(config))):
        leaf_dtype = spec.as_dtype(dtype)
        if spec.init == "normal":
            noise = jax.random.normal(jax.random.fold_in(key, number), spec.shape, jnp.float32)
            leaves[path] = (0.02 * noise).astype(leaf_dtype)
        else:
            leaves[path] = jnp.full(spec.shape, 1 if spec.init == "ones" else 0, leaf_dtype)
    return unflatten(leaves)


def count_params(config: KeyeConfig) -> int:
    """Number of weights the forward pass uses (the published 31,122,082,160 less the unused packing table)."""
    return sum(math.prod(spec.shape) for _, spec in flatten(param_specs(config)))


@dataclass(frozen=True)
class StorageGroup:
    """Arrays that are written and read together, as they lie on disk: one layer's without the layer axis."""

    layer: int | None
    specs: dict[Path, ParamSpec]
    """As the checkpoint has them."""
    weights: WeightFormat = "none"

    @property
    def stored(self) -> dict[Path, ParamSpec]:
        """As they are written."""
        return {kept: s for path, spec in self.specs.items() for kept, s in kept_as(path, spec, self.weights).items()}


def storage_groups(config: KeyeConfig, weights: WeightFormat = "none") -> dict[str, StorageGroup]:
    """How weights lie on disk, by group name. No array spans the layer stack, and what a group holds bounds the host
    memory of conversion, so a layer's two large expert arrays are groups of their own (0.8 GB the larger).
    """
    groups: dict[str, StorageGroup] = {}
    for path, spec in flatten(param_specs(config)):
        if not spec.stacked:
            groups.setdefault(".".join(path[:2]), StorageGroup(None, {}, weights)).specs[path] = spec
            continue
        stored = dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])
        alone = f".{path[-1]}" if "expert" in spec.axes else ""
        for layer in range(spec.shape[0]):
            name = f"{path[0]}.{path[1]}.{layer}{alone}"
            groups.setdefault(name, StorageGroup(layer, {}, weights)).specs[path] = stored
    return groups
