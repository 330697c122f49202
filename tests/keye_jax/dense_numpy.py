"""The model once more, written from its description in plain numpy: float64, one token, one head and one expert at a
time, every score of every key. No tiles, no cache, no chunks; slow and hard to get wrong. Tests hold the library
against it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from keye_jax.config import KeyeConfig, VisionConfig

# All finite values of float8_e4m3fn from zero up; the position is the code, so it is even where the mantissa is.
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


@dataclass
class Trace:
    """What happened to T tokens, layer by layer."""

    hidden: list[np.ndarray] = field(default_factory=list)
    """[T, D] after each layer."""
    scores: list[np.ndarray] = field(default_factory=list)
    """[T, T] index scores, -inf above the diagonal."""
    selected: list[np.ndarray] = field(default_factory=list)
    """[T, T] bool."""
    experts: list[np.ndarray] = field(default_factory=list)
    """[T, k] ascending."""
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[T, V]."""

    def smallest_gap(self, topk: int) -> float:
        """Smallest distance between the last chosen and the first refused score, relative to its row's largest: how
        much rounding may change a score before it changes a set. Scores of exactly zero (all heads rectified) are
        equal in any arithmetic and do not count."""
        gaps = [math.inf]
        for layer in self.scores:
            for t in range(topk, len(layer)):
                best = np.sort(layer[t, : t + 1])[::-1]
                if best[topk - 1] or best[topk]:
                    gaps.append((best[topk - 1] - best[topk]) / np.abs(best).max())
        return min(gaps)


