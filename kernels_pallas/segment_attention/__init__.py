"""Full attention within each segment of a packed sequence: the vision tower's attention per image or frame."""

import jax

from kernels_pallas.segment_attention import reference


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Bidirectional attention between tokens of the same segment.

    Args:
        q, k, v: [N, H, K].
        segments: [N] int32, nondecreasing: a segment's tokens are consecutive.

    Returns:
        [N, H, K], dtype of q; softmax in float32, scale K ** -0.5.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.ndim != 3 or q.shape != k.shape or k.shape != v.shape or segments.shape != q.shape[:1]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} and segments {segments.shape} do not fit")
    return reference.segment_attention(q, k, v, segments)
