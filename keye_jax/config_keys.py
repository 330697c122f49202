"""Which keys of the official config.json are read, which must have one value, and which say nothing here."""

from typing import Any

MODEL_TYPE = "KeyeVL2"
ARCHITECTURE = "KeyeVL2MoeForConditionalGeneration"

TEXT_INTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
)

# Keys with one supported value: another value means a model this code would compute wrongly.
FIXED_TOP: dict[str, tuple[Any, ...]] = {
    "model_type": (MODEL_TYPE,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "use_sliding_window": (False, None),
    "num_nextn_predict_layers": (0, None),
    "num_shared_experts": (0, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
}
FIXED_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "deepstack_visual_indexes": ([], None),
    "temporal_patch_size": (1, 2, None),
}
FIXED_SPARSE: dict[str, tuple[Any, ...]] = {"indexer_num_kv_heads": (1,)}

# Keys that say nothing about the forward pass.
UNUSED_TOP = {
    "_name_or_path": "where the checkpoint came from",
    "architectures": "checked apart",
    "attention_dropout": "training",
    "auto_map": "remote code; never run here",
    "bos_token_id": "read by the text processor",
    "chunk_size_feed_forward": "transformers bookkeeping",
    "dtype": "an argument here, not a property of the model",
    "eos_token_id": "read by the text processor",
    "fast_video_token_id": "fast frames belong to Keye-VL-1.5",
    "id2label": "transformers bookkeeping",
    "initializer_range": "training",
    "intermediate_size": "width of dense layers; this model has none",
    "label2id": "transformers bookkeeping",
    "max_window_layers": "sliding window, which is off",
    "output_attentions": "transformers bookkeeping",
    "output_hidden_states": "transformers bookkeeping",
    "output_router_logits": "training",
    "pad_token_id": "read by the text processor",
    "problem_type": "transformers bookkeeping",
    "return_dict": "transformers bookkeeping",
    "router_aux_loss_coef": "training",
    "sliding_window": "sliding window, which is off",
    "torch_dtype": "an argument here, not a property of the model",
    "transformers_version": "which library wrote the file",
    "use_cache": "the cache is always used",
    "video_start_token_id": "frame markers of Keye-VL-1.5",
    "video_end_token_id": "frame markers of Keye-VL-1.5",
    "vision_end_token_id": "read by the text processor",
    "vision_start_token_id": "read by the text processor",
    "vision_token_id": "not used by the published prompt",
}
UNUSED_VISION = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "dtype",
    "initializer_factor",
    "initializer_range",
    "model_type",
    "tokens_per_second",
    "torch_dtype",
    "transformers_version",
}
ROPE_KEYS = {"type", "rope_type", "mrope_section", "mrope_interleaved", "rope_theta"}
SPARSE_INTS = ("indexer_num_heads", "indexer_head_dim", "topk")
# The chunk sizes only tile loops of the official code.
SPARSE_KEYS = {*SPARSE_INTS, *FIXED_SPARSE, "mrope_interleaved", "q_chunk_size", "kv_chunk_size"}
VISION_INTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
VISION_OPTIONAL = {
    "patch_size": int,
    "num_channels": int,
    "spatial_merge_size": int,
    "layer_norm_eps": float,
    "rope_theta": float,
}
TOP_KEYS = {
    *TEXT_INTS,
    *FIXED_TOP,
    *UNUSED_TOP,
    *("head_dim", "rms_norm_eps", "norm_topk_prob", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sa_config", "vision_config"),
    *("image_token_id", "video_token_id"),
}
VISION_KEYS = {*VISION_INTS, *VISION_OPTIONAL, *FIXED_VISION, *UNUSED_VISION}
