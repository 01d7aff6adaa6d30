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


def check_stages(
    given: Sequence[Stage], method: Method, params: Any, uses: Uses
) -> None:
    """Raises ValueError when some stage cannot be met, before any work.

    Args:
      given: the stages.
      method: the method, for its pattern.
      params: the parameter tree.
      uses: from `discover`.

    Raises:
      ValueError: no stage, a sparsity that falls, or one that a leaf's pattern cannot
        express; the message names the stage and the leaf.
    """
    check_method(method)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(
            f"stages is {arguments.shown(given)}: need a list of Stage(sparsity, "
            "steps); a recipe has it as recipe.stages"
        )
    for number, stage in enumerate(given):
        if not isinstance(stage, Stage):
            raise ValueError(
                f"stages[{number}] is {arguments.shown(stage)}: need "
                "Stage(sparsity, steps), such as Stage(0.5, 1000)"
            )
    if not given:
        raise ValueError("stages is empty: give at least one Stage(sparsity, steps)")
    Leaves.of(params).dense(uses)
    before: dict[str, float] = {}
    for number, stage in enumerate(given):
        for path, use in uses.leaves.items():
            mine = solve.method_for(method, use)
            target = solve.target_for(mine, use, stage.sparsity)
            name = f"stage {number}, {path}"
            mine.pattern.check(use.layout.matrix_shape, target, name)
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
