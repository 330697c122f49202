"""From the tensors of an official checkpoint to this library's parameters.

One table says where every tensor goes. A row names a tensor and its targets, each with a view: a function
that shows the target array the way the file holds it (transposed, heads flattened, one expert's slice).
Loading writes through the view a piece at a time, so nothing larger than the target is ever held, and the
expected shape of a tensor is the shape of its views.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from keye_jax.config import KeyeConfig
from keye_jax.errors import CheckpointError
from keye_jax.params import ParamSpec, Path, StorageGroup, flatten, param_specs, unflatten
from keye_jax.safetensors import Tensor, open_folder

View = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total), counted in the target dtype."""

# Tensors that published checkpoints hold and no forward pass reads, with the reason.
IGNORED = {
    r"visual\.vision_model\.embeddings\.packing_position_embedding\.weight": "a table that nothing indexes",
    r"visual\.vision_model\.head\.(attention|mlp|layernorm)\..+": "SigLIP's pooling; patches are not pooled",
    r"visual\.vision_model\.head\.probe": "SigLIP's pooling; patches are not pooled",
    r".+\.rotary(_pos)?_emb\.inv_freq": "rotary frequencies follow from the configuration",
}

_UNFUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)\d+\.(gate|up|down)_proj\.weight")

# Stacks up to this size are put together in host memory and sent at once; larger ones grow on the device,
# layer by layer, so that the host never holds a whole one (38.7 GB for the published expert weights).
_HOST_STACK_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One line of the table: a tensor that holds `targets`, one after another along its first axis."""

    pattern: str
    """Tensor name; `{layer}` and `{expert}` stand for numbers."""
    targets: tuple[tuple[Path, View], ...]


@dataclass(frozen=True)
class Source:
    """A part of a tensor that fills a target: its rows from `first`, as many as the view has."""

    tensor: Tensor
    first: int
    view: View


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors were all found to fit the configuration; no data read yet."""

    config: KeyeConfig
    sources: Mapping[tuple[Path, int | None], tuple[Source, ...]]
    """What fills each parameter; the number is the layer of a stacked one."""
    fingerprint: str
    ignored: tuple[str, ...]
    """Names of tensors left out, each by a pattern of `IGNORED`."""

    def fill(self, path: Path, layer: int | None, target: np.ndarray) -> None:
        """Reads one parameter (one layer of a stacked one) into `target`, converting to its dtype.

        Raises:
            CheckpointError: a value that is not finite in that dtype; a file that shrank.
        """
        for source in self.sources[path, layer]:
            view = source.view(target)
            stop = source.first + view.shape[0]
            for row, piece in source.tensor.read_rows(source.first, stop):
                values = piece.astype(target.dtype, copy=False)
                if not _all_finite(values):
                    raise CheckpointError(
                        f"tensor {source.tensor.name!r} in {source.tensor.file.name} holds a value that is "
                        f"not finite as {target.dtype}; fetch the file again"
                    )
                _copy_rows(view[row - source.first :], values)


