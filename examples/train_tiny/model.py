"""The forward pass for training: keye_jax's mathematics written so that gradients flow and a GPU is busy.

The library's forward runs inference kernels over a cache and has no gradients. Here a whole sequence goes at once
through dense attention under a mask, every expert computes every token, and frames are attended one by one. Norms,
rotary embedding, router and indexer are the library's own functions. tests/examples hold both to the same logits.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from examples.train_tiny.attention import Attended, attend, plain
from keye_jax.config import KeyeConfig, VisionConfig
from keye_jax.decoder import rope_tables
from keye_jax.moe import route
from keye_jax.ops import plain_layer_norm as layer_norm
from keye_jax.ops import reference_only, rms_norm, rotate
from keye_jax.rope import vision_tables
from keye_jax.vision import PROJECTOR_EPS, interpolate_positions, patch_layout

Mode = Literal["dense", "warm-up", "sparse"]
"""dense: attention over everything visible. warm-up: the same, and the indexer is compared with it. sparse: attention
over the indexer's selection, and the indexer compared inside it."""


class Inputs(NamedTuple):
    """Clips of one batch; padding frames come last in a clip and padding tokens last in a sequence."""

    patches: jax.Array  # [B, F, N, 3 * P * P] normalised pixels, N patches of every frame row-major
    tokens: jax.Array  # int32 [B, T]
    positions: jax.Array  # int32 [3, B, T]
    segment: jax.Array  # int32 [B, T], see prompts.Sample


class Outputs(NamedTuple):
    logits: jax.Array  # [B, T, V] float32
    divergence: jax.Array  # [L] float32: mean KL of the indexer's distribution from attention's; 0 in mode "dense"
    recall: jax.Array  # [L] float32: in "warm-up" the mean attention mass on the keys that the indexer selects, else 1
    imbalance: jax.Array  # [L] float32: 1 where all experts get equal shares, larger otherwise


def visible_keys(segment: jax.Array) -> jax.Array:
    """bool [B, T, T]: earlier tokens of the frames and of the same question, and the token itself."""
    T = segment.shape[1]
    earlier = jnp.tril(jnp.ones((T, T), bool))
    own, key = segment[:, :, None], segment[:, None, :]
    return earlier & ((key == 0) | (key == own))


