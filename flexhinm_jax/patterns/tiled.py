"""What `Vector`, `HiNM` and `FlexHiNM` share: regions of columns per tile of rows.

The three differ only in how many N:M groups a budget may turn into: none, all of it, or
whatever retains most.
"""

import abc
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax import checks
from flexhinm_jax.ops import masks, regions
from flexhinm_jax.patterns.base import Levels, Pattern, Units, check_n_of_m
from flexhinm_jax.patterns.permute import PERMUTES, ChannelSearch
from flexhinm_jax.types import Support

#: Columns that one tensor-core instruction reads: mma.sp m16n8k32 and mma m16n8k16.
NM_TILE, DENSE_TILE = 32, 16


@dataclasses.dataclass(frozen=True)
class Tiled(Pattern):
    """Dense, N:M and pruned column vectors of `vector_size` rows.

    Attributes:
      vector_size: rows of a tile; divides the outputs of the weight.
    """

    vector_size: int = 32
    letters: ClassVar[dict[str, str]] = {
        "v": "vector_size",
        "n": "n",
        "m": "m",
        "permute": "permute",
        "hardware": "hardware",
    }
    choices: ClassVar[dict[str, dict[str, Any]]] = {
        "permute": PERMUTES,
        "hardware": {"yes": True, "no": False},
    }

    #: Whether dense columns may exist, and whether they may turn into groups.
    has_dense: ClassVar[bool] = True
    has_groups: ClassVar[bool] = True

    #: Times that the boundaries are chosen and the rows searched for them.
    rounds: ClassVar[int] = 1

    if TYPE_CHECKING:
        # Fields of the subclasses, after n and m. At run time even a ClassVar here
        # would fix their position among the arguments.
        permute: ClassVar[ChannelSearch | None]
        hardware: ClassVar[bool]

    def __post_init__(self):
        """Validates the configuration."""
        if not isinstance(self.vector_size, int) or self.vector_size < 1:
            raise ValueError(
                f"vector_size={self.vector_size!r}: need a positive integer, the rows "
                "of a tile"
            )
        super().__post_init__()
        n, m = self.n_of_m
        check_n_of_m(n, m)
        if self.has_groups and n == m:
            raise ValueError(
                f"n=m={m}: an N:M region must remove something; give n < m"
            )
        if not isinstance(self.permute, ChannelSearch | None):
            raise ValueError(
                f"permute={self.permute!r}: need Gyro(), ChannelSearch(), RandomRows() "
                "or None"
            )

    def tile_rows(self, outputs: int) -> int:
        """Rows of a tile of a weight with so many outputs."""
        del outputs
        return self.vector_size

    def natural(self) -> Pattern:
        """Natural rows, columns dealt to groups by strength."""
        return dataclasses.replace(self, permute=None)  # type: ignore[call-arg]

    @property
    def regroups(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where there are groups."""
        return self.has_groups

    def regroup(self, key: Array, support: Support, scores: Array) -> Support:
        """The best columns by score, dealt to groups and searched."""
        old = support.regions
        assert old is not None
        n, m = old.n, old.m
        tiles = regions.tile(scores, old.out_order, self.tile_rows(len(scores)))
        dense = old.dense_end[0]
        groups = (old.nm_end[0] - dense) // m
        columns = self.strongest(tiles, dense, groups)
        if self.permute is not None:
            columns = self.permute.columns(key, tiles, columns)
        keep = regions.kept(tiles, columns.order, old.dense_end, old.nm_end, n, m)
        chosen = dataclasses.replace(old, in_order=columns.order)
        return Support(masks.fold_tiles(keep, old.out_order), chosen)

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
          i32[], a multiple of `group_step`, with n * groups <= k.
        """

    @property
    def group_step(self) -> int:
        """Legal numbers of groups are multiples of this."""
        n, m = self.n_of_m
        if not self.hardware or not self.has_groups:
            return 1
        return math.lcm(
            NM_TILE // math.gcd(NM_TILE, m), DENSE_TILE // math.gcd(DENSE_TILE, n)
        )

    @property
    def dense_step(self) -> int:
        """Legal numbers of dense columns are multiples of this."""
        return DENSE_TILE if self.hardware else 1

    @property
    def budget_step(self) -> int:
        """Legal budgets, in column-equivalents, are multiples of this."""
        whole = self.n_of_m[0] * self.group_step
        if not self.has_dense:
            return whole
        if not self.hardware:
            return 1
        return whole if self.has_groups else DENSE_TILE

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """The support with the exact budget; see the class for the regions it has."""
        self.check(scores.shape, sparsity)
        checks.finite(scores, "scores")
        if sparsity is None:
            sparsity = 0.0  # not read: `check` lets it pass only with fixed counts
        # explicit dtypes: a weakly typed argument would trace a second time
        scores, sparsity = (jnp.asarray(x, jnp.float32) for x in (scores, sparsity))
        return self._project(key, scores, sparsity, prev)

    @functools.partial(jax.jit, static_argnums=0)
    def _project(self, key, scores, sparsity, prev):
        n, m = self.n_of_m
        o, i = scores.shape
        k = self.budget(i, sparsity)
        if prev is not None:
            return self._shrink(scores, prev, k)
        rows = self.tile_rows(o)
        row_key, column_key = jax.random.split(key)
        if self.permute is not None and self.permute.searches_rows and rows < o:
            out_order, columns = self._rows(row_key, scores, k)
            tiles = regions.tile(scores, out_order, rows)
        else:
            out_order = jnp.arange(o, dtype=jnp.int32)
            tiles = regions.tile(scores, out_order, rows)
            columns = self.divide(tiles, k)
        columns = self.columns(column_key, tiles, k, columns)
        chosen = columns.regions(out_order)
        keep = regions.kept(
            tiles, chosen.in_order, chosen.dense_end, chosen.nm_end, n, m
        )
        return Support(masks.fold_tiles(keep, out_order), chosen)

    def divide(self, tiles: Array, k: Array) -> regions.Columns:
        """Columns by strength into dense, dealt groups and pruned ones.

        Args:
          tiles: scores [t, v, i].
          k: i32[], the budget.
        """
        h = self.groups(tiles, k)
        return self.strongest(tiles, k - self.n_of_m[0] * h, h)

    def strongest(self, tiles: Array, dense: Array, h: Array) -> regions.Columns:
        """The strongest columns dense, the next ones dealt to groups.

        Args:
          tiles: scores [t, v, i].
          dense: i32[], dense columns.
          h: i32[], groups.
        """
        n, m = self.n_of_m
        rank = regions.ranked(jnp.sum(tiles, axis=1, dtype=jnp.float32))
        order = regions.column_order(rank, dense, h, m)
        return regions.Columns(order, dense, h, n, m)

    def columns(
        self, key: Array, tiles: Array, k: Array, columns: regions.Columns
    ) -> regions.Columns:
        """Searches the input order of every tile.

        Args:
          key: consumed.
          tiles: scores [t, v, i].
          k: i32[], the budget.
          columns: the start.
        """
        del k
        if self.permute is None or not self.has_groups:
            return columns
        return self.permute.columns(key, tiles, columns)

    def _rows(self, key, scores, k):
        """Searches the rows of the tiles; keeps natural ones where they retain more."""
        permute, v, (n, m) = self.permute, self.vector_size, self.n_of_m
        assert permute is not None
        o, i = scores.shape
        natural = jnp.arange(o, dtype=jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        none = regions.Columns(jnp.zeros((o // v, i), jnp.int32), zero, zero, n, m)

        def divide_then_search(state, step):
            key, searches = step
            out_order, best, best_worth = state
            tiles = regions.tile(scores, out_order, v)
            columns = self.divide(tiles, k)
            worth = regions.value(tiles, columns)
            better = worth > best_worth
            if not permute.never_worse:
                better = jnp.ones_like(better)
            divided = out_order, columns
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), divided, best)
            best_worth = jnp.where(better, worth, best_worth)

            def search():
                table = out_order.reshape(-1, v)
                dense, nm = columns.dense, m * columns.h
                return permute.rows(key, scores, table, dense, nm, self.rounds).ravel()

            out_order = lax.cond(searches, search, lambda: out_order)
            return (out_order, best, best_worth), None

        # One loop over natural and searched rows: XLA compiles what stands in two
        # places twice. The last rows are divided and not searched further.
        keys = jax.random.split(key, self.rounds + 1)
        searches = jnp.arange(self.rounds + 1, dtype=jnp.int32) < self.rounds
        worst = jnp.asarray(-jnp.inf, jnp.float32)
        start = natural, (natural, none), worst
        return lax.scan(divide_then_search, start, (keys, searches))[0][1]

    def budget(self, columns: int, sparsity: Array) -> Array:
        """Column-equivalents that stay, in whole steps of what the regions allow.

        Args:
          columns: inputs of the weight.
          sparsity: f32[], fraction removed.

        Returns:
          i32[].
        """
        k, step = regions.budget(columns, sparsity), self.budget_step
        if step == 1:
            return k
        n, m = self.n_of_m
        most = columns if self.has_dense else columns // m * n
        return jnp.minimum((k + step // 2) // step, most // step) * step

    def _shrink(self, scores: Array, prev: Support, k: Array) -> Support:
        old = prev.regions
        assert old is not None
        size = (old.nm_end[0] - old.dense_end[0]) // old.m
        k = jnp.minimum(k, old.dense_end[0] + old.n * size)
        return regions.shrink(scores, prev, k, self.steps)

    @property
    def steps(self) -> regions.Steps:
        """The counts of columns that are legal."""
        return regions.Steps(self.group_step, self.dense_step, self.has_groups)

    @property
    def form(self) -> tuple[int, int] | None:
        """(n, m) of the N:M region, where the pattern has one."""
        return self.n_of_m if self.has_groups else None

    def units(self) -> Units:
        """Tiles of rows, which gather their columns from everywhere.

        A searched row order puts rows of all shards into one tile.
        """
        rows = self.vector_size if self.permute is None else None
        return Units(rows, None, "a vector", "a tile")

    def levels(self, scores: Array) -> Levels | None:
        """Column vectors under N:M, among their neighbours in strength, and dense."""
        v, (n, m) = self.tile_rows(len(scores)), self.n_of_m
        scores = scores.astype(jnp.float32)
        dense = masks.vectors(scores, v).ravel()
        if not self.has_groups:
            return Levels(dense[None], (float(v),))
        tiles = scores.reshape(-1, v, scores.shape[-1])
        tile_count, columns = len(tiles), scores.shape[1]
        zero, whole = jnp.zeros((), jnp.int32), jnp.asarray(columns // m, jnp.int32)
        strength = regions.ranked(jnp.sum(tiles, axis=1))
        order = regions.column_order(strength, zero, whole, m)
        none = jnp.zeros(tile_count, jnp.int32)
        keep = regions.kept(tiles, order, none, none + columns, n, m)
        grouped = jnp.sum(jnp.where(keep, tiles, 0), axis=1).ravel()
        # A vector keeps at least its fair share, so gains per weight diminish.
        grouped = jnp.clip(grouped, dense * (n / m), dense)
        if not self.has_dense:
            return Levels(grouped[None], (v * n / m,))
        return Levels(jnp.stack([grouped, dense]), (v * n / m, float(v)))

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError unless m divides the inputs and v the outputs."""
        super().check_shape(shape, path)
        if self.has_groups:
            checks.divisible(shape[1], self.n_of_m[1], "in", "m", path)
        if self.hardware:
            checks.divisible(shape[1], NM_TILE, "in", "hardware tile", path)
        rows = self.tile_rows(shape[0])
        checks.divisible(shape[0], rows, "out", "vector_size", path)

    def sparsity_range(self) -> tuple[float, float]:
        """From dense, or from 1 - n / m without dense columns, to empty."""
        n, m = self.n_of_m
        return (0.0 if self.has_dense else 1 - n / m), 1.0

    def granularity(self, shape: tuple[int, int]) -> float:
        """One column vector, or one group where there are only groups."""
        return self.budget_step / shape[1]