def load_params(
    folder: str | os.PathLike[str], config: KeyeConfig, dtype: Any, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Reads all weights of an official checkpoint folder.

    Args:
        dtype: float32 or bfloat16; parameters that the model fixes to float32 stay float32.
        progress: called with (bytes done, bytes in total) after each array.

    Returns:
        The tree of `params.param_specs` with `jax.Array` leaves on the default device.

    Raises:
        CheckpointError: see `open_checkpoint` and `Checkpoint.fill`.
    """
    dtype = weight_dtype(dtype)
    checkpoint = open_checkpoint(folder, config)
    specs = dict(flatten(param_specs(config)))
    total = sum(_nbytes(spec, dtype) for spec in specs.values())
    done = 0
    leaves = {}
    for path, spec in specs.items():
        leaves[path] = _load_leaf(checkpoint, path, spec, dtype)
        done += _nbytes(spec, dtype)
        if progress is not None:
            progress(done, total)
    return unflatten(leaves)


def read_group(checkpoint: Checkpoint, group: StorageGroup, dtype: Any) -> dict[Path, np.ndarray]:
    """Reads one storage group (see `params.storage_groups`): full path of each parameter → array as stored.

    Raises:
        CheckpointError: see `Checkpoint.fill`.
    """
    dtype = weight_dtype(dtype)
    arrays = {}
    for path, spec in group.specs.items():
        arrays[path] = np.empty(spec.shape, spec.as_dtype(dtype))
        checkpoint.fill(path, group.layer, arrays[path])
    return arrays


def open_checkpoint(folder: str | os.PathLike[str], config: KeyeConfig) -> Checkpoint:
    """Reads the headers of all shards and checks every tensor against the configuration.

    Raises:
        CheckpointError: damaged files; a tensor that is missing, unexpected, misshapen or not floating.
    """
    files = open_folder(folder)
    found = files.tensors
    ignored = {name for name in found if any(re.fullmatch(pattern, name) for pattern in IGNORED)}
    expected = dict(_expected(config, found))
    _check_names(set(expected), set(found) - ignored)
    specs = dict(flatten(param_specs(config)))
    sources: dict[tuple[Path, int | None], tuple[Source, ...]] = {}
    for name, (row, layer) in expected.items():
        tensor, first, shape = found[name], 0, ()
        for path, view in row.targets:
            part = view(_blank(specs[path])).shape
            key = (path, layer if specs[path].stacked else None)
            sources[key] = (*sources.get(key, ()), Source(tensor, first, view))
            first += part[0]
            shape = (first, *part[1:])
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)} where config.json asks for {list(shape)}; "
                "the weights belong to another model or config.json was changed"
            )
        tensor.check_floating()
    return Checkpoint(config, sources, files.fingerprint, tuple(sorted(ignored)))


def weight_dtype(dtype: Any) -> np.dtype:
    """The numpy type of float32 or bfloat16 (name or type). Raises CheckpointError for any other."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (np.float32, ml_dtypes.bfloat16):
        raise CheckpointError(f"dtype {dtype!r} is not supported for weights; use float32 or bfloat16")
    return np.dtype(found)


def _expected(config: KeyeConfig, found: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Row, int | None]]]:
    """Every tensor name the checkpoint must hold, with its row and layer."""
    names = {match[1] for name in found if (match := _UNFUSED.fullmatch(name))}
    fused = _fused_expert_rows(transposed=_experts_transposed(config, found))
    unfused = _unfused_expert_rows(config)
    for layer in range(config.text.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        if prefix in names:
            mixed = next((row for row in fused if row.pattern.format(layer=layer) in found), None)
            if mixed is not None:
                raise CheckpointError(
                    f"layer {layer} holds its experts twice: {mixed.pattern.format(layer=layer)!r} and "
                    f"{prefix}N.*; keep one of the two"
                )
        for row in (*_decoder_rows(), *(unfused if prefix in names else fused)):
            yield row.pattern.format(layer=layer), (row, layer)
    for layer in range(config.vision.num_hidden_layers):
        for row in _encoder_rows():
            yield row.pattern.format(layer=layer), (row, layer)
    for row in _other_rows(config):
        yield row.pattern, (row, None)


def _row(pattern: str, target: str, view: View | None = None) -> Row:
    return Row(pattern, ((tuple(target.split(".")), view or _same),))


def _other_rows(config: KeyeConfig) -> list[Row]:
    v = config.vision
    kernel = (v.num_channels, v.patch_size, v.patch_size)
    embeddings, norm = "visual.vision_model.embeddings", "visual.vision_model.post_layernorm"
    return [
        _row("model.embed_tokens.weight", "text.embed_tokens"),
        _row("model.norm.weight", "text.norm"),
        _row("lm_head.weight", "text.lm_head"),
        _row(
            f"{embeddings}.patch_embedding.weight",
            "vision.patch_embedding.weight",
            partial(_conv, kernel=kernel),
        ),
        _row(f"{embeddings}.patch_embedding.bias", "vision.patch_embedding.bias"),
        _row(f"{embeddings}.position_embedding.weight", "vision.position_embedding"),
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


def _unfused_expert_rows(config: KeyeConfig) -> list[Row]:
    rows = []
    width = config.text.moe_intermediate_size
    for e in range(config.text.num_experts):
        expert = f"model.layers.{{layer}}.mlp.experts.{e}"
        gate, up = slice(0, width), slice(width, 2 * width)
        rows += [
            _row(
                f"{expert}.gate_proj.weight",
                "text.layers.moe.gate_up_proj",
                partial(_expert, e=e, columns=gate),
            ),
            _row(f"{expert}.up_proj.weight", "text.layers.moe.gate_up_proj", partial(_expert, e=e, columns=up)),
            _row(
                f"{expert}.down_proj.weight",
                "text.layers.moe.down_proj",
                partial(_expert, e=e, columns=slice(None)),
            ),
        ]
    return rows


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


def _check_names(expected: set[str], found: set[str]) -> None:
    for names, what, mend in (
        (
            found - expected,
            "unexpected tensor",
            "the weights belong to another model or config.json was changed",
        ),
        (expected - found, "missing tensor", "the download is incomplete or config.json was changed"),
    ):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            raise CheckpointError(f"{what} {first!r}{more}; {mend}")


def _blank(spec: ParamSpec) -> np.ndarray:
    """An array of a parameter's shape (of one layer) that takes no memory: views of it tell shapes."""
    return np.broadcast_to(np.float32(0), spec.shape[1:] if spec.stacked else spec.shape)


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:
        # All exponent bits set: seven times as fast as isfinite for this type.
        return bool((values.view(np.uint16) << 1).max(initial=0) < 0xFF00)
    return bool(np.isfinite(values).all())


def _copy_rows(view: np.ndarray, values: np.ndarray) -> None:
    """view[:len(values)] = values; blocks of 64 rows keep a transposition in cache, which doubles its speed."""
    for row in range(0, len(values), 64):
        block = values[row : row + 64]
        view[row : row + len(block)] = block


def _nbytes(spec: ParamSpec, dtype: np.dtype) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.as_dtype(dtype)).itemsize


def _load_leaf(checkpoint: Checkpoint, path: Path, spec: ParamSpec, dtype: np.dtype) -> jax.Array:
    leaf_dtype = spec.as_dtype(dtype)
    if not spec.stacked or _nbytes(spec, dtype) <= _HOST_STACK_BYTES:
        host = np.empty(spec.shape, leaf_dtype)
        for layer in range(spec.shape[0]) if spec.stacked else [None]:
            checkpoint.fill(path, layer, host if layer is None else host[layer])
        return jax.device_put(host)
    stack = jnp.zeros(spec.shape, leaf_dtype)
    for layer in range(spec.shape[0]):
        host = np.empty(spec.shape[1:], leaf_dtype)
        checkpoint.fill(path, layer, host)
        stack = _set_layer(stack, host, layer)
    return stack


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, values: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, values, layer, 0)