def forward(params: dict[str, Any], inputs: Inputs, config: KeyeConfig, mode: Mode) -> Outputs:
    """Logits at every position; computes in the dtype of `params`."""
    text = params["text"]
    rows = vision_rows(params, inputs.patches, config.vision)
    B, D = inputs.tokens.shape[0], config.text.hidden_size
    is_vision = inputs.tokens == config.video_token_id
    source = jnp.maximum(jnp.cumsum(is_vision, axis=1) - 1, 0)
    spliced = jnp.take_along_axis(rows.reshape(B, -1, D), source[..., None], axis=1)
    h = jnp.where(is_vision[..., None], spliced, text["embed_tokens"][inputs.tokens])
    tables = rope_tables(inputs.positions, config, h.dtype)
    visible = visible_keys(inputs.segment)
    counted = inputs.segment >= 0

    @jax.checkpoint
    def layer(h: jax.Array, block: dict[str, Any]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        a = rms_norm(h, block["input_layernorm"], config.text.rms_norm_eps)
        attended = attend(block, a, tables, visible, counted, config, mode)
        h = h + attended.out
        m = rms_norm(h, block["post_attention_layernorm"], config.text.rms_norm_eps)
        out, imbalance = mixture(block["moe"], m, counted, config)
        return h + out, (*_compared(attended), imbalance)

    h, compared = lax.scan(layer, h, text["layers"])
    h = rms_norm(h, text["norm"], config.text.rms_norm_eps)
    return Outputs(jnp.einsum("btd,vd->btv", h, text["lm_head"]).astype(jnp.float32), *compared)


def _compared(attended: Attended) -> tuple[jax.Array, jax.Array]:
    return attended.divergence, attended.recall


def mixture(
    params: dict[str, Any], m: jax.Array, counted: jax.Array, config: KeyeConfig
) -> tuple[jax.Array, jax.Array]:
    """The experts' output for m [B, T, D], and how unequal their shares of the `counted` [B, T] tokens are (the usual
    product of shares and mean probabilities, times the number of experts)."""
    t = config.text
    B, T, D = m.shape
    flat = m.reshape(B * T, D)
    with reference_only():  # kernels have no gradient
        weights, experts = route(params["router"], flat, t)
    chosen = jax.nn.one_hot(experts, t.num_experts, dtype=jnp.float32)
    spread = jnp.einsum("nk,nke->ne", weights, chosen)
    gate, up = jnp.split(jnp.einsum("nd,edf->nef", flat, params["gate_up_proj"]), 2, axis=-1)
    hidden = (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(m.dtype)
    out = jnp.einsum("nef,efd->nd", hidden * spread[..., None].astype(m.dtype), params["down_proj"])
    count = counted.reshape(-1, 1).astype(jnp.float32)
    probabilities = jax.nn.softmax(jnp.einsum("nd,de->ne", flat, params["router"]).astype(jnp.float32))
    shares = jnp.sum(chosen.sum(1) * count, axis=0) / (count.sum() * t.num_experts_per_tok)
    means = jnp.sum(probabilities * count, axis=0) / count.sum()
    return out.reshape(B, T, D), t.num_experts * jnp.sum(shares * means)


def vision_rows(params: dict[str, Any], patches: jax.Array, config: VisionConfig) -> jax.Array:
    """Vision rows [B, F, N / merge ** 2, D] of square frames in patches [B, F, N, 3 * P * P]."""
    B, F, N, _ = patches.shape
    vision, projector = params["vision"], params["projector"]
    side = round(N**0.5)
    layout = patch_layout(jnp.array([[1, side, side]], jnp.int32), N)
    weight, bias = vision["patch_embedding"]["weight"], vision["patch_embedding"]["bias"]
    place = interpolate_positions(vision["position_embedding"], layout, config.table_side).astype(weight.dtype)
    x = jnp.einsum("fni,ic->fnc", patches.reshape(B * F, N, -1).astype(weight.dtype), weight) + bias + place
    tables = vision_tables(layout.row, layout.column, config.head_dim, config.rope_theta)

    @jax.checkpoint
    def block(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, None]:
        return _vision_block(layer, x, tables, config), None

    x, _ = lax.scan(block, x, vision["layers"])
    post, pre = vision["post_layernorm"], projector["pre_norm"]
    x = layer_norm(x, post["weight"], post["bias"], config.layer_norm_eps)
    merge = config.spatial_merge_size
    cells = x.reshape(B, F, side // merge, merge, side // merge, merge, -1).transpose(0, 1, 2, 4, 3, 5, 6)
    cells = cells.reshape(B, F, N // merge**2, config.merged_dim)
    cells = layer_norm(cells, pre["weight"], pre["bias"], PROJECTOR_EPS)
    first, second = projector["linear_1"], projector["linear_2"]
    hidden = jnp.einsum("bfni,io->bfno", cells, first["weight"]) + first["bias"]
    hidden = jax.nn.gelu(hidden.astype(jnp.float32), approximate=False).astype(cells.dtype)
    return jnp.einsum("bfni,io->bfno", hidden, second["weight"]) + second["bias"]


def _vision_block(
    params: dict[str, Any], x: jax.Array, tables: tuple[jax.Array, jax.Array], config: VisionConfig
) -> jax.Array:
    """One pre-norm encoder block for frames x [F, N, C]; patches of a frame see each other."""
    eps = config.layer_norm_eps

    def projected(name: str, a: jax.Array) -> jax.Array:
        return jnp.einsum("fnc,chw->fnhw", a, params[name]["weight"]) + params[name]["bias"]

    a = layer_norm(x, params["layer_norm1"]["weight"], params["layer_norm1"]["bias"], eps)
    q, k, v = (projected(name, a) for name in ("q_proj", "k_proj", "v_proj"))
    out = plain(rotate(q, *tables), rotate(k, *tables), v)
    x = x + jnp.einsum("fnhw,hwc->fnc", out, params["out_proj"]["weight"]) + params["out_proj"]["bias"]
    m = layer_norm(x, params["layer_norm2"]["weight"], params["layer_norm2"]["bias"], eps)
    hidden = jnp.einsum("fnc,cm->fnm", m, params["fc1"]["weight"]) + params["fc1"]["bias"]
    hidden = jax.nn.gelu(hidden, approximate=True)
    return x + jnp.einsum("fnm,mc->fnc", hidden, params["fc2"]["weight"]) + params["fc2"]["bias"]
