"""NoWag-P: the squared weight after normalising columns and rows, times input energy.

NoWag (arXiv:2504.14569). Unlike Wanda it counts a weight as its share of its input
channel and of its output row, so inputs with large weights do not crowd out the others.
"""

import dataclasses
from typing import ClassVar, Literal

from jax import Array

from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.ops import saliency
from flexhinm_jax.types import Stats


@dataclasses.dataclass(frozen=True)
class NoWagP(ScoreMethod):
    """Scores the normalised weight squared times the energy of its input.

    An input that never fired counts like the mean of the others; no weight moves.

    Attributes:
      pattern: the supports to choose from.
    """

    needs: ClassVar[Literal["nothing", "norms", "gram"]] = "norms"

    def score(self, w: Array, stats: Stats | None) -> Array:
        """`ops.proxy.score` with the input norms of the calibration data."""
        assert stats is not None
        return saliency.nowag(w, stats.sq_norm)
