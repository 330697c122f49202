"""Official checkpoints load exactly or not at all."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_jax import checkpoint, safetensors
from keye_jax.checkpoint import load_params, open_checkpoint, read_group
from keye_jax.config import KeyeConfig
from keye_jax.errors import CheckpointError
from keye_jax.params import flatten, param_specs, storage_groups
from tests.shards import (
    CHECKPOINT,
    INDEX,
    Tensors,
    copy_checkpoint,
    entry,
    join,
    read_array,
    read_tensors,
    split,
    write_checkpoint,
    write_file,
)

CONFIG = KeyeConfig.from_hf(CHECKPOINT)
LAYER = "model.layers.1."
QUERY = LAYER + "self_attn.q_proj.weight"
GATE_UP = LAYER + "mlp.experts.gate_up_proj"
DOWN = LAYER + "mlp.experts.down_proj"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return read_tensors()


@pytest.fixture(scope="module")
def params() -> dict[tuple[str, ...], np.ndarray]:
    return arrays(CHECKPOINT)


def arrays(folder: Path, dtype: Any = "float32") -> dict[tuple[str, ...], np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_params(folder, CONFIG, dtype))}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=".".join(path))


def test_every_parameter_has_the_declared_shape_and_dtype():
    specs = dict(flatten(param_specs(CONFIG)))
    for dtype in ("float32", "bfloat16"):
        loaded = dict(flatten(load_params(CHECKPOINT, CONFIG, dtype)))
        assert loaded.keys() == specs.keys()
        for path, spec in specs.items():
            assert (loaded[path].shape, loaded[path].dtype) == (spec.shape, spec.as_dtype(dtype)), path
            assert isinstance(loaded[path], jax.Array)


def test_layouts_follow_the_formulas_of_the_official_model(tensors, params):
    """x times our weight is the official x Wᵀ, head by head."""
    t, s = CONFIG.text, CONFIG.sparse
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, t.hidden_size)).astype(np.float32)
    attn, indexer, moe = (("text", "layers", part) for part in ("attn", "indexer", "moe"))

    def close(found: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    query = (x @ read_array(tensors, QUERY).T).reshape(5, t.num_attention_heads, t.head_dim)
    close(np.einsum("td,dhk->thk", x, params[*attn, "q_proj"][1]), query)
    out = read_array(tensors, LAYER + "self_attn.o_proj.weight")
    close(np.einsum("thk,hkd->td", query, params[*attn, "o_proj"][1]), query.reshape(5, -1) @ out.T)
    fused = x @ read_array(tensors, LAYER + "self_attn.sa_indexer.q_proj.weight").T
    heads = s.indexer_num_heads * s.indexer_head_dim
    index_query = np.einsum("td,dji->tji", x, params[*indexer, "q_proj"][1])
    close(index_query, fused[:, :heads].reshape(5, s.indexer_num_heads, -1))
    close(x @ params[*indexer, "gate_proj"][1], fused[:, heads:])
    close(x @ params[*moe, "router"][1], x @ read_array(tensors, LAYER + "mlp.gate.weight").T)
    np.testing.assert_array_equal(params[*moe, "gate_up_proj"][1], read_array(tensors, GATE_UP))


def test_the_patch_embedding_is_the_official_convolution(tensors, params):
    kernel = read_array(tensors, "visual.vision_model.embeddings.patch_embedding.weight")
    patch = np.random.default_rng(0).standard_normal(kernel.shape[1:]).astype(np.float32)
    found = patch.reshape(-1) @ params["vision", "patch_embedding", "weight"]
    np.testing.assert_allclose(found, np.einsum("ocyx,cyx->o", kernel, patch), rtol=1e-4, atol=1e-5)


def test_large_stacks_grow_on_the_device_with_the_same_values(monkeypatch, params):
    monkeypatch.setattr(checkpoint, "_HOST_STACK_BYTES", 300_000)
    assert_same(arrays(CHECKPOINT), params)


@given(st.integers(1, 4096))
def test_reading_in_pieces_of_any_size_gives_the_same_values(piece_bytes):
    group = storage_groups(CONFIG)["text.layers.2"]
    opened = open_checkpoint(CHECKPOINT, CONFIG)
    whole = read_group(opened, group, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "_PIECE_BYTES", piece_bytes)
        assert_same(read_group(opened, group, "float32"), whole)


def test_bfloat16_rounds_to_nearest_even(tensors, params):
    rounded = arrays(CHECKPOINT, "bfloat16")
    for path, array in params.items():
        if path[-1] not in ("k_norm_bias",) and path[1:3] != ("layers", "indexer"):
            bits = array.view(np.uint32).astype(np.uint64)
            even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            np.testing.assert_array_equal(rounded[path].view(np.uint16), even, err_msg=".".join(path))


def test_the_indexers_key_norm_stays_float32(params):
    rounded = arrays(CHECKPOINT, "bfloat16")
    for name in ("k_norm", "k_norm_bias"):
        path = ("text", "layers", "indexer", name)
        np.testing.assert_array_equal(rounded[path], params[path])


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_widen_exactly(tmp_path, tensors, kind):
    narrow = {name: entry(read_array(tensors, name).astype(kind)) for name in tensors}
    loaded = arrays(write_checkpoint(tmp_path, narrow))
    expected = read_array(tensors, GATE_UP).astype(kind).astype(np.float32)
    np.testing.assert_array_equal(loaded["text", "layers", "moe", "gate_up_proj"][1], expected)


def test_one_file_without_index_loads_like_shards(tmp_path, tensors, params):
    assert_same(arrays(write_checkpoint(tmp_path, tensors)), params)


def test_progress_counts_up_to_the_total():
    seen = []
    load_params(CHECKPOINT, CONFIG, "float32", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(s.nbytes("float32") for _, s in flatten(param_specs(CONFIG)))


def unfused(tensors: Tensors, layer: int) -> Tensors:
    """The layer's experts as `mlp.experts.{e}.*_proj.weight`."""
    prefix = f"model.layers.{layer}.mlp.experts."
    parts = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    width = CONFIG.text.moe_intermediate_size
    gate_up, down = read_array(tensors, prefix + "gate_up_proj"), read_array(tensors, prefix + "down_proj")
    for e in range(CONFIG.text.num_experts):
        parts[f"{prefix}{e}.gate_proj.weight"] = entry(gate_up[e, :, :width].T)
        parts[f"{prefix}{e}.up_proj.weight"] = entry(gate_up[e, :, width:].T)
        parts[f"{prefix}{e}.down_proj.weight"] = entry(down[e].T)
    return parts


