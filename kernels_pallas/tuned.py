"""Sizes and ways of TPU kernels that differ between chips, as data.

A kernel learns its chip from the abstract mesh that it is traced under: JAX puts the device there wherever a program
spans real devices, and `runtime.trace` does for graphs that are exported elsewhere. Where nothing is known the sizes in
the kernels' `Tuning`s stand, which fit every chip. No entry was measured: reasons are the compiler's, see the modules.
"""

from dataclasses import replace
from typing import Any, TypeVar

from jax.sharding import get_abstract_mesh

Sizes = TypeVar("Sizes", bound=Any)

# Scores of 64 queries instead of 32 at 256K: keys are read half as often, and turned. Needs 128 MiB of VMEM.
_WIDE = {"scores_bytes": 64 << 20, "vmem_bytes": 96 << 20}
# What these chips unpack in one operation; tpu7x knows e4m3fn itself.
_FNUZ = {"fnuz": True}
# Where matrix units are 256 wide, a tile of twice the pages takes 11 (v6e) and 8 % (tpu7x) fewer cycles a page.
_LONG = {"pages": 8}

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "TPU v5 lite": {"select_bits": _WIDE, "select_ids": _FNUZ},
    "TPU v6 lite": {"select_bits": _WIDE, "select_ids": _FNUZ, "attend_bits": _LONG},
    # One device is both cores of a chip; a single sequence's list would keep one of them idle.
    "TPU v5": {"select_ids": _FNUZ, "attend_ids": {"cores": 2}},
    "TPU7x": {"attend_bits": _LONG},
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
