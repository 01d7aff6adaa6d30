"""Any weight may go: the baseline that structured patterns are compared with."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.ops import masks
from flexhinm_jax.patterns.base import Levels, Pattern, Units
from flexhinm_jax.types import Support

#: Runs of sorted scores that a layer offers to a shared budget.
MAX_RUNS = 1 << 14


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Keeps the largest scores wherever they are.

    The support has no regions, so `pack` leaves such a weight dense and says so.

    Attributes:
      scope: "layer" compares all scores of the matrix, "row" those of one output.
    """

    scope: Literal["layer", "row"] = "layer"

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.scope not in ("layer", "row"):
            raise ValueError(f"scope={self.scope!r}: choose 'layer' or 'row'")

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """Keeps round(count * (1 - sparsity)) scores per scope; `key` is not used."""
        del key
        self.check(scores.shape, sparsity)
        if prev is not None:
            scores = jnp.where(prev.keep, scores, -jnp.inf)
        rows = scores if self.scope == "row" else scores.reshape(1, -1)
        dense = rows.shape[-1] * (1.0 - jnp.asarray(sparsity, jnp.float32))
        keep = masks.top_k(rows, jnp.round(dense).astype(jnp.int32))
        keep = keep.reshape(scores.shape)
        return Support(keep if prev is None else keep & prev.keep)

    def refine(self, support: Support, scores: Array) -> Support:
        """Keeps as many as the given support, per row or layer, chosen anew."""
        rows = (scores.shape[0], -1) if self.scope == "row" else (1, -1)
        count = jnp.sum(support.keep.reshape(rows), axis=1, dtype=jnp.int32)
        keep = masks.top_k(scores.reshape(rows), count[:, None])
        return Support(keep.reshape(scores.shape))

    def units(self) -> Units:
        """Single weights, or whole rows where they are compared within a row."""
        return Units(1, 1 if self.scope == "layer" else None)

    def levels(self, scores: Array) -> Levels:
        """Runs of the sorted scores, at most `MAX_RUNS`, that stay or go."""
        scores = scores.astype(jnp.float32)
        each = -(-scores.size // MAX_RUNS)
        falling = jnp.pad(-jnp.sort(-scores.ravel()), (0, -scores.size % each))
        runs = jnp.sum(falling.reshape(-1, each), axis=1)
        return Levels(runs[None], (float(each),))

    def sparsity_range(self) -> tuple[float, float]:
        """Anything from dense to empty."""
        return 0.0, 1.0

    def granularity(self, shape: tuple[int, int]) -> float:
        """One weight of the scope."""
        return 1 / (shape[1] if self.scope == "row" else shape[0] * shape[1])
