"""Published configurations in one call."""

import dataclasses
from typing import Any

from flexhinm_jax import arguments
from flexhinm_jax.methods.hard_concrete import HardConcrete
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.patterns import FlexHiNM
from flexhinm_jax.training.schedules import Stage, cubic, stages


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
