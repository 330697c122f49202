"""Which body of a kernel runs. Decided when a program is lowered, so that one machine can export another's graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import lax

HOPPER = "9.0"
"""The compute capability that the GPU kernels are made for."""

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """What is traced inside uses the plain jnp bodies on every platform: for GPUs that the kernels do not run on."""
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


Body = Callable[..., Any] | None
"""A kernel with the reference's results; None where there is none that takes these shapes or dtypes."""


def dispatch(reference: Callable[..., Any], *args: Any, cuda: Body = None, tpu: Body = None) -> Any:
    """Calls `cuda` in programs for NVIDIA GPUs, `tpu` in those for TPUs, and `reference` in all others.

    Args:
        reference: the specification.
        args: arrays, or trees of arrays. Static arguments are bound in all functions beforehand.
        cuda: the body for NVIDIA GPUs.
        tpu: the body for TPUs.
    """
    bodies = {name: body for name, body in (("cuda", cuda), ("tpu", tpu)) if body is not None}
    if not bodies or _reference_only.get():
        return reference(*args)
    return lax.platform_dependent(*args, **bodies, default=reference)


def runs_kernels(device: Any) -> bool:
    """Whether a `jax.Device` can run the kernels that programs for its platform hold."""
    return device.platform != "gpu" or getattr(device, "compute_capability", None) == HOPPER
