"""A training run: steps, states, reports and measurements."""

import json
import sys
import time
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np

from examples.train_tiny.checkpoint import write_trained, write_untrained
from examples.train_tiny.data import Batch, Stream
from examples.train_tiny.evaluation import exact_answers
from examples.train_tiny.model import Mode
from examples.train_tiny.objectives import Params, initial_params
from examples.train_tiny.schedule import EVALUATION, STAGES, Programs, Stage, scaled
from examples.train_tiny.state import load_state, save_state
from keye_jax.config import KeyeConfig

REPORT_EVERY = 50
EVALUATION_BATCHES = 8
HELD_OUT_SEED = 1_000_003
"""Added to the training seed for the batches that exactness is measured on."""


def train(folder: Path, seed: int, steps: float, clips: float, workers: int, save_every: float) -> int:
    """Trains in `folder`, from its state if it has one.

    Args:
        steps, clips: times the usual number of steps, and of clips in a batch.
        workers: processes that make batches.
        save_every: seconds between states.

    Returns:
        Bytes of the checkpoint that it wrote.
    """
    base = folder / "checkpoint"
    base.mkdir(parents=True, exist_ok=True)
    config = write_untrained(base)
    stages = scaled(STAGES, steps, clips)
    with (
        Stream(base, seed, workers) as stream,
        Stream(base, seed + HELD_OUT_SEED, 1) as held_out,
        (folder / "log.jsonl").open("a", encoding="utf-8") as log,
    ):
        run = Run(folder, config, stages, seed, log)
        tests = held_out.batches((number, EVALUATION) for number in range(EVALUATION_BATCHES))
        run.finish(stream, [batch for _, batch in tests], save_every)
        return write_trained(base, config, jax.device_get(run.params))


class Run:
    """Training in progress: weights, the optimizer's state and the number of steps done."""

    def __init__(self, folder: Path, config: KeyeConfig, stages: tuple[Stage, ...], seed: int, log: TextIO):
        """Starts anew, or from the state that `folder` holds."""
        self._folder, self._stages, self._log = folder, stages, log
        self._key = jax.random.key(seed)
        self.params: Params = initial_params(config, seed)
        self.step = 0
        self._leaves: list[np.ndarray] | None = None
        saved = load_state(folder / "state.npz", self.params)
        if saved is not None:
            self.params, self._leaves, self.step = saved
            print(f"continuing after step {self.step}", file=sys.stderr)
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self._programs = Programs(config, stages, self.step, self.params, self._key, dtype)
        self._began = time.perf_counter()

    def finish(self, stream: Stream, tests: list[Batch], save_every: float) -> None:
        """Runs what is left, stage by stage, and measures where a stage says so."""
        left = [stage for stage in self._stages if stage.end > self.step]
        batches = stream.batches((n, s.shape) for s in left for n in range(max(s.first, self.step), s.end))
        saved_at = time.perf_counter()
        for stage in left:
            program = self._programs.step(stage)
            state = self._state(stage)
            while self.step < stage.end:
                number, batch = next(batches)
                key = jax.random.fold_in(self._key, number)
                self.params, state, metrics = program(self.params, state, batch, key)
                self.step = number + 1
                if self.step % REPORT_EVERY == 0:
                    self._report(stage.mode, {name: float(value) for name, value in metrics.items()})
                if time.perf_counter() - saved_at > save_every or self.step == stage.end:
                    save_state(self._folder / "state.npz", self.params, state, self.step)
                    saved_at = time.perf_counter()
            self._leaves = jax.tree.leaves(state)
            for mode in stage.measured:
                self._measure(mode, tests)

    def _state(self, stage: Stage) -> object:
        """The optimizer's state: that of the stage before, or of the file, within a phase; a new one at its start."""
        fresh = self._programs.rule(stage.mode).init(self.params)
        phase_began = next(s.first for s in self._stages if s.mode == stage.mode)
        if self._leaves is None or self.step == phase_began:
            return fresh
        return jax.tree.unflatten(jax.tree.structure(fresh), self._leaves)

    def _report(self, phase: str, values: dict[str, float]) -> None:
        line = {"phase": phase, "step": self.step, "seconds": round(time.perf_counter() - self._began, 1), **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        shown = " ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float | int))
        print(f"{phase}: {shown}", file=sys.stderr, flush=True)

    def _measure(self, mode: Mode, tests: list[Batch]) -> None:
        """Reports the share of held-out answers that come out exactly, by kind of question."""
        evaluate = self._programs.evaluation(mode)
        shares: dict[str, list[np.ndarray]] = {}
        recall = []
        for batch in tests:
            right, metrics = evaluate(self.params, batch)
            recall.append(float(metrics["recall"]))
            for kind, exact in exact_answers(np.asarray(right), batch).items():
                shares.setdefault(kind, []).append(exact)
        values = {kind: float(np.concatenate(found).mean()) for kind, found in sorted(shares.items())}
        if mode == "sparse":
            self._report("held out, sparse attention", values)
        else:
            self._report("held out, dense attention", {**values, "recall": float(np.mean(recall))})
