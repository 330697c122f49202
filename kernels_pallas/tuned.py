"""Sizes of TPU kernels that differ between chips, as data.

A kernel learns its chip from the abstract mesh that it is traced under: JAX puts the device there wherever a program
spans real devices, and `runtime.trace` does for graphs that are exported elsewhere. Where nothing is known the sizes in
the kernels' `Tuning`s stand, which fit every chip. No entry was measured: reasons are the compiler's, see the modules.
"""

from dataclasses import replace
from typing import Any, TypeVar

from jax.sharding import get_abstract_mesh

Sizes = TypeVar("Sizes", bound=Any)

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # One device is both cores of a chip; a single sequence's list would keep one of them idle.
    "TPU v5": {"attend_ids": {"cores": 2}},
}
"""What differs from a kernel's `Tuning()`, by `jax.Device.device_kind` and the kernel's public name."""


def sizes(kernel: str, safe: Sizes) -> Sizes:
    """The kernel's sizes for the chip that is being traced for.

    Args:
        kernel: its public name.
        safe: its `Tuning` for every chip.
    """
    device = get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    return replace(safe, **SIZES.get(kind, {}).get(kernel, {}))
