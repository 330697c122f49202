"""The vision tower's blocks against transformers' SigLIP, from which the tower descends, with our rotary embedding
off; and the projector against torch layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.ops import plain_layer_norm as layer_norm
from keye_jax.vision import embed_patches, patch_layout, project_rows, vision_block
from tests.keye_jax.tiny import TINY, random_params

REASON = "needs the 'parity' extra: make parity"
torch = pytest.importorskip("torch", reason=REASON)
siglip = pytest.importorskip("transformers.models.siglip", reason=REASON)
pytestmark = pytest.mark.parity

VISION = dataclasses.replace(TINY.vision, image_size=84)  # a table of 6x6
SIDE = VISION.table_side
SEEDS = range(6)
# float32 against float32, relative to the largest value: different orders of summation. Measured up to 2e-6.
BOUND = 1e-5

block = jax.jit(vision_block, static_argnames="config")


def assert_close(actual: Any, expected: Any) -> None:
    expected = expected.detach().numpy()
    assert np.abs(np.asarray(actual) - expected).max() <= BOUND * np.abs(expected).max()


def tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(np.asarray(array)) for name, array in state.items()}


def theirs(params: dict[str, Any]) -> Any:
    """Their tower with our weights (linear weights turned to [out, in])."""
    v = VISION
    model = siglip.SiglipVisionModel(
        siglip.SiglipVisionConfig(
            hidden_size=v.hidden_size,
            num_hidden_layers=v.num_hidden_layers,
            num_attention_heads=v.num_attention_heads,
            intermediate_size=v.intermediate_size,
            image_size=v.image_size,
            patch_size=v.patch_size,
            layer_norm_eps=v.layer_norm_eps,
            vision_use_head=False,
            attn_implementation="eager",
        )
    ).eval()
    C, layers = v.hidden_size, params["layers"]
    embedding = params["patch_embedding"]
    state = {
        "embeddings.patch_embedding.weight": embedding["weight"].T.reshape(C, v.num_channels, v.patch_size, -1),
        "embeddings.patch_embedding.bias": embedding["bias"],
        "embeddings.position_embedding.weight": params["position_embedding"],
        "post_layernorm.weight": params["post_layernorm"]["weight"],
        "post_layernorm.bias": params["post_layernorm"]["bias"],
    }
    for i in range(v.num_hidden_layers):
        name = f"encoder.layers.{i}"
        for ours in ("layer_norm1", "layer_norm2"):
            state |= {f"{name}.{ours}.{kind}": layers[ours][kind][i] for kind in ("weight", "bias")}
        for ours in ("q_proj", "k_proj", "v_proj"):
            state[f"{name}.self_attn.{ours}.weight"] = layers[ours]["weight"][i].reshape(C, C).T
            state[f"{name}.self_attn.{ours}.bias"] = layers[ours]["bias"][i].reshape(C)
        state[f"{name}.self_attn.out_proj.weight"] = layers["out_proj"]["weight"][i].reshape(C, C).T
        state[f"{name}.self_attn.out_proj.bias"] = layers["out_proj"]["bias"][i]
        for ours in ("fc1", "fc2"):
            state[f"{name}.mlp.{ours}.weight"] = layers[ours]["weight"][i].T
            state[f"{name}.mlp.{ours}.bias"] = layers[ours]["bias"][i]
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in model.state_dict()) else ""
    model.load_state_dict({prefix + name: tensor for name, tensor in tensors(state).items()})
    return model


@pytest.mark.parametrize("seed", SEEDS)
def test_tower_without_rotation(seed: int) -> None:
    """Two images of the table's own size, packed by us and batched by them: embeddings, every layer, the last norm."""
    params = random_params(dataclasses.replace(TINY, vision=VISION), seed)["vision"]
    images = np.random.default_rng(seed).uniform(-1, 1, (2, 3, VISION.image_size, VISION.image_size)).astype(np.float32)
    with torch.no_grad():
        out = theirs(params)(pixel_values=torch.tensor(images), output_hidden_states=True)

    P, N = VISION.patch_size, 2 * SIDE**2
    cut = images.reshape(2, 3, SIDE, P, SIDE, P).transpose(0, 2, 4, 1, 3, 5).reshape(N, 3, P, P)
    layout = patch_layout(jnp.asarray([[1, SIDE, SIDE]] * 2, jnp.int32), N)
    x = embed_patches(params, jnp.asarray(cut), layout, VISION)
    assert_close(x, out.hidden_states[0].reshape(N, -1))
    still = (jnp.ones((N, VISION.head_dim // 2)), jnp.zeros((N, VISION.head_dim // 2)))
    for i in range(VISION.num_hidden_layers):
        layer = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        x = block(layer, x, still, layout.spans, config=VISION)
        if i + 1 < VISION.num_hidden_layers:
            assert_close(x, out.hidden_states[i + 1].reshape(N, -1))
    post = params["post_layernorm"]
    x = layer_norm(x, post["weight"], post["bias"], VISION.layer_norm_eps)
    assert_close(x, out.last_hidden_state.reshape(N, -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_projector(seed: int) -> None:
    """2x2 blocks, LayerNorm with epsilon 1e-5, and the exact GELU, for two images of different sizes."""
    params = random_params(TINY, seed)["projector"]
    width, out = TINY.vision.merged_dim, TINY.text.hidden_size
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(width, eps=1e-5),
        torch.nn.Linear(width, width),
        torch.nn.GELU(),
        torch.nn.Linear(width, out),
    )
    state = {"0.weight": params["pre_norm"]["weight"], "0.bias": params["pre_norm"]["bias"]}
    for number, name in ((1, "linear_1"), (3, "linear_2")):
        state[f"{number}.weight"], state[f"{number}.bias"] = params[name]["weight"].T, params[name]["bias"]
    model.load_state_dict(tensors(state))
    C, grids = TINY.vision.hidden_size, [(4, 6), (2, 8)]
    hidden = np.random.default_rng(seed).standard_normal((sum(h * w for h, w in grids), C)).astype(np.float32)
    blocks, start = [], 0
    for h, w in grids:
        image = torch.tensor(hidden[start : start + h * w]).reshape(h // 2, 2, w // 2, 2, C)
        blocks.append(image.permute(0, 2, 1, 3, 4).reshape(-1, width))
        start += h * w
    grid = jnp.asarray([(1, h, w) for h, w in grids], jnp.int32)
    rows = project_rows(params, jnp.asarray(hidden), grid, TINY.vision)
    assert_close(rows, model(torch.cat(blocks)))