def test_unfused_experts_load_like_fused_ones(tmp_path, tensors, params):
    parts = unfused(unfused(tensors, 0), 2)
    assert_same(arrays(write_checkpoint(tmp_path, parts)), params)


def test_experts_written_as_expert_out_in_load_like_the_published_layout(tmp_path, tensors, params):
    swapped = {
        name: entry(read_array(tensors, name).swapaxes(1, 2)) if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }
    assert_same(arrays(write_checkpoint(tmp_path, swapped)), params)


def test_square_experts_follow_the_layout_of_their_counterpart(tmp_path, tensors):
    """With hidden = 2 x width gate_up_proj is square and its shape says nothing."""
    raw = json.loads((CHECKPOINT / "config.json").read_text()) | {"moe_intermediate_size": 64}
    config = KeyeConfig.from_hf(raw)
    rng = np.random.default_rng(0)
    values = {"gate_up_proj": rng.standard_normal((8, 128, 128)), "down_proj": rng.standard_normal((8, 64, 128))}
    for swap in (False, True):
        parts = dict(tensors)
        for layer in range(3):
            for name, value in values.items():
                array = value.astype(np.float32)
                parts[f"model.layers.{layer}.mlp.experts.{name}"] = entry(array.swapaxes(1, 2) if swap else array)
        loaded = load_params(write_checkpoint(tmp_path / str(swap), parts), config, "float32")
        for name, value in values.items():
            found = np.asarray(loaded["text"]["layers"]["moe"][name][2])
            np.testing.assert_array_equal(found, value.astype(np.float32))


