"""Which body of a kernel runs. Decided when a program is lowered, so that one machine can export another's graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import lax

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """What is traced inside uses the plain jnp bodies on every platform: for GPUs that the kernels do not run on."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


def dispatch(reference: Callable[..., Any], cuda: Callable[..., Any] | None, *args: Any) -> Any:
    """Calls `cuda` in programs for NVIDIA GPUs and `reference` in all others.

    Args:
        reference: the specification.
        cuda: a body with equal results; None where it does not take these shapes or dtypes.
        args: arrays, or trees of arrays. Static arguments are bound in both functions beforehand.
    """
    if cuda is None or _reference_only.get():
        return reference(*args)
    return lax.platform_dependent(*args, cuda=cuda, default=reference)
