"""The ways to prune that the programs compare: a method and when it prunes.

Every recipe gets the same dense model, the same number of further steps and the same
score, the absolute value; they differ in the pattern, the search of the orders, and in
whether the masks are learned.
"""

import dataclasses

import optax

import flexhinm_jax as fh
from flexhinm_jax.methods import LearnedMethod
from train.lab import optimizers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the comparison.

    Attributes:
      title: for tables.
      method: None trains on without pruning.
      stages: how often the sparsity rises, to the target with the last: 1 prunes at
        once. Stages rise along the cubic of Zhu and Gupta 2017 (arXiv:1710.01878).
      pruning: fraction of the steps until the last choice is made: the last stage ends
        there, open gates harden, and the rest trains under fixed masks.
      mask_rate: learning rate of what the method learns.
      mask_optimizer: of what the method learns.
    """

    title: str
    method: fh.Method | None
    stages: int = 1
    pruning: float = 0.7
    mask_rate: float = 0.02
    mask_optimizer: optimizers.Name = "adam"

    def __post_init__(self):
        """Validates the schedule."""
        if self.stages < 1 or not 0 < self.pruning <= 1:
            raise ValueError(
                f"stages={self.stages}, pruning={self.pruning}: need at least one "
                "stage and a fraction of the steps in (0, 1]"
            )
        optimizers.check(self.mask_optimizer)

    def mask_tx(self) -> optax.GradientTransformation:
        """The optimiser of what the method learns; its first axis is the lanes."""
        tx = optimizers.make(self.mask_optimizer, self.mask_rate)
        return optimizers.lanewise(tx)

    def stages_of(self, steps: int, target: float) -> tuple[list[fh.Stage], int]:
        """The stages of a method, and the steps under fixed masks after them.

        Args:
          steps: of the whole run.
          target: the last sparsity.
        """
        assert self.method is not None
        low = self.method.pattern.sparsity_range()[0]
        end = min(steps, max(self.stages, int(self.pruning * steps)))
        begins = [k * end // self.stages for k in range(self.stages)]
        last = end if isinstance(self.method, LearnedMethod) else steps
        stages = []
        for k, (begin, then) in enumerate(
            zip(begins, [*begins[1:], last], strict=True)
        ):
            value = target * (1 - (1 - (k + 1) / self.stages) ** 3)
            stages.append(fh.Stage(min(target, max(low, value)), then - begin))
        return stages, steps - last


def noiseless(pattern: fh.Pattern) -> Recipe:
    """Gates that are not sampled, and move where their gradient is large.

    Source: train/LOG.md, where they are the first gates to beat fixed masks.
    """
    method = fh.HardConcrete(
        pattern,
        start=0.5,
        temperature=(0.5, 0.1),
        sparsity_weight=0.0,
        relaxation="expected",
    )
    return Recipe(
        "FlexHiNM-GP without noise",
        method,
        pruning=0.5,
        mask_rate=0.003,
        mask_optimizer="relative",
    )


def recipes(vector_size: int = 32) -> dict[str, Recipe]:
    """All recipes by name.

    Args:
      vector_size: rows of a tile of HiNM and FlexHiNM.
    """
    hinm = [
        fh.Magnitude(fh.HiNM(vector_size, permute=permute))
        for permute in (None, fh.RandomRows(), fh.Gyro())
    ]
    flex = fh.FlexHiNM(vector_size)
    return {
        "dense": Recipe("dense", None),
        "unstructured": Recipe(
            "unstructured, gradual", fh.Magnitude(fh.Unstructured()), stages=10
        ),
        "hinm": Recipe("HiNM, no permutation", hinm[0]),
        "hinm_random": Recipe("HiNM, random rows (control)", hinm[1]),
        "hinm_gyro": Recipe("HiNM + Gyro", hinm[2]),
        "flexhinm_gyro": Recipe("FlexHiNM + Gyro", fh.Magnitude(flex)),
        "flexhinm_gp": Recipe(
            "FlexHiNM-GP (Hard Concrete)", fh.HardConcrete(flex), pruning=0.3
        ),
        "flexhinm_noiseless": noiseless(flex),
        "flexhinm_gumbel": Recipe(
            "FlexHiNM + Gumbel", fh.GumbelPatterns(flex), pruning=0.3
        ),
    }
