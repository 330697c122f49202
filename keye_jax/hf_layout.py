"""Where every tensor of the official checkpoint layout goes.

One table: a row names a tensor and its targets, each with a view. A view shows the target array the way the file
holds it (transposed, heads flattened, one expert's slice), so that loading can write through it and the shape that
a tensor must have is the shape of its views.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.errors import CheckpointError
from keye_jax.params import Path
from keye_jax.safetensors import Tensor

View = Callable[[np.ndarray], np.ndarray]

# Tensors that published checkpoints hold and no forward pass reads, with the reason.
IGNORED = {
    r"visual\.vision_model\.embeddings\.packing_position_embedding\.weight": "a table that nothing indexes",
    r"visual\.vision_model\.head\.(attention|mlp|layernorm)\..+": "SigLIP's pooling; patches are not pooled",
    r"visual\.vision_model\.head\.probe": "SigLIP's pooling; patches are not pooled",
    r".+\.rotary(_pos)?_emb\.inv_freq": "rotary frequencies follow from the configuration",
}

_UNFUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)\d+\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Row:
    """One line of the table: a tensor that holds `targets`, one after another along its first axis."""

    pattern: str
    """Tensor name; `{layer}` stands for the layer's number."""
    targets: tuple[tuple[Path, View], ...]


