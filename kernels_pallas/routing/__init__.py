"""Which experts a chunk's tokens go to, and the order in which a grouped product takes them."""

from functools import partial

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.routing import gpu, reference


def choose_experts(logits: jax.Array, k: int, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """The k most probable experts of every token, best first, ties to the lower id.

    Args:
        logits: [N, E] of the router.
        renormalise: whether the weights of a token sum to 1; else they are the probabilities.

    Returns:
        weights [N, k] float32 and ids [N, k] int32. Softmax in float32.

    Raises:
        ValueError: fewer experts than k.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"cannot choose {k} experts by logits {logits.shape}")
    cuda = partial(gpu.choose_experts, k=k, renormalise=renormalise) if gpu.chooses(logits) else None
    return dispatch(partial(reference.choose_experts, k=k, renormalise=renormalise), logits, cuda=cuda)


def place(experts: jax.Array, weights: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each (token, expert) pair goes when pairs are sorted by expert, those of one expert in token order.

    A counting sort: a pair comes after all pairs of lower experts and after its own expert's pairs of earlier tokens.

    Args:
        experts: [N, k] int32 below E. Those of one token differ; of the last one, whose rows nobody reads, a token may
            have several pairs: they share a position, and some of the last positions have no pair.
        weights: [N, k] float32.
        E: how many experts there are.

    Returns:
        positions [N, k] int32, every number below N * k once; the experts' pair counts [E] int32; and the pairs'
        weights in their new order [N * k], undefined where no pair is.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if experts.ndim != 2 or weights.shape != experts.shape:
        raise ValueError(f"experts {experts.shape} and weights {weights.shape} do not fit")
    cuda = partial(gpu.place, E=E) if gpu.places(experts, E) else None
    return dispatch(partial(reference.place, E=E), experts, weights, cuda=cuda)
