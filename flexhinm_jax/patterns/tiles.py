"""Rectangular tiles that are either dense or N:M (the hard form of PATCH).

PATCH (arXiv:2509.23410) reaches any sparsity between dense and N:M by keeping some
tiles dense. The published kernels want 128 x 128 tiles; any tile that divides works.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.ops import masks
from flexhinm_jax.patterns.base import Pattern
from flexhinm_jax.patterns.nm import NM
from flexhinm_jax.types import Regions, Support


@dataclasses.dataclass(frozen=True)
class Tiles(Pattern):
    """Keeps the tiles dense that would lose most under N:M, the others N:M.

    Attributes:
      tile: (rows, columns) of a tile, or one number for both; they divide the weight,
        and m divides the columns.
      inner: what a tile that is not dense keeps: N:M in natural order.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scores = jnp.array([[4.0, 3, 2, 1, 9, 1, 1, 1]])
      >>> pattern = Tiles(tile=(1, 4))
      >>> pattern.project(jax.random.key(0), scores, sparsity=0.25).keep.tolist()
      [[True, True, True, True, True, True, False, False]]
    """

    tile: int | tuple[int, int] = 128
    inner: NM = NM(2, 4)
    letters: ClassVar[dict[str, str]] = {"tile": "tile", "inner": "inner"}
    choices: ClassVar[dict[str, dict[str, Any]]] = {
        "inner": {f"{n}:{m}": NM(n, m) for n, m in ((1, 4), (2, 4), (2, 8), (4, 8))}
    }

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        sides = self.tile if isinstance(self.tile, tuple) else (self.tile,) * 2
        if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
            raise ValueError(
                f"tile={self.tile!r}: need one positive integer or (rows, columns)"
            )
        if type(self.inner) is not NM or self.inner.permute or self.inner.n >= self.m:
            raise ValueError(
                f"inner={self.inner!r}: need NM(n, m) with n < m in natural order"
            )
        if sides[1] % self.m:
            raise ValueError(
                f"tile={self.tile!r}: m={self.m} of inner={self.inner} does not divide "
                f"its {sides[1]} columns"
            )
        object.__setattr__(self, "tile", sides if sides[0] != sides[1] else sides[0])

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of a tile."""
        return self.tile if isinstance(self.tile, tuple) else (self.tile, self.tile)

    @property
    def n(self) -> int:
        """Kept per group of a tile that is not dense."""
        return self.inner.n

    @property
    def m(self) -> int:
        """Group size."""
        return self.inner.m

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """The support with the number of dense tiles nearest to the target.

        `key` is not used. With `prev` dense tiles may become N:M, never the reverse.
        """
        del key
        self.check(scores.shape, sparsity)
        checks.finite(scores, "scores")
        scores = jnp.asarray(scores, jnp.float32)
        before = jnp.ones(scores.shape, bool) if prev is None else prev.keep
        inner = masks.n_of_m(jnp.where(before, scores, -1.0), n=self.n, m=self.m)
        gain = self.tiles(jnp.where(before & ~inner, scores, 0.0))
        may = self.tiles(before).all(-1)
        gain = jnp.where(may, jnp.sum(gain, axis=-1), -1.0)
        count = jnp.minimum(self.dense_tiles(scores.shape, sparsity), jnp.sum(may))
        dense = masks.top_k(gain.reshape(-1), count).reshape(gain.shape)
        return self.support(dense, inner)

    def tiles(self, weight: Array) -> Array:
        """[o, i] as [rows of tiles, columns of tiles, weights of a tile]."""
        rows, columns = self.sides
        o, i = weight.shape
        cut = weight.reshape(o // rows, rows, i // columns, columns)
        return cut.swapaxes(1, 2).reshape(o // rows, i // columns, rows * columns)

    def spread(self, per_tile: Array) -> Array:
        """[rows of tiles, columns of tiles] as [o, i]."""
        rows, columns = self.sides
        return jnp.repeat(jnp.repeat(per_tile, rows, axis=0), columns, axis=1)

    def dense_tiles(
        self, shape: tuple[int, ...], sparsity: Array | float | None
    ) -> Array:
        """Number of dense tiles for a target: count * (1 - sparsity / (1 - n / m))."""
        rows, columns = self.sides
        count = (shape[0] // rows) * (shape[1] // columns)
        removed = jnp.asarray(sparsity, jnp.float32) / (1 - self.n / self.m)
        return jnp.round(count * (1 - removed)).astype(jnp.int32)

    def support(self, dense: Array, inner: Array) -> Support:
        """The support in which some tiles are dense and the others as given.

        Args:
          dense: bool[o / rows, i / columns].
          inner: bool[o, i], n of every m.

        Returns:
          Regions with one row tile per row of tiles: its dense columns in natural
          order, then the groups of the others.
        """
        rows, columns = self.sides
        o, i = inner.shape
        wide = jnp.repeat(dense, columns, axis=1)
        in_order = jnp.argsort(~wide, axis=1, stable=True).astype(jnp.int32)
        dense_end = jnp.sum(wide, axis=1, dtype=jnp.int32)
        return Support(
            inner | jnp.repeat(wide, rows, axis=0),
            Regions(
                out_order=jnp.arange(o, dtype=jnp.int32),
                in_order=in_order,
                dense_end=dense_end,
                nm_end=jnp.full((o // rows,), i, jnp.int32),
                n=self.n,
                m=self.m,
            ),
        )

    @property
    def form(self) -> tuple[int, int]:
        """(n, m) of the tiles that are not dense."""
        return self.n, self.m

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError unless the tile divides the weight."""
        super().check_shape(shape, path)
        rows, columns = self.sides
        checks.divisible(shape[0], rows, "out", "tile rows", path)
        checks.divisible(shape[1], columns, "in", "tile columns", path)

    def sparsity_range(self) -> tuple[float, float]:
        """From dense to N:M everywhere."""
        return 0.0, 1 - self.n / self.m

    def granularity(self, shape: tuple[int, int]) -> float:
        """One tile between dense and N:M."""
        rows, columns = self.sides
        return rows * columns / (shape[0] * shape[1]) * (1 - self.n / self.m)
