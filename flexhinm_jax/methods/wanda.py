"""Wanda: weight magnitude times input norm, one shot, weights unmoved.

In a sequential pass it judges by the inputs that the dense weights of a block give, as
published: 2:4 of SmolLM2-135M has 158.8 so, 174.5 on what the pruned ones give.

Sun et al. 2023 (arXiv:2306.11695). The paper compares unstructured scores within one
output; use `Wanda(Unstructured(scope="row"))` for that.
"""

import dataclasses
from typing import ClassVar, Literal

from jax import Array

from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.ops import saliency
from flexhinm_jax.types import Stats


@dataclasses.dataclass(frozen=True)
class Wanda(ScoreMethod):
    """Scores |w_ij| * ||x_j||_2 over the calibration tokens.

    Attributes:
      pattern: the supports to choose from.
    """

    needs: ClassVar[Literal["nothing", "norms", "gram"]] = "norms"
    statistics: ClassVar[Literal["sequential", "block"]] = "block"

    def score(self, w: Array, stats: Stats | None) -> Array:
        """|w_ij| * ||x_j||_2, f32[o, i]."""
        assert stats is not None
        return saliency.wanda(w, stats.sq_norm)
