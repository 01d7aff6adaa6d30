"""What `Vector`, `HiNM` and `FlexHiNM` share: regions of columns per tile of rows.

The three differ only in how many N:M groups a budget may turn into: none, all of it, or
whatever retains most.
"""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.ops import masks, regions
from flexhinm_jax.patterns.base import Pattern, check_n_of_m
from flexhinm_jax.types import Regions, Support


@dataclasses.dataclass(frozen=True)
class Tiled(Pattern):
    """Dense, N:M and pruned column vectors of `vector_size` rows.

    Attributes:
      vector_size: rows of a tile; divides the outputs of the weight.
    """

    vector_size: int = 32
    letters: ClassVar[dict[str, str]] = {"v": "vector_size", "n": "n", "m": "m"}

    #: Whether dense columns may exist, and whether they may turn into groups.
    has_dense: ClassVar[bool] = True
    has_groups: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        if not isinstance(self.vector_size, int) or self.vector_size < 1:
            raise ValueError(
                f"vector_size={self.vector_size}: need a positive integer, the rows "
                "of a tile"
            )
        n, m = self.n_of_m
        check_n_of_m(n, m)
        if self.has_groups and n == m:
            raise ValueError(f"n=m={m}: an N:M region must remove something")

    @property
    @abc.abstractmethod
    def n_of_m(self) -> tuple[int, int]:
        """(n, m) of the N:M region."""

    @abc.abstractmethod
    def groups(self, tiles: Array, k: Array) -> Array:
        """Number of N:M groups per tile for a budget of k column-equivalents.

        Args:
          tiles: scores [t, v, i].
          k: i32[], the budget.

        Returns:
          i32[], with n * groups <= k.
        """

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """The support with the exact budget; see the class for the regions it has."""
        del key
        if sparsity is None:
            self.check(scores.shape, None)
        n, m = self.n_of_m
        o, i = scores.shape
        k = self._whole(regions.budget(i, sparsity), i)
        if prev is not None:
            return self._shrink(scores, prev, k)
        out_order = jnp.arange(o, dtype=jnp.int32)
        tiles = regions.tile(scores, out_order, self.vector_size)
        h = self.groups(tiles, k)
        dense = k - n * h
        vectors = jnp.sum(tiles, axis=1, dtype=jnp.float32)
        in_order = regions.column_order(regions.ranked(vectors), dense, h, m)
        dense_end = jnp.full(in_order.shape[:1], dense, jnp.int32)
        nm_end = dense_end + m * h
        keep = regions.kept(tiles, in_order, dense_end, nm_end, n, m)
        return Support(
            masks.fold_tiles(keep, out_order),
            Regions(out_order, in_order, dense_end, nm_end, n, m),
        )

    def _whole(self, k: Array, columns: int) -> Array:
        """The budget in whole groups where nothing else can use it up."""
        n, m = self.n_of_m
        if self.has_dense:
            return k
        return jnp.minimum((k + n // 2) // n, columns // m) * n

    def _shrink(self, scores: Array, prev: Support, k: Array) -> Support:
        old = prev.regions
        assert old is not None
        n, m = self.n_of_m
        size = (old.nm_end[0] - old.dense_end[0]) // m
        k = jnp.minimum(k, old.dense_end[0] + n * size)
        tiles = regions.tile(scores, old.out_order, self.vector_size)
        keep, in_order, dense_end, nm_end = regions.shrink(
            tiles,
            regions.tile(prev.keep, old.out_order, self.vector_size),
            old.in_order,
            old.dense_end,
            old.nm_end,
            k,
            n,
            m,
            regroup=self.has_groups,
        )
        return Support(
            masks.fold_tiles(keep, old.out_order),
            Regions(old.out_order, in_order, dense_end, nm_end, n, m),
        )

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError unless m divides the inputs and v the outputs."""
        super().check_shape(shape, path)
        if self.has_groups:
            checks.divisible(shape[1], self.n_of_m[1], "in", "m", path)
        checks.divisible(shape[0], self.vector_size, "out", "vector_size", path)

    def sparsity_range(self) -> tuple[float, float]:
        """From dense, or from 1 - n / m without dense columns, to empty."""
        n, m = self.n_of_m
        return (0.0 if self.has_dense else 1 - n / m), 1.0

    def granularity(self, shape: tuple[int, int]) -> float:
        """One column vector, or one group where there are only groups."""
        return (1 if self.has_dense else self.n_of_m[0]) / shape[1]
