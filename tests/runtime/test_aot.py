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


def test_collectives_are_counted_by_kind() -> None:
    text = """
    %all-reduce.3 = f32[8,16]{1,0:T(8,128)} all-reduce(f32[8,16]{1,0} %fusion.1), channel_id=1
    %ag = (bf16[4]{0}, bf16[8]{0}) all-gather-start(bf16[4]{0} %p), dimensions={0}
    %agd = bf16[8]{0} all-gather-done((bf16[4]{0}, bf16[8]{0}) %ag)
    ROOT %r = f32[8,16]{1,0} all-reduce(f32[8,16]{1,0} %all-reduce.3), channel_id=2
    """
    assert aot._COLLECTIVE.findall(text) == ["all-reduce", "all-gather", "all-reduce"]


def test_memory_counts_donated_arguments_once() -> None:
    compiled = jax.jit(lambda x: x * 2, donate_argnums=0).lower(np.zeros((256, 4), np.float32)).compile()
    memory = aot.memory(compiled)
    assert (memory.arguments, memory.results, memory.aliased) == (4096, 4096, 4096)
    assert memory.total == 4096 + memory.temporaries
