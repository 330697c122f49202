"""The text decoder against transformers' Qwen3-VL-MoE, its ancestor: the same where every key is selected. Rotary
frequencies are interleaved there; for the published layout, one block after the other, it is given Qwen2-VL's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import KeyeConfig, KeyeVL
from tests.keye_jax.tiny import (
    TINY,
    decode,
    empty_cache,
    empty_logits,
    greedy_state,
    prefill,
    random_params,
    steps,
    text_chunk,
    text_prompt,
)

REASON = "needs the 'parity' extra: make parity"
torch = pytest.importorskip("torch", reason=REASON)
qwen = pytest.importorskip("transformers.models.qwen3_vl_moe", reason=REASON)
qwen2 = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl", reason=REASON)
pytestmark = pytest.mark.parity

TOKENS = 24
SEEDS = range(8)
# Relative to the largest logit: float32 against float32, different orders of summation. Measured up to 2e-6.
BOUND = 1e-5


def resized(**text: Any) -> KeyeConfig:
    changed = dataclasses.replace(TINY.text, **text)
    # The indexer selects every key here; its width only has to suit the rotary sections.
    sparse = dataclasses.replace(TINY.sparse, topk=TOKENS + 16, indexer_head_dim=changed.head_dim)
    return dataclasses.replace(TINY, text=changed, sparse=sparse)


CONFIGS = {
    "interleaved": resized(mrope_interleaved=True),
    "interleaved, one KV head, 5 experts, wide heads": resized(
        num_key_value_heads=1,
        num_experts=5,
        num_experts_per_tok=3,
        head_dim=32,
        mrope_section=(6, 5, 5),
        mrope_interleaved=True,
        rope_theta=5e6,
    ),
    "chunked": resized(mrope_section=(2, 3, 3)),
}


def theirs(config: KeyeConfig, params: Mapping[str, Any]) -> Any:
    """Their model with our weights (linear weights turned to [out, in])."""
    t = config.text
    rope = {
        "rope_type": "default",
        "rope_theta": t.rope_theta,
        "mrope_section": list(t.mrope_section),
        "mrope_interleaved": t.mrope_interleaved,
    }
    model = qwen.Qwen3VLMoeTextModel(
        qwen.Qwen3VLMoeTextConfig(
            vocab_size=t.vocab_size,
            hidden_size=t.hidden_size,
            num_hidden_layers=t.num_hidden_layers,
            num_attention_heads=t.num_attention_heads,
            num_key_value_heads=t.num_key_value_heads,
            head_dim=t.head_dim,
            moe_intermediate_size=t.moe_intermediate_size,
            num_experts=t.num_experts,
            num_experts_per_tok=t.num_experts_per_tok,
            rms_norm_eps=t.rms_norm_eps,
            rope_parameters=rope,
            attn_implementation="eager",
        )
    ).eval()
    if not t.mrope_interleaved:
        model.rotary_emb = qwen2.Qwen2VLRotaryEmbedding(model.config)
    layers, D = params["layers"], t.hidden_size
    state = {"embed_tokens.weight": params["embed_tokens"], "norm.weight": params["norm"]}
    for i in range(t.num_hidden_layers):
        attn, moe = layers["attn"], layers["moe"]
        state |= {
            f"layers.{i}.input_layernorm.weight": layers["input_layernorm"][i],
            f"layers.{i}.post_attention_layernorm.weight": layers["post_attention_layernorm"][i],
            f"layers.{i}.self_attn.o_proj.weight": attn["o_proj"][i].reshape(-1, D).T,
            f"layers.{i}.mlp.gate.weight": moe["router"][i].T,
            f"layers.{i}.mlp.experts.gate_up_proj": moe["gate_up_proj"][i].swapaxes(1, 2),
            f"layers.{i}.mlp.experts.down_proj": moe["down_proj"][i].swapaxes(1, 2),
        }
        state |= {f"layers.{i}.self_attn.{n}.weight": attn[n][i] for n in ("q_norm", "k_norm")}
        state |= {
            f"layers.{i}.self_attn.{n}.weight": attn[n][i].reshape(D, -1).T for n in ("q_proj", "k_proj", "v_proj")
        }
    model.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in state.items()})
    return model


def their_logits(model: Any, params: Mapping[str, Any], ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        hidden = model(
            input_ids=torch.tensor(ids, dtype=torch.long)[None],
            position_ids=torch.tensor(positions, dtype=torch.long)[:, None],
            use_cache=False,
        ).last_hidden_state[0]
    return hidden.numpy() @ np.asarray(params["lm_head"]).T


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_logits(name: str, seed: int) -> None:
    config = CONFIGS[name]
    params = random_params(config, seed)
    ids, positions = text_prompt(config, TOKENS, seed)
    logits = KeyeVL(config, params)(jnp.asarray(ids)[None], jnp.asarray(positions)[:, None])[0]
    expected = their_logits(theirs(config, params["text"]), params["text"], ids, positions)
    assert np.abs(np.asarray(logits) - expected).max() <= BOUND * np.abs(expected).max()


def test_greedy_tokens() -> None:
    """Our prefill, cache and decode loop against running their model on the whole sequence again for every token."""
    config = CONFIGS["chunked"]
    params = random_params(config)
    model = theirs(config, params["text"])
    ids, positions = text_prompt(config, TOKENS)
    chunk = text_chunk(ids[None], positions[:, None], [TOKENS], config.text.hidden_size)
    delta = int(positions.max()) + 1 - TOKENS
    cache, logits = prefill(params["text"], empty_cache(config, 1), empty_logits(config, 1), chunk, config)
    tokens = np.asarray(decode(params["text"], cache, logits, greedy_state([delta]), steps(12), config)[3])[0, :12]
    for token in tokens:
        expected = their_logits(model, params["text"], ids, positions)[-1]
        assert token == expected.argmax()
        ids = np.append(ids, token)
        positions = np.concatenate([positions, np.full((3, 1), len(ids) - 1 + delta)], axis=1)
