"""What is said of programs that are compiled for devices that are not here."""

import importlib.util

import jax
import numpy as np
import pytest

from runtime import aot
from runtime.errors import InputError
from runtime.graphs import GraphKey
from tests.runtime.test_graphs import toy


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed here")
def test_without_libtpu_the_error_says_what_to_install() -> None:
    key = GraphKey("decode", "tpu", 8, (1, 1024), preset="context")
    with pytest.raises(InputError, match=r"no compiler for the topology 'v5e:2x4'.*install keye-jax\[tpu\]"):
        aot.compile_for_topology(key, toy(key), "v5e:2x4")


TEXT = """
    %p = bf16[4]{0} parameter(0)
    %all-reduce.3 = f32[8,16]{1,0:T(8,128)} all-reduce(f32[8,16]{1,0} %fusion.1), channel_id=1, to_apply=%add
    %ag = (bf16[4]{0}, bf16[8]{0}) all-gather-start(bf16[4]{0} %p), dimensions={0}
    %agd = bf16[8]{0} all-gather-done((bf16[4]{0}, bf16[8]{0}) %ag)
    %keys = f8e4m3fn[100,8]{1,0:T(8,128)(4,1)S(1)} fusion(%p), kind=kLoop, calls=%all-gather.5
    rs = (f8e4m3fn[50,8]{1,0}, pred[2]{0}, token[]) reduce-scatter(%keys, %p), channel_id=7, to_apply=%add
    ROOT %r = s4[<=6,3]{1,0} all-to-all(%all-to-all.9), channel_id=2
"""


def test_collectives_are_listed_with_their_largest_array() -> None:
    """Layouts, tuples and element types of any width; an asynchronous one once; names of operations are none."""
    found = [(one.kind, one.bytes) for one in aot.collectives(TEXT)]
    assert found == [("all-reduce", 8 * 16 * 4), ("all-gather", 16), ("reduce-scatter", 800), ("all-to-all", 9)]


def test_an_array_of_unknown_size_is_not_overlooked() -> None:
    with pytest.raises(ValueError, match="element type opaque of unknown size"):
        aot.collectives("%a = opaque[4]{0} all-reduce(%p)")


def test_memory_counts_donated_arguments_once() -> None:
    compiled = jax.jit(lambda x: x * 2, donate_argnums=0).lower(np.zeros((256, 4), np.float32)).compile()
    memory = aot.memory(compiled)
    assert (memory.arguments, memory.results, memory.aliased) == (4096, 4096, 4096)
    assert memory.total == 4096 + memory.temporaries


@pytest.mark.parametrize(
    ("name", "devices"), [("v5e:2x4", 8), ("v5p:2x2x1", 4), ("v6e:16x16", 256), ("tpu7x:2x2x1", 8)]
)
def test_topologies_have_their_devices(name: str, devices: int) -> None:
    assert aot.split_topology(name)[1] == devices


@pytest.mark.parametrize("name", ["", ":", "v5e:", "v5e:2x", "v5e:x2", "v5e:2X4", "v5e:²x4", "V5E:2x4", "v5e:8"])
def test_misspelt_topologies_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--topology"):
        aot.split_topology(name)
