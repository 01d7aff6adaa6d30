"""Dense, N:M and pruned column vectors in every row tile (FlexHiNM).

FlexHiNM-GP, ICLR 2026 (openreview YaZraqRsbB). The paper moves the region boundaries by
a one-dimensional search with an adaptive step and stops when the retained saliency
falls; we evaluate every legal boundary and take the best, because the curve is not
always unimodal. The counts meet the budget exactly: with k = round(in * (1 - sparsity)),
a tile has D dense columns and h groups with D + n * h = k.
"""

import dataclasses

from jax import Array

from flexhinm_jax.ops import regions
from flexhinm_jax.patterns.tiled import Tiled


@dataclasses.dataclass(frozen=True)
class FlexHiNM(Tiled):
    """Splits the columns of every tile into dense, N:M and pruned ones.

    All tiles of a weight share the counts (D, h); which columns they are is the tile's
    own choice. At sparsity 0 everything is dense; without groups the result is that of
    `Vector`, without dense columns that of `HiNM`.

    Attributes:
      vector_size: rows of a tile; divides the outputs of the weight.
      n: kept per group of the N:M region.
      m: group size; divides the inputs of the weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scores = jnp.array([[9.0, 1, 2, 8], [9, 2, 1, 8]])
      >>> pattern = FlexHiNM(vector_size=2)
      >>> support = pattern.project(jax.random.key(0), scores, sparsity=0.75)
      >>> support.keep.tolist()
      [[True, False, False, False], [True, False, False, False]]
    """

    n: int = 2
    m: int = 4

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(n, m)."""
        return self.n, self.m

    def groups(self, tiles: Array, k: Array) -> Array:
        """The number of groups that retains most, by an exact scan."""
        return regions.scan_groups(tiles, k, self.n, self.m)[0]
