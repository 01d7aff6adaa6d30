"""How sparsity grows: optax schedules, and the stages of a gradual run.

A schedule maps a step to the fraction of weights removed. Stages read it where they
begin: the pattern is solved once per stage, not in every step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from flexhinm_jax import arguments
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.hard_concrete import HardConcrete
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.patterns import FlexHiNM
from flexhinm_jax.pruning import solve
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Uses


def cubic(start: float, end: float, steps: int, begin: int = 0) -> optax.Schedule:
    """Fast at first, slow at the end: end + (start - end) (1 - (t - begin) / steps)^3.

    Args:
      start: sparsity up to step `begin`.
      end: sparsity from step `begin + steps` on.
      steps: length of the growth.
      begin: its first step.

    Returns:
      A function from the step to the sparsity.

    Raises:
      ValueError: a sparsity that falls or lies outside [0, 1].

    Source: Zhu and Gupta 2017 (arXiv:1710.01878), equation 1.

    Example:
      >>> [round(float(cubic(0.0, 0.8, 4)(t)), 2) for t in range(5)]
      [0.0, 0.46, 0.7, 0.79, 0.8]
    """
    _check_growth(start, end, steps)
    return optax.polynomial_schedule(start, end, 3, steps, begin)


def shuffled(count: int, steps: int, chance: np.random.Generator) -> list[int]:
    """Which batch each step sees: all of them, in a new order each time.

    Args:
      count: of batches.
      steps: of the run.
      chance: source of the orders.
    """
    rounds = -(-steps // count)
    orders = [chance.permutation(count) for _ in range(rounds)]
    return [int(n) for order in orders for n in order][:steps]


def linear(start: float, end: float, steps: int, begin: int = 0) -> optax.Schedule:
    """Evenly from `start` to `end`; arguments as in `cubic`."""
    _check_growth(start, end, steps)
    return optax.linear_schedule(start, end, steps, begin)


def staged(sparsities: Sequence[float], every: int) -> optax.Schedule:
    """Constant for `every` steps each.

    Args:
      sparsities: one per stage; must not fall.
      every: steps of a stage.
    """
    if not isinstance(sparsities, Sequence) or not sparsities:
        raise ValueError(
            f"sparsities={arguments.shown(sparsities)}: need a list with at least one"
        )
    arguments.count(every, "every", 1)
    _check_growth(sparsities[0], sparsities[0], every)
    for before, after in zip(sparsities, sparsities[1:], strict=False):
        _check_growth(before, after, every)
    constants = [optax.constant_schedule(s) for s in sparsities]
    return optax.join_schedules(
        constants, [every * k for k in range(1, len(sparsities))]
    )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a gradual run: solve for a sparsity, train, harden.

    Attributes:
      sparsity: fraction removed, one for all or one per path; None for a pattern that
        has only one.
      steps: training steps, 0 for none.
      anneals: temperatures of the stage, equally long; None changes them every step.
    """

    sparsity: float | Mapping[str, float] | None
    steps: int
    anneals: int | None = None

    def __post_init__(self):
        """Validates the configuration."""
        arguments.count(self.steps, "steps", 0)
        if self.anneals is not None:
            arguments.count(self.anneals, "anneals", 1)

    def progress(self, step: int) -> float:
        """Progress of schedules in step 0 .. steps - 1, in [0, 1]; 1 in the last."""
        levels = min(self.anneals or self.steps, self.steps)
        if levels <= 1:
            return 1.0
        return min(step * levels // self.steps, levels - 1) / (levels - 1)


def stages(
    schedule: optax.Schedule,
    count: int,
    steps: int,
    anneals: int | None = None,
) -> tuple[Stage, ...]:
    """Equal stages along a schedule.

    Args:
      schedule: sparsity by step.
      count: number of stages.
      steps: training steps of each.
      anneals: temperatures of each stage, see `Stage`.

    Returns:
      Stages with the sparsity that the schedule has at their end.

    Example:
      >>> [s.sparsity for s in stages(linear(0.0, 0.8, 40), 4, 10)]
      [0.2, 0.4, 0.6, 0.8]
    """
    arguments.function(schedule, "schedule", "schedule(step), as linear() returns")
    arguments.count(count, "count", 1)
    ends = [float(np.asarray(schedule(steps * (k + 1)))) for k in range(count)]
    return tuple(Stage(round(s, 6), steps, anneals) for s in ends)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method and its stages, for `gradual`.

    Attributes:
      method: what learns.
      stages: sparsity and steps of each stage.
    """

    method: LearnedMethod
    stages: tuple[Stage, ...]


def flexhinm_gp(
    vector_size: int = 32,
    *,
    sparsity: float = 0.75,
    steps: int = 4000,
    count: int = 4,
    anneals: int = 4,
    pattern: dict[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """The configuration of FlexHiNM-GP (ICLR 2026, openreview YaZraqRsbB).

    Four equally long stages; a stage chooses the boundaries of the regions and the
    orders (Gyro), anneals the temperature in four steps and ends with hard masks. The
    paper leaves the sparsities of the stages open: ours grow cubically from 0.

    Args:
      vector_size: rows of a tile.
      sparsity: of the last stage.
      steps: training steps of all stages together.
      count: number of stages.
      anneals: temperatures per stage.
      pattern: further options of `FlexHiNM`, such as {"n": 1}.
      **options: of `HardConcrete`, such as `scores=Wanda()`.

    Returns:
      The method and its stages.

    Raises:
      ValueError: fewer steps than stages.

    Example:
      >>> recipe = flexhinm_gp(64, sparsity=0.875, steps=800)
      >>> [s.sparsity for s in recipe.stages]
      [0.505859, 0.765625, 0.861328, 0.875]
    """
    arguments.count(count, "count", 1)
    arguments.count(steps, "steps", 1)
    if steps < count:
        raise ValueError(f"steps={steps} for {count} stages: need one step per stage")
    if pattern is not None and not isinstance(pattern, dict):
        raise ValueError(
            f"pattern={arguments.shown(pattern)}: need options of FlexHiNM as a dict, "
            "such as {'n': 1}"
        )
    each = steps // count
    method = HardConcrete(FlexHiNM(vector_size, **(pattern or {})), **options)
    schedule = cubic(0.0, sparsity, each * count)
    return Recipe(method, stages(schedule, count, each, anneals))


def check_stages(
    stages: Sequence[Stage], method: Method, params: Any, uses: Uses
) -> None:
    """Raises ValueError when some stage cannot be met, before any work.

    Args:
      stages: the stages.
      method: the method, for its pattern.
      params: the parameter tree.
      uses: from `discover`.

    Raises:
      ValueError: no stage, a sparsity that falls, or one that a leaf's pattern cannot
        express; the message names the stage and the leaf.
    """
    check_method(method)
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise ValueError(
            f"stages is {arguments.shown(stages)}: need a list of Stage(sparsity, "
            "steps); a recipe has it as recipe.stages"
        )
    for number, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise ValueError(
                f"stages[{number}] is {arguments.shown(stage)}: need "
                "Stage(sparsity, steps), such as Stage(0.5, 1000)"
            )
    if not stages:
        raise ValueError("stages is empty: give at least one Stage(sparsity, steps)")
    Leaves.of(params).dense(uses)
    before: dict[str, float] = {}
    for number, stage in enumerate(stages):
        for path, use in uses.leaves.items():
            own = solve.method_for(method, use)
            target = solve.target_for(own, use, stage.sparsity)
            name = f"stage {number}, {path}"
            own.pattern.check(use.layout.matrix_shape, target, name)
            if target is None:
                continue
            if target < before.get(path, 0.0) - 1e-6:
                raise ValueError(
                    f"{name}: sparsity {target:g} is below {before[path]:g} of the "
                    "stage before; a weight that was removed cannot come back, so the "
                    "sparsity must not fall"
                )
            before[path] = float(jnp.asarray(target))


def _check_growth(start: float, end: float, steps: int) -> None:
    numbers = all(isinstance(x, int | float | np.floating) for x in (start, end))
    if not numbers or not 0 <= start <= end <= 1:
        raise ValueError(
            f"sparsity from {start!r} to {end!r}: need fractions removed, 0 <= start "
            "<= end <= 1; a weight that was removed cannot come back"
        )
    arguments.count(steps, "steps", 1)
