"""Full attention within each segment of a packed sequence: the vision tower's attention per image or frame."""

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.segment_attention import gpu, reference, tpu


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: jax.Array) -> jax.Array:
    """Bidirectional attention between tokens of the same segment.

    Args:
        q, k, v: [N, H, K].
        spans: [N, 2] int32, where each token's segment begins and ends: the first token and the one behind the last.

    Returns:
        [N, H, K], dtype of q; softmax in float32, scale K ** -0.5.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.ndim != 3 or q.shape != k.shape or k.shape != v.shape or spans.shape != (q.shape[0], 2):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} and spans {spans.shape} do not fit")
    cuda = gpu.segment_attention if gpu.supports(q) else None
    on_tpu = tpu.segment_attention if tpu.supports(q) else None
    return dispatch(reference.segment_attention, q, k, v, spans, cuda=cuda, tpu=on_tpu)