def as_numpy(tree: Any) -> Any:
    """Nested dictionaries of arrays in float64."""
    if isinstance(tree, Mapping):
        return {name: as_numpy(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotates pair (i, i + K / 2) of x [K] by angle i."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag])


def mrope_angles(position: np.ndarray, sections: Sequence[int], theta: float, interleaved: bool) -> np.ndarray:
    """Angles [sum(sections)] of a token at position (time, row, column)."""
    pairs = sum(sections)
    angles = []
    for i in range(pairs):
        if interleaved:
            axis = i % 3
            if axis and i > 3 * sections[axis]:
                axis = 0
        else:
            axis = 0 if i < sections[0] else 1 if i < sections[0] + sections[1] else 2
        angles.append(position[axis] * theta ** (-i / pairs))
    return np.array(angles)


def hadamard(x: np.ndarray) -> np.ndarray:
    """x times the Sylvester matrix, built by doubling, over sqrt(width)."""
    matrix = np.ones((1, 1))
    while len(matrix) < len(x):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return x @ matrix / np.sqrt(len(x))


def round_e4m3(x: float) -> float:
    """The nearest e4m3 value; ties to the even mantissa, saturating."""
    size = min(abs(x), 448.0)
    upper = int(np.searchsorted(E4M3, size))
    if E4M3[upper] != size:
        below, above = size - E4M3[upper - 1], E4M3[upper] - size
        if below < above or (below == above and upper % 2):
            upper -= 1
    return math.copysign(E4M3[upper], x)


def quantise(x: np.ndarray) -> tuple[np.ndarray, float]:
    """e4m3 values of one block and its scale, the smallest power of two that brings the block into range."""
    amax = max(float(np.abs(x).max()), 1e-4)
    scale = 2.0**-40
    while amax / scale > 448:
        scale *= 2
    return np.array([round_e4m3(value / scale) for value in x]), scale


def top_keys(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest scores; among equals the lower index."""
    return sorted(range(len(scores)), key=lambda s: (-scores[s], s))[:count]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def index_scores(params: Mapping[str, Any], a: np.ndarray, positions: np.ndarray, config: KeyeConfig) -> np.ndarray:
    """[T, T] scores of key s for query t; -inf where s > t. `params` are one layer's "indexer" weights."""
    text, sparse = config.text, config.sparse
    sections = [n * sparse.indexer_head_dim // text.head_dim for n in text.mrope_section]
    interleaved = text.mrope_interleaved if sparse.mrope_interleaved is None else sparse.mrope_interleaved
    T, heads, eps = len(a), sparse.indexer_num_heads, text.rms_norm_eps
    queries, weights, keys, key_scales = [], [], [], []
    for t in range(T):
        angles = mrope_angles(positions[:, t], sections, text.rope_theta, interleaved)
        k = layer_norm(a[t] @ params["k_proj"], params["k_norm"], params["k_norm_bias"], eps)
        k, k_scale = _rounded(hadamard(rotate(k, angles)), config)
        keys.append(k)
        key_scales.append(k_scale)
        for j in range(heads):
            q = rms_norm(a[t] @ params["q_proj"][:, j], params["q_norm"], eps)
            q, q_scale = _rounded(hadamard(rotate(q, angles)), config)
            queries.append(q)
            weights.append(a[t] @ params["gate_proj"][:, j] * q_scale / np.sqrt(sparse.indexer_head_dim))
    scores = np.full((T, T), -np.inf)
    for t in range(T):
        for s in range(t + 1):
            terms = [weights[t * heads + j] * max(0.0, queries[t * heads + j] @ keys[s]) for j in range(heads)]
            scores[t, s] = key_scales[s] * sum(terms)
    return scores


def _rounded(x: np.ndarray, config: KeyeConfig) -> tuple[np.ndarray, float]:
    return quantise(x) if config.sparse.indexer_dtype == "fp8" else (x, 1.0)


def attention(
    params: Mapping[str, Any], a: np.ndarray, positions: np.ndarray, selected: np.ndarray, config: KeyeConfig
) -> np.ndarray:
    """[T, D] for one layer's "attn" weights; query t sees the keys of `selected[t]`."""
    text = config.text
    T, H, G = len(a), text.num_attention_heads, text.num_key_value_heads
    keys, values = np.zeros((2, T, G, text.head_dim))
    out = np.zeros_like(a)
    for t in range(T):
        angles = mrope_angles(positions[:, t], text.mrope_section, text.rope_theta, text.mrope_interleaved)
        for g in range(G):
            k = rms_norm(a[t] @ params["k_proj"][:, g], params["k_norm"], text.rms_norm_eps)
            keys[t, g] = rotate(k, angles)
            values[t, g] = a[t] @ params["v_proj"][:, g]
        chosen = np.flatnonzero(selected[t])
        for h in range(H):
            g = h // (H // G)
            q = rotate(rms_norm(a[t] @ params["q_proj"][:, h], params["q_norm"], text.rms_norm_eps), angles)
            p = softmax(keys[chosen, g] @ q / np.sqrt(text.head_dim))
            out[t] += p @ values[chosen, g] @ params["o_proj"][h]
    return out


def moe(params: Mapping[str, Any], m: np.ndarray, config: KeyeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Output [T, D] and chosen experts [T, k], ascending, for one layer's "moe" weights."""
    text = config.text
    out, chosen = np.zeros_like(m), []
    for t in range(len(m)):
        p = softmax(m[t] @ params["router"])
        experts = top_keys(p, text.num_experts_per_tok)
        total = p[experts].sum() if text.norm_topk_prob else 1.0
        for e in experts:
            gate, up = np.split(m[t] @ params["gate_up_proj"][e], 2)
            out[t] += p[e] / total * (gate / (1 + np.exp(-gate)) * up @ params["down_proj"][e])
        chosen.append(sorted(experts))
    return out, np.array(chosen)


def decode_text(params: Mapping[str, Any], embeddings: np.ndarray, positions: np.ndarray, config: KeyeConfig) -> Trace:
    """The decoder on embeddings [T, D] (vision rows put in) at positions [3, T]. `params` is the "text" tree."""
    weights, eps, trace = as_numpy(params), config.text.rms_norm_eps, Trace()
    h = np.asarray(embeddings).astype(np.float64)
    T = len(h)
    for number in range(config.text.num_hidden_layers):
        layer = layer_of(weights["layers"], number)
        a = np.array([rms_norm(row, layer["input_layernorm"], eps) for row in h])
        scores = index_scores(layer["indexer"], a, positions, config)
        selected = np.zeros((T, T), bool)
        for t in range(T):
            selected[t, top_keys(scores[t, : t + 1], config.sparse.topk)] = True
        h = h + attention(layer["attn"], a, positions, selected, config)
        m = np.array([rms_norm(row, layer["post_attention_layernorm"], eps) for row in h])
        out, experts = moe(layer["moe"], m, config)
        h = h + out
        trace.hidden.append(h)
        trace.scores.append(scores)
        trace.selected.append(selected)
        trace.experts.append(experts)
    trace.logits = np.array([rms_norm(row, weights["norm"], eps) for row in h]) @ weights["lm_head"].T
    return trace


def layer_of(stack: Any, number: int) -> Any:
    """One layer's weights out of a stacked tree."""
    if isinstance(stack, Mapping):
        return {name: layer_of(value, number) for name, value in stack.items()}
    return stack[number]


def resize_table(table: np.ndarray, side: int, rows: int, columns: int) -> np.ndarray:
    """A [side * side, C] table resized to [rows, columns, C]: bilinear, corners not aligned, no antialiasing."""

    def neighbours(index: int, size: int) -> tuple[int, int, float]:
        source = max(0.0, (index + 0.5) * side / size - 0.5)
        low = math.floor(source)
        return low, min(low + 1, side - 1), source - low

    grid = table.reshape(side, side, -1)
    out = np.zeros((rows, columns, grid.shape[2]))
    for r in range(rows):
        top, bottom, down = neighbours(r, rows)
        for c in range(columns):
            left, right, across = neighbours(c, columns)
            upper = grid[top, left] * (1 - across) + grid[top, right] * across
            lower = grid[bottom, left] * (1 - across) + grid[bottom, right] * across
            out[r, c] = upper * (1 - down) + lower * down
    return out


def encode_frame(
    params: Mapping[str, Any], patches: np.ndarray, rows: int, columns: int, config: VisionConfig
) -> np.ndarray:
    """Tower and projector for one image or frame of rows x columns patches: [rows * columns / merge ** 2, D].

    `params` holds the "vision" and "projector" trees.
    """
    weights = as_numpy(params)
    vision = weights["vision"]
    x = np.asarray(patches).astype(np.float64).reshape(rows * columns, -1) @ vision["patch_embedding"]["weight"]
    x = x + vision["patch_embedding"]["bias"]
    x = x + resize_table(vision["position_embedding"], config.table_side, rows, columns).reshape(x.shape)
    frequencies = config.rope_theta ** (-np.arange(config.head_dim // 4) / (config.head_dim // 4))
    angles = [np.concatenate([r * frequencies, c * frequencies]) for r in range(rows) for c in range(columns)]
    for number in range(config.num_hidden_layers):
        x = _vision_block(layer_of(vision["layers"], number), x, angles, config)
    post = vision["post_layernorm"]
    x = np.array([layer_norm(row, post["weight"], post["bias"], config.layer_norm_eps) for row in x])
    return project_frame(weights["projector"], x.reshape(rows, columns, -1), config.spatial_merge_size)


def _vision_block(
    block: Mapping[str, Any], x: np.ndarray, angles: list[np.ndarray], config: VisionConfig
) -> np.ndarray:
    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return np.array([layer_norm(r, block[name]["weight"], block[name]["bias"], config.layer_norm_eps) for r in x])

    a, out = norm("layer_norm1", x), np.zeros_like(x)
    for n in range(config.num_attention_heads):
        q, k, v = (a @ block[name]["weight"][:, n] + block[name]["bias"][n] for name in ("q_proj", "k_proj", "v_proj"))
        q, k = (np.array([rotate(row, angle) for row, angle in zip(y, angles, strict=True)]) for y in (q, k))
        p = np.array([softmax(row) for row in q @ k.T / np.sqrt(config.head_dim)])
        out += p @ v @ block["out_proj"]["weight"][n]
    x = x + out + block["out_proj"]["bias"]
    hidden = norm("layer_norm2", x) @ block["fc1"]["weight"] + block["fc1"]["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return x + hidden @ block["fc2"]["weight"] + block["fc2"]["bias"]


def project_frame(params: Mapping[str, Any], x: np.ndarray, merge: int) -> np.ndarray:
    """The projector on x [rows, columns, C]: each block of merge x merge patches becomes one row, its patches
    row-major."""
    rows = []
    for r in range(0, x.shape[0], merge):
        for c in range(0, x.shape[1], merge):
            block = x[r : r + merge, c : c + merge].reshape(-1)
            y = layer_norm(block, params["pre_norm"]["weight"], params["pre_norm"]["bias"], 1e-5)
            y = y @ params["linear_1"]["weight"] + params["linear_1"]["bias"]
            y = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in y])
            rows.append(y @ params["linear_2"]["weight"] + params["linear_2"]["bias"])
    return np.array(rows)
