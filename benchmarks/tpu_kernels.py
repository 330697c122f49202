"""Compiles every TPU kernel at the published model's sizes for chips that are not here:
`python -m benchmarks.tpu_kernels [--chip NAME] [--json FILE]`.

The compiler is the real one (libtpu), so that a kernel that breaks a rule of the chip, or does not fit its VMEM, is a
row with the compiler's words and exit code 1. Nothing runs: times are floors, from the operations and the bytes that
each kernel's schedule moves (its module's head derives them) and the chips' datasheets.
"""

import argparse
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import tpu_host

_MIB = 1 << 20
_VMEM = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


@dataclass(frozen=True)
class Chip:
    """A topology with it, and its datasheet: bf16 operations and bytes of HBM a second, of one jax device."""

    topology: str
    flops: float
    bytes: float


CHIPS = {
    "v5e": Chip("v5e:2x4", 197e12, 819e9),
    "v6e": Chip("v6e:2x4", 918e12, 1640e9),
    "v5p": Chip("v5p:2x2x1", 459e12, 2765e9),
    "tpu7x": Chip("tpu7x:2x2x1", 1153.5e12, 3690e9),
}


@dataclass(frozen=True)
class Row:
    """One kernel on one chip."""

    kernel: str
    shape: str
    chip: str
    seconds: float
    """Of compiling."""
    flops: float
    hbm_bytes: float
    """That the schedule moves."""
    floor_us: float
    """The longer of both at datasheet rates."""
    vmem_bytes: int | None = None
    """The most that one of its calls takes."""
    temporary_bytes: int | None = None
    """HBM that the whole program takes beside its arguments and results."""
    xla_cycles: int | None = None
    """That the compiler estimates for the operations around the kernel; for kernels it says nothing."""
    error: str | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_kernels", description="Compile every TPU kernel for chips that are not here."
    )
    parser.add_argument("--chip", choices=tuple(CHIPS), action="append", help="only this one (default: all)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    args = parser.parse_args()
    libtpu = tpu_host.prepare()
    if libtpu is None:
        return 2
    from benchmarks.tpu_cases import cases

    rows = []
    print(_HEADER)
    for case in cases():
        for chip in args.chip or CHIPS:
            rows.append(_compile(case, chip))
            print(_line(rows[-1]), flush=True)
            if args.json is not None:
                datasheet = {name: asdict(chip) for name, chip in CHIPS.items()}
                tpu_host.write_record(args.json, "benchmarks.tpu_kernels", libtpu, rows, datasheet=datasheet)
    failed = [row for row in rows if row.error is not None]
    print(f"{len(rows) - len(failed)} of {len(rows)} compile")
    return 1 if failed else 0


def _compile(case: Any, name: str) -> Row:
    import jax
    import numpy as np
    from jax.experimental import topologies

    from runtime.aot import memory

    chip = CHIPS[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), case.args)
    floor = max(case.flops / chip.flops, case.bytes / chip.bytes)
    begin = time.perf_counter()
    found: dict[str, Any]
    try:
        # The kernels' sizes are those of the chip.
        with jax.sharding.use_abstract_mesh(jax.sharding.Mesh(np.array([device]), ("model",)).abstract_mesh):
            traced = jax.jit(lambda *args: case.run(*args)).trace(*args)
        compiled = traced.lower().compile()
        text = compiled.as_text() or ""
        found = {
            "vmem_bytes": max((_vmem(match) for match in _VMEM.findall(text)), default=0),
            "temporary_bytes": memory(compiled).temporaries,
            "xla_cycles": sum(map(int, _CYCLES.findall(text))),
        }
        if "tpu_custom_call" not in text:
            found = {"error": "no kernel in the program: the reference was taken"}
    except Exception as error:  # whatever the compiler says of one kernel, the others stand
        found = {"error": str(error).strip().splitlines()[0][:300]}
    seconds = round(time.perf_counter() - begin, 1)
    return Row(case.kernel, case.shape, name, seconds, case.flops, case.bytes, round(1e6 * floor, 2), **found)


def _vmem(configs: str) -> int:
    return sum(int(size) for size in re.findall(r'"size":"(\d+)"', configs))


_HEADER = (
    f"{'kernel':<18}{'shape':<34}{'chip':<7}{'VMEM MiB':>9}{'HBM MB':>10}{'GFLOP':>10}{'floor us':>10}{'temp MiB':>10}"
    f"{'compile':>9}"
)


def _line(row: Row) -> str:
    start = f"{row.kernel:<18}{row.shape:<34}{row.chip:<7}"
    if row.error is not None:
        return f"{start}does not compile: {row.error}"
    return (
        f"{start}{(row.vmem_bytes or 0) / _MIB:>9.1f}{row.hbm_bytes / 1e6:>10.1f}{row.flops / 1e9:>10.1f}"
        f"{row.floor_us:>10.1f}{(row.temporary_bytes or 0) / _MIB:>10.1f}{row.seconds:>7.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