def is_ignored(name: str) -> bool:
    """True for a tensor that may be there and is not read."""
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def expected_rows(config: KeyeConfig, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Row, int | None]]:
    """Every tensor that the checkpoint must hold: its name, row and layer.

    Args:
        found: the tensors that are there; they decide between the accepted layouts of the experts.

    Raises:
        CheckpointError: a layer's experts in two layouts at once.
    """
    names = {match[1] for name in found if (match := _UNFUSED.fullmatch(name))}
    fused = _fused_expert_rows(transposed=_experts_transposed(config, found))
    for layer in range(config.text.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        if prefix in names:
            mixed = next((row for row in fused if row.pattern.format(layer=layer) in found), None)
            if mixed is not None:
                raise CheckpointError(
                    f"layer {layer} holds its experts twice: {mixed.pattern.format(layer=layer)!r} and "
                    f"{prefix}N.*; keep one of the two"
                )
        experts = _unfused_expert_rows(config) if prefix in names else fused
        for row in chain(_decoder_rows(), experts):
            yield row.pattern.format(layer=layer), row, layer
    for layer in range(config.vision.num_hidden_layers):
        for row in _encoder_rows():
            yield row.pattern.format(layer=layer), row, layer
    for row in _other_rows(config):
        yield row.pattern, row, None


def _row(pattern: str, target: str, view: View | None = None) -> Row:
    return Row(pattern, ((tuple(target.split(".")), view or _same),))


def _other_rows(config: KeyeConfig) -> list[Row]:
    v = config.vision
    kernel = (v.num_channels, v.patch_size, v.patch_size)
    tower = "visual.vision_model"
    patches, norm = f"{tower}.embeddings.patch_embedding", f"{tower}.post_layernorm"
    return [
        _row("model.embed_tokens.weight", "text.embed_tokens"),
        _row("model.norm.weight", "text.norm"),
        _row("lm_head.weight", "text.lm_head"),
        _row(f"{patches}.weight", "vision.patch_embedding.weight", partial(_conv, kernel=kernel)),
        _row(f"{patches}.bias", "vision.patch_embedding.bias"),
        _row(f"{tower}.embeddings.position_embedding.weight", "vision.position_embedding"),
        _row(f"{norm}.weight", "vision.post_layernorm.weight"),
        _row(f"{norm}.bias", "vision.post_layernorm.bias"),
        _row("mlp_AR.pre_norm.weight", "projector.pre_norm.weight"),
        _row("mlp_AR.pre_norm.bias", "projector.pre_norm.bias"),
        _row("mlp_AR.linear_1.weight", "projector.linear_1.weight", _linear),
        _row("mlp_AR.linear_1.bias", "projector.linear_1.bias"),
        _row("mlp_AR.linear_2.weight", "projector.linear_2.weight", _linear),
        _row("mlp_AR.linear_2.bias", "projector.linear_2.bias"),
    ]


def _decoder_rows() -> list[Row]:
    layer, ours = "model.layers.{layer}", "text.layers"
    attn, indexer = f"{layer}.self_attn", f"{layer}.self_attn.sa_indexer"
    # The official projection holds the index heads' queries first, then one gate row per head.
    fused_query = (
        (("text", "layers", "indexer", "q_proj"), _linear),
        (("text", "layers", "indexer", "gate_proj"), _linear),
    )
    return [
        _row(f"{layer}.input_layernorm.weight", f"{ours}.input_layernorm"),
        *(_row(f"{attn}.{p}_proj.weight", f"{ours}.attn.{p}_proj", _linear) for p in "qkv"),
        _row(f"{attn}.o_proj.weight", f"{ours}.attn.o_proj", _linear_from_heads),
        _row(f"{attn}.q_norm.weight", f"{ours}.attn.q_norm"),
        _row(f"{attn}.k_norm.weight", f"{ours}.attn.k_norm"),
        Row(f"{indexer}.q_proj.weight", fused_query),
        _row(f"{indexer}.k_proj.weight", f"{ours}.indexer.k_proj", _linear),
        _row(f"{indexer}.q_norm.weight", f"{ours}.indexer.q_norm"),
        _row(f"{indexer}.k_norm.weight", f"{ours}.indexer.k_norm"),
        _row(f"{indexer}.k_norm.bias", f"{ours}.indexer.k_norm_bias"),
        _row(f"{layer}.post_attention_layernorm.weight", f"{ours}.post_attention_layernorm"),
        _row(f"{layer}.mlp.gate.weight", f"{ours}.moe.router", _linear),
    ]


def _fused_expert_rows(*, transposed: bool) -> list[Row]:
    experts, view = "model.layers.{layer}.mlp.experts", _swap_last if transposed else _same
    return [
        _row(f"{experts}.gate_up_proj", "text.layers.moe.gate_up_proj", view),
        _row(f"{experts}.down_proj", "text.layers.moe.down_proj", view),
    ]


def _unfused_expert_rows(config: KeyeConfig) -> Iterator[Row]:
    width = config.text.moe_intermediate_size
    parts = {
        "gate_proj": ("gate_up_proj", slice(0, width)),
        "up_proj": ("gate_up_proj", slice(width, 2 * width)),
        "down_proj": ("down_proj", slice(None)),
    }
    for e in range(config.text.num_experts):
        for name, (target, columns) in parts.items():
            pattern = f"model.layers.{{layer}}.mlp.experts.{e}.{name}.weight"
            yield _row(pattern, f"text.layers.moe.{target}", partial(_expert, e=e, columns=columns))


def _encoder_rows() -> list[Row]:
    layer, ours = "visual.vision_model.encoder.layers.{layer}", "vision.layers"
    rows = [
        _row(f"{layer}.{norm}.{kind}", f"{ours}.{norm}.{kind}")
        for norm in ("layer_norm1", "layer_norm2")
        for kind in ("weight", "bias")
    ]
    for p in ("q_proj", "k_proj", "v_proj"):
        rows.append(_row(f"{layer}.self_attn.{p}.weight", f"{ours}.{p}.weight", _linear))
        rows.append(_row(f"{layer}.self_attn.{p}.bias", f"{ours}.{p}.bias", _flat))
    rows.append(_row(f"{layer}.self_attn.out_proj.weight", f"{ours}.out_proj.weight", _linear_from_heads))
    rows.append(_row(f"{layer}.self_attn.out_proj.bias", f"{ours}.out_proj.bias"))
    for p in ("fc1", "fc2"):
        rows.append(_row(f"{layer}.mlp.{p}.weight", f"{ours}.{p}.weight", _linear))
        rows.append(_row(f"{layer}.mlp.{p}.bias", f"{ours}.{p}.bias"))
    return rows


def _same(target: np.ndarray) -> np.ndarray:
    return target


def _flat(target: np.ndarray) -> np.ndarray:
    return target.reshape(-1)


def _linear(target: np.ndarray) -> np.ndarray:
    """[in, *heads] as nn.Linear's [out, in]."""
    return target.reshape(target.shape[0], -1).T


def _linear_from_heads(target: np.ndarray) -> np.ndarray:
    """[heads, width, out] as nn.Linear's [out, in]."""
    return target.reshape(-1, target.shape[-1]).T


def _conv(target: np.ndarray, *, kernel: tuple[int, int, int]) -> np.ndarray:
    """[channel * row * column, out] as Conv2d's [out, channel, row, column]."""
    return target.T.reshape(-1, *kernel)


def _swap_last(target: np.ndarray) -> np.ndarray:
    return target.swapaxes(-2, -1)


def _expert(target: np.ndarray, *, e: int, columns: slice) -> np.ndarray:
    """One expert's columns of [expert, in, out] as nn.Linear's [out, in]."""
    return target[e, :, columns].T


def _experts_transposed(config: KeyeConfig, found: Mapping[str, Tensor]) -> bool:
    """True if fused experts lie as [expert, out, in], as transformers 5 writes them.

    The published layout is [expert, in, out]. At most one of the two tensors is square; the other decides.
    """
    t = config.text
    swapped = {
        "gate_up_proj": (t.num_experts, 2 * t.moe_intermediate_size, t.hidden_size),
        "down_proj": (t.num_experts, t.hidden_size, t.moe_intermediate_size),
    }
    return any(
        tensor is not None and tensor.shape == shape and shape[1] != shape[2]
        for layer in range(t.num_hidden_layers)
        for leaf, shape in swapped.items()
        for tensor in (found.get(f"model.layers.{layer}.mlp.experts.{leaf}"),)
    )
