"""The only door to the kernels: model code imports their public functions from here."""

from kernels_pallas.common import einsum_f32
from kernels_pallas.dispatch import reference_only, runs_kernels
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.index_select import select_bits, select_ids
from kernels_pallas.segment_attention import segment_attention
from kernels_pallas.sparse_attention import attend_bits, attend_ids

__all__ = [
    "attend_bits",
    "attend_ids",
    "einsum_f32",
    "grouped_matmul",
    "reference_only",
    "runs_kernels",
    "segment_attention",
    "select_bits",
    "select_ids",
]
