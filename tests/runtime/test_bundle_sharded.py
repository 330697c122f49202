"""A bundle goes straight into any mesh: right values on every device, and each process reads only its own bytes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keye_jax import sharding
from keye_jax.config import KeyeConfig
from runtime.bundle import Bundle
from runtime.manifest import StoredArray

ROOT = Path(__file__).parents[2]
SPLIT = "moe.(gate_up|down)_proj|embed_tokens|lm_head"

# What both programs below begin with: the parameters' shardings by patterns of their dotted paths, and the bytes that
# tensorstore has read from files.
SHARED = """
import json, re, sys
import jax, numpy as np, tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from runtime import weights
from runtime.bundle import Bundle

bundle = Bundle.open(sys.argv[1])

def shardings(mesh, rules):
    def choose(path, array):
        leaf = ".".join(key.key for key in path)
        spec = next((spec for pattern, spec in rules.items() if re.search(pattern, leaf)), P())
        return NamedSharding(mesh, spec)
    return jax.tree.map_with_path(choose, bundle.abstract_params())

def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(metric["values"][0]["value"] for metric in metrics if metric["values"])
"""

EVERY_MESH = """
devices = np.array(jax.devices())
assert len(devices) == 8
row, grid, three = Mesh(devices, ("m",)), Mesh(devices.reshape(2, 4), ("d", "m")), Mesh(devices[:3], ("m",))
heads = {"text.*attn.q_proj": P(None, None, "m")}
experts = {"moe.(gate_up|down)_proj": P(None, "m"), "embed_tokens|lm_head": P("m"), **heads}
CASES = {
    "experts, heads and vocabulary split": (row, experts),
    "the same, twice": (grid, experts),
    "width of the experts split": (row, {"moe.(gate_up|down)_proj": P(None, None, None, "m")}),
    "experts and width split": (grid, {"moe.(gate_up|down)_proj": P(None, "d", None, "m")}),
    "layers split": (three, {"text.layers": P("m")}),
    "the same on all": (row, {}),
}
whole = jax.tree.map(np.asarray, bundle.load_params())

def differences(loaded, expected):
    for (path, array), want, sharding in zip(
        jax.tree.leaves_with_path(loaded), jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True
    ):
        if array.sharding != sharding or array.dtype != want.dtype or not np.array_equal(array, want):
            yield str(path)
        for shard in array.addressable_shards:
            if not np.array_equal(shard.data, want[shard.index]):
                yield f"{path} on {shard.device}"

found = {}
def load(name):
    mesh, rules = CASES[name]
    before, tree = bytes_read(), shardings(mesh, rules)
    return {"wrong": list(differences(bundle.load_params(shardings=tree), tree)), "bytes": bytes_read() - before}

for name in CASES:
    found[name] = load(name)
weights._HOST_BYTES, weights._PIECE_BYTES = 0, 150_000
for name in ("experts and width split", "layers split"):
    found[f"{name}, growing on the devices"] = load(name)
