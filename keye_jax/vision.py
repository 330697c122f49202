"""The vision tower at native resolution and the projector into the decoder's width.

Patches of all images and frames are packed one after the other; everything that depends on an image's size is
computed from `grid_thw` inside the program, so one compiled program serves every mix of sizes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax.config import VisionConfig
from keye_jax.layers import linear
from keye_jax.ops import fused_linear, gelu_mlp, layer_norm, rotate, segment_attention
from keye_jax.rope import vision_tables

PROJECTOR_EPS = 1e-5


class PatchLayout(NamedTuple):
    """Where each of N packed patches lies; int32 [N]. Patches behind the last image are alone, each a segment."""

    row: jax.Array
    column: jax.Array
    grid_rows: jax.Array
    grid_columns: jax.Array
    segment: jax.Array  # index of the first patch of the same frame: nondecreasing

    @property
    def spans(self) -> jax.Array:
        """[N, 2] int32, for `segment_attention`: a frame's patches see each other."""
        return jnp.stack([self.segment, self.segment + self.grid_rows * self.grid_columns], axis=1)


def patch_layout(grid_thw: jax.Array, patches: int) -> PatchLayout:
    """Coordinates of packed patches.

    Args:
        grid_thw: [M, 3] int32 (frames, patch rows, patch columns); rows of zeros are padding and come last.
        patches: N, at least the grids' total.
    """
    frames, rows, columns = grid_thw[:, 0], grid_thw[:, 1], grid_thw[:, 2]
    ends = jnp.cumsum(frames * rows * columns)
    index = jnp.arange(patches, dtype=jnp.int32)
    item = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    outside = index >= ends[-1]
    item = jnp.minimum(item, grid_thw.shape[0] - 1)
    grid_rows = jnp.where(outside, 1, rows[item])
    grid_columns = jnp.where(outside, 1, columns[item])
    item_start = jnp.where(outside, ends[-1], ends[item] - frames[item] * rows[item] * columns[item])
    offset = index - item_start
    frame_size = grid_rows * grid_columns
    within = offset % frame_size
    return PatchLayout(
        row=within // grid_columns,
        column=within % grid_columns,
        grid_rows=grid_rows,
        grid_columns=grid_columns,
        segment=item_start + offset // frame_size * frame_size,
    )


def vision_tokens(params: dict[str, Any], patches: jax.Array, grid_thw: jax.Array, config: VisionConfig) -> jax.Array:
    """Vision rows for the decoder.

    Args:
        params: {"vision": ..., "projector": ...}.
        patches: [N, 3, P, P] normalised pixels, frame after frame, row-major inside a frame.
        grid_thw: [M, 3] int32, see `patch_layout`; grid sides are multiples of `spatial_merge_size`.

    Returns:
        [N // merge ** 2, D] in the parameters' dtype, frame after frame, row-major over merged cells.
    """
    hidden = vision_tower(params["vision"], patches, grid_thw, config)
    return project_rows(params["projector"], hidden, grid_thw, config)


def vision_tower(params: dict[str, Any], patches: jax.Array, grid_thw: jax.Array, config: VisionConfig) -> jax.Array:
    """Hidden states [N, C] of the patches after the last norm. Arguments as in `vision_tokens`."""
    layout = patch_layout(grid_thw, patches.shape[0])
    x = embed_patches(params, patches, layout, config)
    tables = vision_tables(layout.row, layout.column, config.head_dim, config.rope_theta)
    spans = layout.spans

    def body(layer: jax.Array, x: jax.Array) -> jax.Array:
        block = jax.tree.map(lambda w: w[layer], params["layers"])
        return vision_block(block, x, tables, spans, config)

    x = lax.fori_loop(0, config.num_hidden_layers, body, x)
    post = params["post_layernorm"]
    return layer_norm(x, post["weight"], post["bias"], config.layer_norm_eps)


