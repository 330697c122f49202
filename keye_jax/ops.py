"""The only door to the kernels: model code imports their public functions from here."""

from kernels_pallas.chunk_inputs import IndexInputs, chunk_inputs, index_inputs
from kernels_pallas.common import einsum_f32, unpack_bits
from kernels_pallas.decode_inputs import Caches, Tables, Weights, decode_inputs
from kernels_pallas.dispatch import reference_only, runs_kernels
from kernels_pallas.fused_linear import fused_linear, gelu_mlp
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, spread_rows
from kernels_pallas.grouped_matmul.decode import experts_add, moe_step, norm_route
from kernels_pallas.index_select import scores_at, select_bits, select_ids
from kernels_pallas.index_select.reference import sortable
from kernels_pallas.layer_norm import layer_norm
from kernels_pallas.numerics import layer_norm as plain_layer_norm
from kernels_pallas.numerics import rms_norm, rotate
from kernels_pallas.quantized import Quantized, pick, scaled, values_of
from kernels_pallas.routing import choose_experts, place
from kernels_pallas.segment_attention import segment_attention
from kernels_pallas.skinny_matmul import project_add
from kernels_pallas.sparse_attention import attend_bits, attend_bits_lse, attend_ids, attend_ids_lse

__all__ = [
    "Caches",
    "IndexInputs",
    "Quantized",
    "Tables",
    "Weights",
    "attend_bits",
    "attend_bits_lse",
    "attend_ids",
    "attend_ids_lse",
    "choose_experts",
    "chunk_inputs",
    "decode_inputs",
    "einsum_f32",
    "experts_add",
    "fused_linear",
    "gelu_mlp",
    "grouped_matmul",
    "grouped_swiglu",
    "index_inputs",
    "layer_norm",
    "moe_step",
    "norm_route",
    "pick",
    "place",
    "plain_layer_norm",
    "project_add",
    "reference_only",
    "rms_norm",
    "rotate",
    "runs_kernels",
    "scaled",
    "scores_at",
    "segment_attention",
    "select_bits",
    "select_ids",
    "sortable",
    "spread_rows",
    "unpack_bits",
    "values_of",
]