print(json.dumps(found))
"""

ONE_OF_TWO = """
port, process = sys.argv[2:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
mesh = Mesh(np.array(jax.devices()), ("m",))
assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
seen = []
params = bundle.load_params(
    shardings=shardings(mesh, {"moe.(gate_up|down)_proj": P(None, "m"), "embed_tokens|lm_head": P("m")}),
    progress=lambda done, total: seen.append((done, total)),
)
experts = params["text"]["layers"]["moe"]["gate_up_proj"]
(shard,) = experts.addressable_shards
print(json.dumps({
    "bytes": bytes_read(),
    "own": sum(part.data.nbytes for array in jax.tree.leaves(params) for part in array.addressable_shards),
    "last progress": seen[-1],
    "global shape": experts.shape,
    "experts": [shard.index[1].start, shard.index[1].stop],
    "sum": float(np.asarray(shard.data, np.float64).sum()),
}))
"""


def start(program: str, *arguments: object, devices: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", SHARED + program, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def arrays(bundle: Bundle) -> list[tuple[str, StoredArray]]:
    return [stored for group in bundle.groups.values() for stored in group.arrays.items()]


@pytest.mark.slow
def test_every_mesh_gets_the_same_values_and_reads_nothing_twice(golden_bundle):
    found = outcome(start(EVERY_MESH, golden_bundle, devices=8))
    assert len(found) == 8
    assert {name: case["wrong"] for name, case in found.items()} == {name: [] for name in found}
    stored = sum(array.nbytes for _, array in arrays(Bundle.open(golden_bundle)))
    # The stores' index nodes come on top: some hundred bytes for an array of a layer.
    assert {name: case["bytes"] / stored for name, case in found.items() if case["bytes"] > 1.1 * stored} == {}
    assert all(case["bytes"] >= stored for case in found.values())


def test_a_process_reads_only_what_its_devices_hold(golden_bundle):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(ONE_OF_TWO, golden_bundle, port, number, devices=1) for number in range(2)]
    found = [outcome(process) for process in processes]
    assert [part["experts"] for part in found] == [[0, 4], [4, 8]]
    whole = Bundle.open(golden_bundle).load_params()["text"]["layers"]["moe"]["gate_up_proj"]
    for part, rows in zip(found, (slice(0, 4), slice(4, 8)), strict=True):
        assert tuple(part["global shape"]) == whole.shape
        assert part["sum"] == pytest.approx(float(np.asarray(whole[:, rows], np.float64).sum()), abs=1e-3)
        assert part["last progress"] == [part["own"], part["own"]]
        assert part["own"] <= part["bytes"] < part["own"] * 1.1
    split = [array for name, array in arrays(Bundle.open(golden_bundle)) if re.search(SPLIT, name)]
    everything = sum(array.nbytes for _, array in arrays(Bundle.open(golden_bundle)))
    assert {part["own"] for part in found} == {everything - sum(array.nbytes for array in split) // 2}


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("preset", ["expert", "context"])
def test_values_and_scales_of_8_bit_weights_are_spread_alike(golden_int8_bundle, preset, devices):
    """A device's scales are those of the output channels that it has: of its experts and heads, and all of the output
    projection's, which sums over heads."""
    bundle = Bundle.open(golden_int8_bundle)
    config, mesh = KeyeConfig.from_hf(bundle.config), Mesh(np.array(jax.devices()[:devices]), (sharding.MODEL_AXIS,))
    partitions = sharding.param_partitions(config, preset, devices, "int8")
    whole = jax.tree.map(np.asarray, bundle.load_params())
    spread = bundle.load_params(shardings=sharding.shardings(partitions, mesh))
    for (path, found), expected in zip(jax.tree.leaves_with_path(spread), jax.tree.leaves(whole), strict=True):
        assert found.dtype == expected.dtype, path
        for shard in found.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index], err_msg=str(path))
    layers, split = spread["text"]["layers"], {True: devices, False: 1}
    for name, node, divides in (
        ("head", spread["text"]["lm_head"], config.text.vocab_size % devices == 0),
        ("experts", layers["moe"]["down_proj"], config.text.num_experts % devices == 0),
        ("queries", layers["attn"]["q_proj"], preset == "context" and config.text.num_attention_heads % devices == 0),
    ):
        for part in ("values", "scale"):
            own = node[part].addressable_shards[0].data.size
            assert own * split[divides] == node[part].size, (name, part)
    assert layers["attn"]["o_proj"]["scale"].sharding.is_fully_replicated


def test_a_parameter_without_sharding_is_named(golden_bundle):
    bundle = Bundle.open(golden_bundle)
    everywhere = NamedSharding(Mesh(jax.devices()[:1], ("m",)), PartitionSpec())
    shardings = jax.tree.map(lambda _: everywhere, bundle.abstract_params())
    del shardings["text"]["layers"]["attn"]["q_norm"]
    with pytest.raises(ValueError, match=r"none for text\.layers\.attn\.q_norm"):
        bundle.load_params(shardings=shardings)