def embed_patches(params: dict[str, Any], patches: jax.Array, layout: PatchLayout, config: VisionConfig) -> jax.Array:
    """Patch embedding plus the position table interpolated at each patch: [N, C]."""
    weight, bias = params["patch_embedding"]["weight"], params["patch_embedding"]["bias"]
    pixels = patches.reshape(patches.shape[0], config.patch_dim).astype(weight.dtype)
    positions = interpolate_positions(params["position_embedding"], layout, config.table_side)
    return fused_linear(pixels, weight, bias, positions.astype(weight.dtype))


def interpolate_positions(table: jax.Array, layout: PatchLayout, side: int) -> jax.Array:
    """The [side * side, C] table resized to each patch's grid and read at the patch: [N, C] float32.

    Bilinear, corners not aligned, no antialiasing (torch.nn.functional.interpolate's defaults).
    """
    table = table.astype(jnp.float32)

    def source(index: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        position = jnp.maximum(0.0, (index + 0.5) * (side / size.astype(jnp.float32)) - 0.5)
        low = jnp.minimum(jnp.floor(position).astype(jnp.int32), side - 1)
        return low, jnp.minimum(low + 1, side - 1), (position - low)[:, None]

    top, bottom, down = source(layout.row, layout.grid_rows)
    left, right, across = source(layout.column, layout.grid_columns)
    upper = table[top * side + left] * (1 - across) + table[top * side + right] * across
    lower = table[bottom * side + left] * (1 - across) + table[bottom * side + right] * across
    return upper * (1 - down) + lower * down


def vision_block(
    params: dict[str, Any],
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    spans: jax.Array,
    config: VisionConfig,
) -> jax.Array:
    """One pre-norm encoder block for x [N, C]; spans as in `segment_attention`."""
    N, C = x.shape
    eps = config.layer_norm_eps

    def flat(name: str, *shape: int) -> tuple[jax.Array, jax.Array]:
        return params[name]["weight"].reshape(shape), params[name]["bias"].reshape(-1)

    with jax.named_scope("vision_attention"):
        a = layer_norm(x, params["layer_norm1"]["weight"], params["layer_norm1"]["bias"], eps)
        heads = params["q_proj"]["bias"].shape
        q, k, v = (fused_linear(a, *flat(name, C, -1)).reshape(N, *heads) for name in ("q_proj", "k_proj", "v_proj"))
        out = segment_attention(rotate(q, *tables), rotate(k, *tables), v, spans)
        x = fused_linear(out.reshape(N, -1), *flat("out_proj", -1, C), x)
    with jax.named_scope("vision_mlp"):
        m = layer_norm(x, params["layer_norm2"]["weight"], params["layer_norm2"]["bias"], eps)
        fc1, fc2 = ((params[name]["weight"], params[name]["bias"]) for name in ("fc1", "fc2"))
        return gelu_mlp(m, fc1, fc2, x)


def project_rows(params: dict[str, Any], hidden: jax.Array, grid_thw: jax.Array, config: VisionConfig) -> jax.Array:
    """Merges blocks of patches and projects them: [N, C] → [N // merge ** 2, D]."""
    merge = config.spatial_merge_size
    patches = hidden.shape[0]
    blocks = patches // merge**2
    # The layout of merged cells is that of a grid `merge` times smaller on both sides.
    small = grid_thw // jnp.array([1, merge, merge], grid_thw.dtype)
    cells = patch_layout(small, blocks)
    first = cells.segment * merge**2
    corner = first + merge * cells.row * merge * cells.grid_columns + merge * cells.column
    inside = jnp.arange(merge)
    offsets = inside[:, None] * (merge * cells.grid_columns)[:, None, None] + inside
    source = corner[:, None] + offsets.reshape(blocks, merge**2)
    x = hidden[jnp.minimum(source, patches - 1)].reshape(blocks, config.merged_dim)
    x = layer_norm(x, params["pre_norm"]["weight"], params["pre_norm"]["bias"], PROJECTOR_EPS)
    x = jax.nn.gelu(linear(x, params["linear_1"]).astype(jnp.float32), approximate=False).astype(x.dtype)
    return linear(x, params["linear_2"])
