"""What the hardware allows: seconds below which no program of this model can run, from two measured rates.

Prefill is bound by multiplications, decode by bytes read. Counted are the products that the model defines and nothing
else: no norms, no softmax, no selection, no launches. A floor is met by nobody; percent of floor says how far one is.
"""

from dataclasses import dataclass

from keye_jax.config import KeyeConfig


@dataclass(frozen=True)
class Rates:
    """Of one device: dense bf16 multiply-accumulates, two operations each, and bytes through its memory."""

    flops: float
    bytes: float


H200 = Rates(flops=790e12, bytes=4.3e12)
"""Measured on one H200: a bf16 product of 8192^3, and a large copy counted as read and written."""

WEIGHT_BYTES = 2
"""bfloat16, of weights and of cached keys and values."""


@dataclass(frozen=True)
class Work:
    """The model's sizes as operations and bytes."""

    config: KeyeConfig

    @property
    def attention_weights(self) -> int:
        """Of one layer's q, k, v and output projections."""
        t = self.config.text
        return 2 * t.hidden_size * t.head_dim * (t.num_attention_heads + t.num_key_value_heads)

    @property
    def indexer_weights(self) -> int:
        t, s = self.config.text, self.config.sparse
        return t.hidden_size * (s.indexer_num_heads * s.indexer_head_dim + s.indexer_head_dim + s.indexer_num_heads)

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.config.text.hidden_size * self.config.text.moe_intermediate_size

    @property
    def index_key_bytes(self) -> int:
        """Of one cached token in one layer: the key, and its scale where it has one."""
        width = self.config.sparse.indexer_head_dim
        return {"fp8": width + 4, "bf16": 2 * width, "float32": 4 * width}[self.config.sparse.indexer_dtype]

    def attended(self, first: int, tokens: int, *, dense: bool = False) -> int:
        """Pairs of query and key, for queries at sequence indices first to first + tokens - 1."""
        last = first + tokens
        if dense:
            return (last * (last + 1) - first * (first + 1)) // 2
        short = min(max(self.config.sparse.topk - first, 0), tokens)
        return self.attended(first, short, dense=True) + (tokens - short) * self.config.sparse.topk

    def attention_flops(self, pairs: int) -> float:
        """Products with K and V of one layer."""
        t = self.config.text
        return 4.0 * t.num_attention_heads * t.head_dim * pairs

    def index_flops(self, pairs: int) -> float:
        """Index scores of one layer."""
        return 2.0 * self.config.sparse.indexer_num_heads * self.config.sparse.indexer_head_dim * pairs

    def projection_flops(self, tokens: int, *, indexer: bool) -> float:
        """Attention and indexer projections of one layer."""
        return 2.0 * tokens * (self.attention_weights + (self.indexer_weights if indexer else 0))

    def expert_flops(self, tokens: int) -> float:
        """All three products of one layer's experts."""
        return 2.0 * tokens * self.config.text.num_experts_per_tok * self.expert_weights

    def vision_flops(self, frames: int, patches: int) -> float:
        """The vision tower and the projector for `frames` frames of `patches` patches each."""
        v = self.config.vision
        layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
        tower = v.num_hidden_layers * (2.0 * layer + 4.0 * patches * v.hidden_size)
        merged = v.merged_dim
        projector = 2.0 * merged * (merged + self.config.text.hidden_size) / v.spatial_merge_size**2
        return frames * patches * (tower + 2.0 * v.patch_dim * v.hidden_size + projector)


def prefill_seconds(config: KeyeConfig, context: int, rates: Rates, *, dense: bool = False) -> float:
    """Of a prompt of `context` tokens, batch 1; `dense` attends to every earlier token and has no indexer."""
    work, layers = Work(config), config.text.num_hidden_layers
    flops = work.projection_flops(context, indexer=not dense) + work.expert_flops(context)
    flops += work.attention_flops(work.attended(0, context, dense=dense))
    if not dense:
        flops += work.index_flops(work.attended(0, context, dense=True))
    return layers * flops / rates.flops


def experts_read(config: KeyeConfig, batch: int) -> float:
    """How many experts of a layer `batch` tokens are expected to choose, if each chooses at random."""
    E = config.text.num_experts
    return E * (1 - (1 - config.text.num_experts_per_tok / E) ** batch)


def decode_seconds(config: KeyeConfig, context: int, batch: int, rates: Rates, *, dense: bool = False) -> float:
    """Of one token for each of `batch` sequences of `context` tokens."""
    t, work = config.text, Work(config)
    weights = work.attention_weights + (0 if dense else work.indexer_weights)
    weights += experts_read(config, batch) * work.expert_weights
    kv = 2 * t.num_key_value_heads * t.head_dim * WEIGHT_BYTES
    read = kv * (context if dense else min(context, config.sparse.topk))
    read += 0 if dense else work.index_key_bytes * context
    layer = weights * WEIGHT_BYTES + batch * read
    return (t.num_hidden_layers * layer + t.vocab_size * t.hidden_size * WEIGHT_BYTES) / rates.bytes