def test_documented_unused_tensors_may_be_there_or_not(tmp_path, tensors, params):
    used = {name: tensor for name, tensor in tensors.items() if ".head." not in name and "packing" not in name}
    assert len(used) < len(tensors)
    assert_same(arrays(write_checkpoint(tmp_path / "without", used)), params)
    used["model.layers.0.self_attn.rotary_emb.inv_freq"] = entry(np.ones(16, np.float32))
    used["visual.vision_model.embeddings.packing_position_embedding.weight"] = ("I64", (2,), b"\0" * 16)
    assert_same(arrays(write_checkpoint(tmp_path / "with", used)), params)


def change(name: str, tensor: tuple[str, tuple[int, ...], bytes] | None):
    def apply(tensors: Tensors) -> Tensors:
        changed = {**tensors, name: tensor}
        return {key: value for key, value in changed.items() if value is not None}

    return apply


def filled(shape: tuple[int, ...], value: float, dtype: Any = np.float32) -> np.ndarray:
    array = np.ones(shape, dtype)
    array.flat[-1] = value
    return array


WRONG_TENSORS = {
    "missing": (change(QUERY, None), f"missing tensor '{QUERY}'"),
    "misspelt": (change("model.layers.1.self_attn.q_projection.weight", entry(np.ones(3, np.float32))), "q_projection"),
    "bias": (change("model.layers.1.self_attn.q_proj.bias", entry(np.ones(256, np.float32))), "q_proj.bias"),
    "one layer too many": (change("model.layers.3.mlp.gate.weight", entry(np.ones((8, 128), np.float32))), "layers.3"),
    "deepstack": (change("visual.deepstack_merger_list.0.norm.bias", entry(np.ones(4, np.float32))), "deepstack"),
    "almost ignored": (change("visual.vision_model.header.probe", entry(np.ones(4, np.float32))), "header.probe"),
    "shape": (change(QUERY, entry(np.ones((255, 128), np.float32))), r"\[255, 128\] where .* asks for \[256, 128\]"),
    "transposed": (change(QUERY, entry(np.ones((128, 256), np.float32))), r"\[128, 256\] where"),
    "scalar": (change("model.norm.weight", entry(np.float32(1).reshape(()))), r"norm.weight' has shape \[\] where"),
    "indexer without gate": (
        change(LAYER + "self_attn.sa_indexer.q_proj.weight", entry(np.ones((64, 128), np.float32))),
        r"\[64, 128\] where config.json asks for \[68, 128\]",
    ),
    "one expert transposed": (change(GATE_UP, entry(np.ones((8, 96, 128), np.float32))), "has shape"),
    "integers": (change("model.norm.weight", ("I32", (128,), b"\0" * 512)), "'model.norm.weight' has dtype I32"),
    "fp8": (change("model.norm.weight", ("F8_E4M3", (128,), b"\0" * 128)), "'model.norm.weight' has dtype F8_E4M3"),
    "NaN": (change(QUERY, entry(filled((256, 128), np.nan))), f"'{QUERY}' in model.safetensors holds a value"),
    "infinity": (change(GATE_UP, entry(filled((8, 128, 96), -np.inf))), "experts.gate_up_proj' .* not finite"),
    "bfloat16 infinity": (
        change("lm_head.weight", entry(filled((512, 128), np.inf, ml_dtypes.bfloat16))),
        "'lm_head.weight' .* not finite",
    ),
    "float16 NaN": (change("model.norm.weight", entry(filled((128,), np.nan, np.float16))), "norm.weight' .* not fin"),
    "experts twice": (lambda tensors: {**unfused(tensors, 1), GATE_UP: tensors[GATE_UP]}, "layer 1 .* twice"),
    "an expert missing": (
        lambda tensors: change(LAYER + "mlp.experts.5.up_proj.weight", None)(unfused(tensors, 1)),
        "missing tensor 'model.layers.1.mlp.experts.5.up_proj.weight'",
    ),
    "an expert too many": (
        lambda tensors: change(LAYER + "mlp.experts.8.up_proj.weight", tensors["model.norm.weight"])(
            unfused(tensors, 1)
        ),
        "unexpected tensor 'model.layers.1.mlp.experts.8.up_proj.weight'",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_wrong_tensor_is_named(tmp_path, tensors, case):
    apply, message = WRONG_TENSORS[case]
    folder = write_checkpoint(tmp_path, apply(tensors))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_params(folder, CONFIG, "float32")
    assert "\n" not in str(caught.value)


def test_a_finite_value_that_bfloat16_cannot_hold_is_an_error(tmp_path, tensors):
    huge = change("model.norm.weight", entry(filled((128,), 3.4e38)))(tensors)
    folder = write_checkpoint(tmp_path, huge)
    assert np.isfinite(arrays(folder)["text", "norm"]).all()
    with pytest.raises(CheckpointError, match="not finite as bfloat16"):
        load_params(folder, CONFIG, "bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "int8", "fp8", None, "float64"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(CheckpointError, match="float32 or bfloat16"):
        load_params(CHECKPOINT, CONFIG, dtype)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_index(folder: Path, edit: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def move_out(folder: Path, place: str) -> None:
    """Puts the second shard beside the folder and writes its new place into the index."""
    os.rename(folder / SECOND, folder.parent / "outside.safetensors")
    places = {SECOND: f"{place}/outside.safetensors"}
    edit_index(folder, lambda m: m.update({name: places.get(shard, shard) for name, shard in m.items()}))


BROKEN_FOLDERS = {
    "no weights": (lambda f: [(f / name).unlink() for name in (INDEX, FIRST, SECOND)], "holds neither"),
    "shards without index": (lambda f: (f / INDEX).unlink(), "holds neither"),
    "shard missing": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "shard is a folder": (lambda f: [(f / SECOND).unlink(), (f / SECOND).mkdir()], "cannot be read"),
    "shard empty": (lambda f: (f / SECOND).write_bytes(b""), "not a complete safetensors file"),
    "shard truncated": (lambda f: os.truncate(f / SECOND, 2_000_000), f"{SECOND} is truncated"),
    "header truncated": (lambda f: os.truncate(f / SECOND, 100), "not a complete safetensors file"),
    "bytes appended": (lambda f: (f / SECOND).open("ab").write(b"x"), "longer than its header says"),
    "pointer file": (
        lambda f: (f / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3),
        "complete",
    ),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "damaged JSON"),
    "index nested": (lambda f: (f / INDEX).write_text("[" * 100_000), "damaged JSON"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "expected a JSON object"),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "index climbs": (lambda f: move_out(f, ".."), "not the name"),
    "index absolute": (lambda f: move_out(f, str(f.parent)), "not the name"),
    "index names a number": (lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": 3})), "3 .* not the name"),
    "index names another file": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "config.json"})),
        "'config.json' .* not the name",
    ),
    "index promises too much": (
        lambda f: edit_index(f, lambda m: m.update(extra=FIRST)),
        "does not hold tensor 'extra'",
    ),
    "index in the wrong shard": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": FIRST})),
        f"{FIRST} does not hold tensor 'lm_head.weight'",
    ),
    "index lists too little": (lambda f: edit_index(f, lambda m: m.pop("lm_head.weight")), "does not list"),
    "tensor in two shards": (lambda f: (f / FIRST).write_bytes((f / SECOND).read_bytes()), "stands in two files"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_folder_is_refused_before_any_data_is_read(tmp_path, case):
    folder = copy_checkpoint(tmp_path / "checkpoint")
    damage, message = BROKEN_FOLDERS[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder, CONFIG)
    assert "\n" not in str(caught.value)


NORM = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN_HEADERS = {
    "not JSON": (b"{'a': 1}", "damaged JSON"),
    "not UTF-8": (b'{"\xff": 1}', "damaged JSON"),
    "a list": ([NORM], "expected a JSON object"),
    "same name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(NORM).encode(),) * 2), "'a' stands there twice"),
    "entry a list": ({"a": [1]}, "exactly dtype, shape and data_offsets"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "exactly dtype"),
    "unknown key": ({"a": {**NORM, "scale": 2}}, "exactly dtype"),
    "unknown dtype": ({"a": {**NORM, "dtype": "F31"}}, "'F31', which safetensors does not define"),
    "dtype a list": ({"a": {**NORM, "dtype": ["F32"]}}, "does not define"),
    "negative extent": ({"a": {**NORM, "shape": [-2]}}, "bad shape"),
    "extent a float": ({"a": {**NORM, "shape": [2.0]}}, "bad shape"),
    "extent a bool": ({"a": {**NORM, "shape": [2, True]}}, "bad shape"),
    "rank": ({"a": {**NORM, "shape": [1] * 40 + [2]}}, "bad shape"),
    "huge extents": ({"a": {**NORM, "shape": [1 << 61, 1 << 61]}}, "does not take 8 bytes"),
    "too few bytes": ({"a": {**NORM, "shape": [3]}}, "does not take 8 bytes"),
    "offsets reversed": ({"a": {**NORM, "data_offsets": [8, 0]}}, "does not take -8 bytes"),
    "three offsets": ({"a": {**NORM, "data_offsets": [0, 4, 8]}}, "data_offsets"),
    "overlap": ({"a": NORM, "b": {**NORM, "data_offsets": [4, 12]}}, "'b' overlaps"),
    "same place": ({"a": NORM, "b": NORM}, "overlaps"),
    "hole": ({"a": NORM, "b": {**NORM, "data_offsets": [12, 20]}}, "'b' follows a hole"),
    "hole at the start": ({"a": {**NORM, "data_offsets": [4, 12]}}, "'a' follows a hole"),
    "past the end": (
        {"a": NORM, "b": {**NORM, "data_offsets": [8, 16]}, "c": {**NORM, "data_offsets": [16, 24]}},
        "trunc",
    ),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_broken_header_is_refused(tmp_path, case):
    header, message = BROKEN_HEADERS[case]
    join(tmp_path / "model.safetensors", header, b"\0" * 20)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors.open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path):
    for length in (1 << 63, 100 << 20, 0, 1):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            safetensors.open_folder(tmp_path)


@given(st.data())
def test_a_flipped_header_byte_never_loads_other_values_or_escapes_as_another_error(tmp_path_factory, data):
    """Any single damaged byte of the header is refused, or changes nothing the loader reads (the metadata)."""
    folder = tmp_path_factory.mktemp("flip")
    good = {"a": entry(np.arange(6, dtype=np.float32).reshape(2, 3)), "b": entry(np.ones(2, np.float16))}
    write_file(folder / "model.safetensors", good)
    content = bytearray((folder / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    position = data.draw(st.integers(0, 7 + length))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "model.safetensors").write_bytes(content)
    try:
        found = safetensors.open_folder(folder).tensors
    except CheckpointError:
        return
    # What is left are renamed tensors, and shapes and types of the same size: the table refuses those by name.
    assert len(found) == 2
    assert sum(tensor.nbytes for tensor in found.values()) == 28


def test_a_file_that_shrinks_after_the_check_is_an_error(tmp_path, tensors):
    folder = write_checkpoint(tmp_path, tensors)
    opened = open_checkpoint(folder, CONFIG)
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        read_group(opened, storage_groups(CONFIG)["text.embed_tokens"], "float32")


def test_the_fingerprint_follows_every_file(tmp_path):
    folder = copy_checkpoint(tmp_path / "checkpoint")
    before = open_checkpoint(folder, CONFIG).fingerprint
    assert open_checkpoint(folder, CONFIG).fingerprint == before
    header, data = split(folder / SECOND)
    join(folder / SECOND, header, data)
    os.utime(folder / SECOND, ns=(0, 0))
    assert open_checkpoint(folder, CONFIG).fingerprint != before


def test_reading_needs_memory_for_a_piece_only(tmp_path, monkeypatch):
    """A tensor far larger than the piece is never held whole beside its target."""
    import tracemalloc

    monkeypatch.setattr(safetensors, "_PIECE_BYTES", 1 << 16)
    write_file(tmp_path / "model.safetensors", {"a": entry(np.zeros((4096, 1024), np.float32))})
    tensor = safetensors.open_folder(tmp_path).tensors["a"]
    tracemalloc.start()
    try:
        rows = sum(len(piece) for _, piece in tensor.read_rows(0, 4096))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == 4096
    assert peak < 4 << 16
