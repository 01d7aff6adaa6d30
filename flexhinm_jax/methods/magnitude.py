"""Keeps the largest weights: the baseline every method is compared with."""

import dataclasses

from jax import Array

from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.ops import saliency
from flexhinm_jax.types import Stats


@dataclasses.dataclass(frozen=True)
class Magnitude(ScoreMethod):
    """Scores |w|; needs no calibration.

    Attributes:
      pattern: the supports to choose from.
    """

    def score(self, w: Array, stats: Stats | None) -> Array:
        """|w|, f32[o, i]."""
        del stats
        return saliency.magnitude(w)
