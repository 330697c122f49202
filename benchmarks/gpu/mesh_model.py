"""Prefill and decode of the full-size model on one device and on several: seconds, memory, communication, and how far
the logits lie from those of one device."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu import decode, prefill, rates
from benchmarks.gpu.mesh_checks import Layout, layout_name
from benchmarks.gpu.mesh_programs import Graph, Programs, collectives, kernel_calls, place
from benchmarks.gpu.model import CONFIGS, GIB, JSONS, chunks, decode_state, random_cache, random_model
from keye_jax.decoder import DECODE_UNROLL
from keye_jax.params import flatten, unflatten
from runtime.graphs import GraphKey
from runtime.programs import Program

Item = tuple[tuple[object, ...], Any]
"""Key in the result, and what finds its value."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        config: name of a model of `benchmarks.gpu.model`.
        contexts: prompt lengths.
        decode: contexts of decode steps.
        chunk: tokens of a prefill chunk.
        repeats: timed prefills of a prompt, which must end in the same bits.
    """

    config: str
    layouts: tuple[Layout, ...]
    contexts: tuple[int, ...]
    decode: tuple[int, ...]
    chunk: int
    repeats: int
    platform: str

    def graphs(self, layout: Layout) -> dict[tuple[str, int], Graph]:
        """(program, context) → what is to be compiled."""
        preset, devices = layout
        shapes = {("prefill", context): (1, min(self.chunk, context), context) for context in self.contexts}
        shapes |= {("decode", context): (1, context) for context in self.decode}
        indexer, text = CONFIGS[self.config].sparse.indexer_dtype, json.dumps(JSONS[self.config])
        return {
            what: Graph(text, "bfloat16", indexer, GraphKey(what[0], self.platform, devices, shape, preset=preset))
            for what, shape in shapes.items()
        }


class FullSize:
    """The measurement.

    Args:
        folder: keeps what one device said, for a run that is begun again.
    """

    def __init__(self, plan: Plan, programs: Programs, folder: Path):
        self._plan, self._programs, self._folder = plan, programs, folder
        self._config = CONFIGS[plan.config]
        # The decoder's weights by path, from one layout to the next: two copies need not fit.
        self._weights = dict(flatten(random_model(self._config).text))
        jax.block_until_ready(self._weights)

    def items(self) -> Iterator[Item]:
        """Layout after layout; a layout's weights are placed when its first item is asked for."""
        for layout in self._plan.layouts:
            name, placed = layout_name(layout), [False]
            for (kind, context), graph in self._plan.graphs(layout).items():

                def measured(function: Any, graph: Graph = graph, context: int = context, placed: Any = placed) -> Any:
                    program = self._programs.get(graph)
                    if not placed[0]:
                        self._place(program)
                        placed[0] = True
                    return function(program, context)

                find = self._prefill if kind == "prefill" else self._decode
                yield (kind, context, name), partial(measured, find)
            yield ("peak_gib", name), partial(_peak, layout[1])
        for layout in self._plan.layouts:
            for graph in self._plan.graphs(layout).values():
                yield ("programs", graph.key.name), partial(self._describe, graph)

    def _place(self, program: Program) -> None:
        for path, sharding in flatten(program.shardings[0]):
            self._weights[path] = jax.device_put(self._weights.pop(path), sharding)
        jax.block_until_ready(self._weights)

    def _describe(self, graph: Graph) -> dict[str, Any]:
        program = self._programs.get(graph)
        text, layers = program.run.as_text(), self._config.text.num_hidden_layers
        layer, beside = collectives(text, min(layers, DECODE_UNROLL) if program.key.program == "decode" else 1)
        return {
            "gib_a_device": round(program.memory.total / GIB, 2),
            "collectives_a_layer": layer,
            "collectives_beside": beside,
            "kernels": kernel_calls(text),
        }

    def _prefill(self, program: Program, context: int) -> dict[str, Any]:
        """Of a whole prompt, warm. Its first `topk` tokens are compared as well: they select every key, and no near-tie
        falls otherwise."""
        plan, params = self._plan, unflatten(self._weights)
        parts = [place(program, 3, part) for part in chunks(self._config, context, min(plan.chunk, context))]
        few = jnp.array([min(self._config.sparse.topk, plan.chunk)], jnp.int32)
        first = {**parts[0], "valid": place(program, 3, {**parts[0], "valid": few})["valid"]}

        def prompt(parts: list[Any]) -> tuple[float, np.ndarray]:
            carried: Any = program.zeros(1, 2)
            seconds, logits = prefill.time_prompt(program, params, carried, parts)
            return seconds, np.asarray(logits)[0]

        short = prompt([first])[1]
        runs = [prompt(parts) for _ in range(plan.repeats)]
        seconds = statistics.median(run[0] for run in runs)
        return {
            "seconds": round(seconds, 4),
            "tokens_a_second": round(context / seconds),
            "repeats": all(np.array_equal(run[1], runs[0][1]) for run in runs),
            "all_keys_selected": self._against_one(program, f"short-{context}", short),
            "whole_prompt": self._against_one(program, f"whole-{context}", runs[0][1]),
        }

    def _decode(self, program: Program, context: int) -> dict[str, Any]:
        params, config = unflatten(self._weights), self._config
        cache = place(program, 1, random_cache(config, 1, context, context - decode.SPARE))
        logits = place(program, 2, jnp.zeros((1, config.text.vocab_size), jnp.float32))
        state, steps = place(program, 3, decode_state(1)), place(program, 4, jnp.int32(decode.STEPS))
        ms, tokens = decode.time_steps(program, params, cache, logits, state, steps)
        path, told = self._folder / f"tokens-{context}.npy", np.asarray(tokens)
        if program.key.devices == 1:
            np.save(path, told)
        same = int(np.cumprod(told == np.load(path)).sum()) if path.exists() else None
        return {"ms": ms, "tokens_a_second": round(1e3 / ms, 1), "first_tokens_of_16_as_on_one": same}

    def _against_one(self, program: Program, name: str, logits: np.ndarray) -> dict[str, Any] | None:
        """Differences from one device's logits as parts of the largest; None where these are not known."""
        path = self._folder / f"{name}.npy"
        if program.key.devices == 1:
            np.save(path, logits)
        if not path.exists():
            return None
        one = np.load(path)
        error, largest = np.abs(logits - one), np.abs(one).max()
        return {
            "largest": round(float(error.max() / largest), 5),
            "mean": round(float(error.mean() / largest), 6),
            "same_token": bool(one.argmax() == logits.argmax()),
        }


def _peak(devices: int) -> float | None:
    """GiB in use at most so far on the last of the devices, which held nothing of the layouts of fewer."""
    stats = jax.devices()[devices - 1].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / GIB, 2) if "peak_bytes_in_use" in stats else None


def links(devices: int, large: int) -> dict[str, float]:
    """What communication costs at best: microseconds of a sum of 8 KB, GB/s of one of `large` bytes a device."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))

    def seconds(size: int) -> float:
        whole = NamedSharding(mesh, PartitionSpec())
        add = jax.shard_map(
            lambda x: lax.psum(x, "model"),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return rates.seconds(jax.jit(add), jax.device_put(jnp.ones(size // 4, jnp.float32), whole))

    return {"us_8_kb": round(1e6 * seconds(8192), 1), "gb_per_s": round(large / seconds(large) / 1e9, 1)}
