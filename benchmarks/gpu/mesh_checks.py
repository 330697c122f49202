"""Whether a model over several devices says what it must: the golden tokens in float32; in bfloat16, logits as near to
float32 ones as the reference's are; and twice the same bits."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import whole
from benchmarks.gpu.checks import Outcome, same_bits
from benchmarks.gpu.mesh_programs import Graph, Programs, kernel_calls, place
from benchmarks.gpu.model import TINY, TINY_JSON
from keye_jax import graphs
from runtime.graphs import SINGLE, GraphKey
from tests.keye_jax.golden_prompts import CASES, LENGTH

Layout = tuple[str, int]
"""Preset and devices."""


class Checks:
    """The checks for layouts of several devices.

    Args:
        tokens: of the bfloat16 model's prompts.
    """

    def __init__(self, layouts: Sequence[Layout], platform: str, tokens: int):
        self._layouts, self._platform, self._tokens = layouts, platform, tokens
        self._most = max((devices for _, devices in layouts), default=1)
        self._golden: dict[str, tuple[whole.Prompts, dict[str, Any], np.ndarray]] = {}
        self._small: tuple[whole.Prompts, dict[str, Any], dict[str, Any]]

    def graphs(self) -> list[Graph]:
        """What is to be compiled."""
        pairs = [self._golden_pair(mode, layout) for mode in whole.INDEXER for layout in self._layouts]
        pairs += [self._small_pair(layout) for layout in self._layouts]
        if self._layouts:
            pairs += [self._small_pair(_ALONE, "bfloat16", plain=True), self._small_pair(_ALONE, "float32", plain=True)]
        return [graph for pair in pairs for graph in pair]

    def load(self) -> None:
        """Reads and draws weights and prompts, which takes as long as tracing the programs."""
        if self._layouts:
            self._golden = {mode: whole.golden_prompts(mode) for mode in whole.INDEXER}
            self._small = whole.small_prompts(self._tokens)

    def run(self, programs: Programs) -> Iterator[tuple[tuple[object, ...], Any]]:
        """(key in the result, what finds its value), check after check; `load` comes first."""
        for layout in self._layouts:
            name = layout_name(layout)
            for mode in self._golden:
                yield ("checks", f"golden tokens {mode}", name), partial(self._golden_outcome, programs, mode, layout)
            yield ("checks", "bfloat16 model", name), partial(self._small_outcome, programs, layout)

    def _golden_outcome(self, programs: Programs, mode: str, layout: Layout) -> dict[str, Any]:
        prompts, params, expected = self._golden[mode]
        run = _Run(programs, self._golden_pair(mode, layout), prompts, params)
        (tokens, _), (again, _) = run.all_steps(), run.all_steps()
        wrong = int(np.sum(np.asarray(tokens)[:, : expected.shape[1]] != expected))
        return _told(Outcome(wrong, 0, bool(same_bits(tokens, again)), bool(run.kernels)), run)

    def _small_outcome(self, programs: Programs, layout: Layout) -> dict[str, Any]:
        prompts, narrow, wide = self._small
        run = _Run(programs, self._small_pair(layout), prompts, narrow)
        plain = _Run(programs, self._small_pair(_ALONE, "bfloat16", plain=True), prompts, narrow)
        exact = _Run(programs, self._small_pair(_ALONE, "float32", plain=True), prompts, wide)
        # All decode the token that follows by the float32 logits.
        expected = exact.one_step(None)
        ours, again, theirs = (one.one_step(expected[0]) for one in (run, run, plain))
        errors = [whole.farther(*logits) for logits in zip(ours, theirs, expected, strict=True)]
        outcome = Outcome(max(errors), whole.FARTHER, bool(same_bits(ours, again)), bool(run.kernels))
        return {**_told(outcome, run), "prefill": errors[0], "decode": errors[1]}

    def _golden_pair(self, mode: str, layout: Layout) -> tuple[Graph, Graph]:
        text = (whole.GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8")
        return self._pair(text, "float32", whole.INDEXER[mode], layout, (len(CASES), LENGTH))

    def _small_pair(self, layout: Layout, dtype: str = "bfloat16", *, plain: bool = False) -> tuple[Graph, Graph]:
        sparse = {**TINY_JSON["sa_config"], "topk": self._tokens // 4}
        text, shape = json.dumps({**TINY_JSON, "sa_config": sparse}), (whole.ROWS, self._tokens)
        return self._pair(text, dtype, TINY.sparse.indexer_dtype, layout, shape, plain=plain)

    def _pair(
        self, model: str, dtype: str, indexer: Any, layout: Layout, shape: tuple[int, int], *, plain: bool = False
    ) -> tuple[Graph, Graph]:
        """Prefill and decode of so many rows and tokens."""
        (rows, tokens), (preset, devices) = shape, layout
        context = whole.capacity(tokens, self._most)
        keys = (
            GraphKey(program, self._platform, devices, sizes, plain=plain, preset=preset)
            for program, sizes in (("prefill", (rows, tokens, context)), ("decode", (rows, context)))
        )
        prefill, decode = (Graph(model, dtype, indexer, key) for key in keys)
        return prefill, decode


_ALONE: Layout = (SINGLE, 1)


def layout_name(layout: Layout) -> str:
    """Such as "2 context", or "1"."""
    preset, devices = layout
    return str(devices) if devices == 1 else f"{devices} {preset}"


class _Run:
    """Prefill and decode over some devices, and their arguments."""

    def __init__(self, programs: Programs, pair: tuple[Graph, Graph], prompts: whole.Prompts, params: Any):
        self._prefill, self._decode = (programs.get(graph) for graph in pair)
        self._params = place(self._prefill, 0, params)
        self._chunk = place(self._prefill, 3, prompts.chunk)
        self._state = place(self._decode, 3, prompts.state)
        calls = [kernel_calls(program.run.as_text()) for program in (self._prefill, self._decode)]
        self.kernels = sorted({name for names in calls for name in names}) if all(calls) else []
        """Those in the programs; none if one of the programs has none."""

    def all_steps(self) -> tuple[Any, Any]:
        """The tokens of one call of decode, and the logits of the prompts' ends."""
        cache, logits = self._prefill(self._params, *self._prefill.zeros(1, 2), self._chunk)
        end = np.asarray(logits)
        return self._further(cache, logits, graphs.MAX_DECODE_STEPS)[3], end

    def one_step(self, instead: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the prompts' ends, and after one token more: the best one by `instead`, or by the first."""
        cache, logits = self._prefill(self._params, *self._prefill.zeros(1, 2), self._chunk)
        end = np.asarray(logits)
        after = self._further(cache, end if instead is None else instead, 1)[1]
        return end, np.asarray(after)

    def _further(self, cache: Any, logits: Any, steps: int) -> Any:
        given = place(self._decode, 2, jnp.asarray(logits)), self._state, place(self._decode, 4, jnp.int32(steps))
        return self._decode(self._params, cache, *given)


def _told(outcome: Outcome, run: _Run) -> dict[str, Any]:
    return {**vars(outcome), "kernels": run.kernels}
