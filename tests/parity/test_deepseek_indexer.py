"""The lightning indexer against transformers' DeepSeek-V3.2 where the two coincide.

Theirs has no norm on the query (it is given ours), no Hadamard transform and no quantisation (ours runs in float32:
the transform must then change nothing), and a constant factor heads ** -0.5 more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.index_select.reference import index_scores, select_mask
from keye_jax.indexer import index_inputs
from keye_jax.layers import project
from keye_jax.ops import plain_layer_norm as layer_norm
from keye_jax.ops import rms_norm
from keye_jax.rope import mrope_tables
from tests.keye_jax.tiny import TINY, random_params

REASON = "needs the 'parity' extra: make parity"
torch = pytest.importorskip("torch", reason=REASON)
deepseek = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32", reason=REASON)
pytestmark = pytest.mark.parity

TOKENS, TOPK = 40, 9
WIDTH = 16
CONFIG = dataclasses.replace(
    TINY,
    sparse=dataclasses.replace(TINY.sparse, indexer_num_heads=3, indexer_head_dim=WIDTH, topk=TOPK),
)


def their_indexer(params: dict[str, Any]) -> Any:
    """Their indexer with our weights; its query projection is the identity, so that it takes normed queries."""
    heads = CONFIG.sparse.indexer_num_heads
    config = deepseek.DeepseekV32Config(
        hidden_size=CONFIG.text.hidden_size,
        q_lora_rank=heads * WIDTH,
        qk_rope_head_dim=WIDTH,
        index_n_heads=heads,
        index_head_dim=WIDTH,
        index_topk=TOKENS,
    )
    indexer = deepseek.DeepseekV32Indexer(config, 0)
    state = {
        "wq_b.weight": np.eye(heads * WIDTH, dtype=np.float32),
        "wk.weight": params["k_proj"].T,
        "k_norm.weight": params["k_norm"],
        "k_norm.bias": params["k_norm_bias"],
        "weights_proj.weight": params["gate_proj"].T,
    }
    indexer.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in state.items()})
    return indexer


@pytest.mark.parametrize("seed", range(8))
def test_scores_and_sets(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = jax.tree.map(lambda w: w[0], random_params(CONFIG, seed)["text"]["layers"]["indexer"])
    a = np.random.default_rng(seed).standard_normal((TOKENS, CONFIG.text.hidden_size)).astype(np.float32)
    positions = jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), (3, 1, 1))
    cos, sin = mrope_tables(positions, CONFIG.text.rope_theta, (4, 2, 2), False, jnp.dtype(jnp.float32))

    queries = rms_norm(
        project("bcd,dji->bcji", jnp.asarray(a)[None], params["q_proj"]), params["q_norm"], CONFIG.text.rms_norm_eps
    )
    seen: list[Any] = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *args, **kw: (seen.append(self), topk(self, *args, **kw))[1])
    tables = tuple(torch.tensor(np.concatenate([x, x], axis=-1)) for x in (cos, sin))
    visible = np.tril(np.ones((1, TOKENS, TOKENS), bool))
    their_indexer(params)(
        torch.tensor(a)[None],
        torch.tensor(np.asarray(queries).reshape(1, TOKENS, -1)),
        tables,
        torch.tensor(visible),
        None,
    )
    expected = seen[0][0].detach().numpy() * np.sqrt(CONFIG.sparse.indexer_num_heads)

    index = index_inputs(params, jnp.asarray(a)[None], cos, sin, CONFIG)
    keys = jnp.zeros((1, 1, 64, WIDTH)).at[0, :, :TOKENS].set(index.k)
    arguments = (index.q, index.weights, keys, None, 0, jnp.zeros(1, jnp.int32))
    actual = np.asarray(index_scores(*arguments))[0, :, :TOKENS]
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = np.isfinite(expected)
    # float32 against float32: the Hadamard transform adds roundings of its own. Measured up to 2e-6 of the largest.
    assert np.abs(actual[finite] - expected[finite]).max() <= 1e-5 * np.abs(expected[finite]).max()

    mask = np.asarray(select_mask(*arguments, TOPK))[0, :, :TOKENS]
    for t in range(TOKENS):
        ranked = np.sort(expected[t, : t + 1])[::-1]
        assert mask[t].sum() == min(t + 1, TOPK)
        if t >= TOPK and ranked[TOPK - 1] - ranked[TOPK] > 1e-5 * np.abs(ranked).max():
            np.testing.assert_array_equal(np.flatnonzero(mask[t]), np.flatnonzero(expected[t] >= ranked[TOPK - 1]))


@pytest.mark.parametrize("seed", range(4))
def test_norms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, WIDTH), WIDTH, WIDTH))
    rms = deepseek.DeepseekV32RMSNorm(WIDTH, eps=1e-6)
    norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
    rms.load_state_dict({"weight": torch.tensor(weight)})
    norm.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    ours = [jnp.asarray(array) for array in (x, weight, bias)]
    with torch.no_grad():
        np.testing.assert_allclose(rms_norm(ours[0], ours[1], 1e-6), rms(torch.tensor(x)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            layer_norm(ours[0], ours[1], ours[2], 1e-6), norm(torch.tensor(x)), rtol=1e-5, atol=1e-6
        )
