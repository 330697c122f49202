"""What is trained when, and the compiled programs for it: the next one compiles while the last one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import optax

from examples.train_tiny.data import Batch, Shape, empty_batch
from examples.train_tiny.model import Mode
from examples.train_tiny.objectives import Params, evaluation_step, optimizer, training_step
from keye_jax.config import KeyeConfig


@dataclass(frozen=True)
class Stage:
    """A run of steps of one phase with one shape of batches. Stages of a phase share optimizer and schedule."""

    mode: Mode
    peak: float
    """Learning rate after the phase's warm-up."""
    steps: int
    shape: Shape
    measured: tuple[Mode, ...] = ()
    """How the model attends in the measurements after the stage."""
    first: int = 0
    """Steps before this stage."""

    @property
    def end(self) -> int:
        return self.first + self.steps


# A dense step takes 30 to 50 ms on one H200, a step of the indexer's warm-up 50 ms, a sparse one 90 ms, the first
# compilation 20 s: about eight minutes together. Shorter dense stages answer "when" by the shape alone: it is the
# colour or digit in the question that takes long to count.
STAGES = (
    Stage("dense", 2e-3, 1600, Shape(96, 4, mix="seeing")),
    Stage("dense", 2e-3, 2000, Shape(64, 8), measured=("warm-up",)),
    Stage("dense", 2e-3, 4800, Shape(32, 16, fewest=8), measured=("warm-up",)),
    Stage("warm-up", 2e-3, 300, Shape(16, 16, fewest=8), measured=("warm-up", "sparse")),
    Stage("sparse", 5e-4, 1200, Shape(16, 16, fewest=8), measured=("warm-up", "sparse")),
)
EVALUATION = Shape(16, 16, fewest=8)


def scaled(stages: tuple[Stage, ...], steps: float, clips: float) -> tuple[Stage, ...]:
    """The stages, one after another, with more or fewer steps and clips a batch."""
    result, first = [], 0
    for stage in stages:
        shape = replace(stage.shape, clips=max(1, round(stage.shape.clips * clips)))
        result.append(replace(stage, steps=max(1, round(stage.steps * steps)), shape=shape, first=first))
        first = result[-1].end
    return tuple(result)


class Programs:
    """Everything that the stages left after step `done` need, compiled in order in a thread of its own."""

    def __init__(
        self, config: KeyeConfig, stages: tuple[Stage, ...], done: int, params: Params, key: jax.Array, dtype: Any
    ):
        self._rules: dict[Mode, optax.GradientTransformation] = {}
        modes: tuple[Mode, ...] = get_args(Mode)
        for mode in modes:
            own = [stage for stage in stages if stage.mode == mode]
            if own:
                self._rules[mode] = optimizer(config, mode, own[0].peak, sum(stage.steps for stage in own))
        self._steps: dict[Stage, Future[Any]] = {}
        self._evaluations: dict[Mode, Future[Any]] = {}
        pool = ThreadPoolExecutor(1)
        # Not the arrays: the first step gives their memory away.
        shapes = jax.eval_shape(lambda tree: tree, params)
        for stage in stages:
            if stage.end <= done:
                continue
            step = training_step(config, stage.mode, self._rules[stage.mode], dtype)
            state = jax.eval_shape(self._rules[stage.mode].init, params)
            self._steps[stage] = pool.submit(_compile, step, shapes, state, empty_batch(stage.shape), key)
            for mode in stage.measured:
                if mode not in self._evaluations:
                    evaluate = evaluation_step(config, mode, dtype)
                    self._evaluations[mode] = pool.submit(_compile, evaluate, shapes, empty_batch(EVALUATION))
        pool.shutdown(wait=False)

    def rule(self, mode: Mode) -> optax.GradientTransformation:
        return self._rules[mode]

    def step(self, stage: Stage) -> Callable[..., Any]:
        return self._steps[stage].result()

    def evaluation(self, mode: Mode) -> Callable[[Params, Batch], Any]:
        return self._evaluations[mode].result()


def _compile(program: Any, *arguments: Any) -> Any:
    return program.lower(*arguments).compile()
