"""Sizes of TPU kernels by chip: who gets which, and that the table names what there is."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import tuned
from kernels_pallas.index_select import tpu_bits as select_bits
from kernels_pallas.index_select import tpu_ids as select_ids
from kernels_pallas.sparse_attention import attend_ids
from kernels_pallas.sparse_attention import tpu_bits as attending_bits
from kernels_pallas.sparse_attention import tpu_ids as attending

TUNINGS: dict[str, Any] = {
    "attend_bits": attending_bits.Tuning(),
    "attend_ids": attending.Tuning(),
    "select_bits": select_bits.Tuning(),
    "select_ids": select_ids.Tuning(),
}


def mesh(kind: str) -> AbstractMesh:
    device = AbstractDevice(kind, num_cores=1, platform="tpu")
    return AbstractMesh((1,), ("model",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize("kind", tuned.SIZES)
def test_entries_change_sizes_that_kernels_have(kind: str) -> None:
    assert tuned.SIZES[kind]
    for kernel, changes in tuned.SIZES[kind].items():
        with jax.sharding.use_abstract_mesh(mesh(kind)):
            found = tuned.sizes(kernel, TUNINGS[kernel])
        for name, value in changes.items():
            assert getattr(found, name) == value != getattr(TUNINGS[kernel], name)


def test_where_the_chip_is_not_known_the_safe_sizes_stand() -> None:
    safe = attending.Tuning()
    assert tuned.sizes("attend_ids", safe) == safe
    with jax.sharding.use_abstract_mesh(mesh("TPU v99")):
        assert tuned.sizes("attend_ids", safe) == safe


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_gets_the_sizes_of_its_chip(batch: int) -> None:
    """One after the other in one process: nothing remembers the chip before. Two cores split a single list only."""
    q, kv = jnp.zeros((batch, 8, 128), jnp.bfloat16), jnp.zeros((1, batch, 256, 2, 4, 128), jnp.bfloat16)
    program = jax.jit(lambda q, kv, ids: attend_ids(q, kv, 0, ids))
    merges = {}
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        with jax.sharding.use_abstract_mesh(mesh(kind)):
            graph = export.export(program, platforms=["tpu"])(q, kv, jnp.zeros((batch, 256), jnp.int32))
        merges[kind] = "merge_splits" in graph.mlir_module()
        assert "attend_ids" in graph.mlir_module()
    assert merges == {"TPU v5 lite": False, "TPU v5": batch == 1, "TPU v6 lite": False}
