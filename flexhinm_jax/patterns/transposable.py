"""Transposable N:M: n stay of every m along the inputs and along the outputs.

A mask whose transpose is N:M too speeds up the forward product and the gradient of the
inputs with the same zeros. TSENOR (arXiv:2505.23949) solves every m x m tile by optimal
transport; see `ops.transport` for our version of it.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.ops import regions, transport
from flexhinm_jax.patterns.base import Grouped, Units
from flexhinm_jax.types import Support


@dataclasses.dataclass(frozen=True)
class Transposable(Grouped):
    """Keeps n weights in every row and every column of every m x m tile.

    m <= 4 is solved exactly, larger tiles to about 0.01 % of the best score. It packs
    like N:M in natural order.

    Attributes:
      n: kept per group, below m.
      m: side of a tile; divides the inputs and the outputs of the weight.
      exchanges: steps of the local search after rounding.
      stages: (k, sweeps) of the entropic solver: temperature mean score / k.
    """

    exchanges: int = 8
    stages: transport.Stages = transport.ACCURATE
    letters: ClassVar[dict[str, str]] = {"n": "n", "m": "m", "e": "exchanges"}
    free_rows: ClassVar[bool] = False

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        whole = isinstance(self.n, int) and isinstance(self.m, int)
        if not (whole and 0 < self.n < self.m):
            raise ValueError(
                f"n={self.n!r}, m={self.m!r}: need integers with 0 < n < m (n stay of "
                "m in every row and column)"
            )
        if self.exchanges < 0:
            raise ValueError(f"exchanges={self.exchanges}: need 0 or more")
        pairs = self.stages and all(
            isinstance(stage, tuple) and len(stage) == 2 for stage in self.stages
        )
        if not pairs or any(k <= 0 or sweeps < 1 for k, sweeps in self.stages):
            raise ValueError(
                f"stages={self.stages}: need (k, sweeps) pairs with k > 0, sweeps >= 1"
            )

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """Solves every tile; `key` and `sparsity` are not used.

        With `prev` the support is `prev`: there is no smaller one of the same pattern.
        """
        del key, sparsity
        self.check_shape(jnp.shape(scores))
        if prev is not None:
            return prev
        groups = regions.natural_groups(scores.shape, self.n, self.m)
        return Support(self._masks(scores), groups)

    def refine(self, support: Support, scores: Array) -> Support:
        """Solves again; a tile that would score less keeps its mask.

        The comparison makes iterations converge although the solver is approximate.
        """
        fresh = self._masks(scores)
        kept = lambda keep: jnp.sum(  # noqa: E731
            transport.tiles(jnp.where(keep, scores, 0), self.m), axis=(1, 2)
        )
        better = kept(fresh) >= kept(support.keep)
        tiles = jnp.where(
            better[:, None, None],
            transport.tiles(fresh, self.m),
            transport.tiles(support.keep, self.m),
        )
        keep = transport.untile(tiles, scores.shape)
        return Support(keep, support.regions)

    def choose(self, scores: Array, n: int, m: int) -> Array:
        """The best masks of one column of tiles; n and m are the pattern's own."""
        del n, m
        return self._masks(scores)

    def soft(self, scores: Array, k: float | Array = 20.0, sweeps: int = 50) -> Array:
        """A relaxed mask for training, differentiable in the scores.

        Args:
          scores: [o, i], non-negative.
          k: hardness; mean score of a tile over the temperature.
          sweeps: sweeps of the solver.

        Returns:
          f32[o, i] in [0, 1], row and column sums near n in every tile.
        """
        plan = transport.soft(
            transport.tiles(scores, self.m), n=self.n, k=k, sweeps=sweeps
        )
        return transport.untile(plan, scores.shape)

    def certificate(self, scores: Array, keep: Array) -> Array:
        """How far a support can be from the best one, by weak duality.

        Args:
          scores: f32[o, i], non-negative.
          keep: bool[o, i], a support of this pattern.

        Returns:
          f32[]: at most this share of the best score is lost.
        """
        solution = transport.solve(
            transport.tiles(scores, self.m),
            n=self.n,
            stages=self.stages,
            exchanges=0,
            certify=True,
        )
        assert solution.bound is not None
        best = jnp.sum(solution.bound)
        kept = jnp.sum(jnp.where(keep, scores, 0), dtype=jnp.float32)
        return jnp.where(best > 0, 1 - kept / jnp.where(best > 0, best, 1), 0.0)

    def _masks(self, scores: Array) -> Array:
        solution = transport.solve(
            transport.tiles(scores, self.m),
            n=self.n,
            stages=self.stages,
            exchanges=self.exchanges,
        )
        return transport.untile(solution.keep, scores.shape)

    def units(self) -> Units:
        """Tiles of m x m."""
        return Units(self.m, self.m)

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError unless m divides inputs and outputs."""
        super().check_shape(shape, path)
        checks.divisible(shape[0], self.m, "out", "m", path)
