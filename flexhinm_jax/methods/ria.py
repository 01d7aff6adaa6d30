"""RIA: relative importance and activations.

Zhang et al. 2024 (ICLR, openreview Tr0lPx9woF). A weight counts relative to all weights
of its input and of its output, so no channel loses everything. The published channel
permutation is a pattern of ours: `RIA(NM(2, 4, permute=ChannelSearch()))`.
"""

import dataclasses
from typing import ClassVar, Literal

from jax import Array

from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.ops import saliency
from flexhinm_jax.types import Stats


@dataclasses.dataclass(frozen=True)
class RIA(ScoreMethod):
    """Scores (|w| / column sum + |w| / row sum) * ||x_j||^a.

    Attributes:
      pattern: the supports to choose from.
      a: exponent of the input norm.
    """

    _: dataclasses.KW_ONLY
    a: float = 0.5

    needs: ClassVar[Literal["nothing", "norms", "gram"]] = "norms"

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if not self.a >= 0:
            raise ValueError(f"a={self.a}: need an exponent >= 0")

    def score(self, w: Array, stats: Stats | None) -> Array:
        """Relative importance times activations, f32[o, i]."""
        assert stats is not None
        return saliency.relative_importance(w, stats.sq_norm, self.a)
