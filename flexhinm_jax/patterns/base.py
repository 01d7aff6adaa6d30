"""The contract of a pattern: which supports are allowed, and the best one for scores.

A pattern is a frozen, hashable configuration: it travels as a static argument, so a new
sparsity or new data never retraces. `project` works on one matrix and is pure; stacks
are vmapped.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array

from flexhinm_jax import arguments, checks
from flexhinm_jax.ops import masks, regions
from flexhinm_jax.types import Support


class Units(NamedTuple):
    """Rows and columns of a weight that a shard may not part.

    Attributes:
      rows: a shard holds a multiple of so many outputs; None for all of them.
      columns: the same of the inputs.
      row_part: what is split otherwise, with its article.
      column_part: the same of the inputs.
    """

    rows: int | None
    columns: int | None
    row_part: str = "a group"
    column_part: str = "a group"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """What a layer gains by keeping more: units that choose one of a few levels.

    Attributes:
      scores: f32[levels, units], what a unit keeps at a level, rising with the level;
        the gain per weight never rises from one level to the next.
      kept: weights that a unit keeps at a level, rising. When the units hold more
        weights than the layer, the last one is that much smaller.
    """

    scores: Array
    kept: tuple[float, ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """A family of supports."""

    #: Letter by which `parse` knows a field: {"v": "vector_size"}.
    letters: ClassVar[dict[str, str]] = {}

    #: Values of fields that are no numbers, by the name `parse` knows them by:
    #: {"permute": {"none": None, "gyro": Gyro()}}.
    choices: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self):
        """Validates the types of the fields."""
        arguments.configuration(self)

    def __str__(self) -> str:
        """The class with its numbers, and other fields that are not the default."""
        shown = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if isinstance(f.default, int)
            and not isinstance(f.default, bool)
            or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @abc.abstractmethod
    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """The best support of this pattern for the given scores.

        Args:
          key: PRNG key, consumed by patterns that search an order by sampling.
          scores: f32[o, i], non-negative; larger stays.
          sparsity: fraction of weights removed, in `sparsity_range`; may be traced.
          prev: a support of this pattern; the result keeps nothing that it removed.

        Returns:
          The support; not differentiable.
        """

    #: Whether every row may choose its weights without looking at other rows.
    free_rows: ClassVar[bool] = True

    #: Whether every input is in a group, along one order that all rows share, and every
    #: row may choose its n of m: what `Stats.order` can order.
    one_order: ClassVar[bool] = False

    #: Whether `regroup` finds columns and orders for weights that have moved.
    regroups: ClassVar[bool] = False

    def natural(self) -> "Pattern":
        """The same pattern without a search of the order of rows or columns."""
        return self

    def regroup(self, key: Array, support: Support, scores: Array) -> Support:
        """Re-chooses columns and their order; rows and sizes of regions stay.

        Args:
          key: consumed.
          support: a support of this pattern.
          scores: f32[o, i], non-negative; larger stays.

        Returns:
          The support with its columns chosen for these scores; the given one where
          `regroups` is False.
        """
        del key, scores
        return support

    def refine(self, support: Support, scores: Array) -> Support:
        """Re-chooses weights where the structure of a support leaves a choice.

        Orders and regions stay, dense and pruned columns stay, the n of every m inside
        the groups are chosen again: what methods that move weights iterate.

        Args:
          support: a support of this pattern.
          scores: f32[o, i], non-negative; larger stays.

        Returns:
          A support with the same regions, scoring no less than the given one.
        """
        old = support.regions
        assert old is not None
        rows = scores.shape[0] // old.in_order.shape[0]
        keep = regions.kept(
            regions.tile(scores, old.out_order, rows),
            old.in_order,
            old.dense_end,
            old.nm_end,
            old.n,
            old.m,
        )
        return Support(masks.fold_tiles(keep, old.out_order), old)

    def choose(self, scores: Array, n: int, m: int) -> Array:
        """The best support of one group of m columns.

        Args:
          scores: f32[r, m], non-negative; the rows of one tile.
          n: kept of m, as the regions of the support say.
          m: group size.

        Returns:
          bool[r, m].
        """
        return masks.n_of_m(scores, n=n, m=m)

    @abc.abstractmethod
    def sparsity_range(self) -> tuple[float, float]:
        """Smallest and largest sparsity the pattern can express, fractions."""

    @abc.abstractmethod
    def granularity(self, shape: tuple[int, int]) -> float:
        """Step of the kept fraction: what one group, vector or weight changes."""

    @property
    def form(self) -> tuple[int, int] | None:
        """(n, m) of its groups, n stay of m; None for a pattern without groups."""
        return None

    def units(self) -> Units:
        """What has to stay together when a weight is sharded: all, unless it says."""
        return Units(None, None)

    def levels(self, scores: Array) -> Levels | None:
        """What a weight gains by keeping more, for budgets shared between layers.

        Args:
          scores: f32[o, i], non-negative; rows of several matrices below each other
            when they are to share a sparsity.

        Returns:
          The units with their levels, pure and traceable in `scores`; None for a
          pattern with one sparsity, or where it is not known.
        """
        del scores
        return None

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError when a matrix of this shape cannot have the pattern.

        Args:
          shape: (o, i).
          path: leaf path for the message.
        """
        checks.matrix(shape, path)

    def check(
        self, shape: tuple[int, ...], sparsity: Any = None, path: str = "weight"
    ) -> None:
        """Raises ValueError when shape or target do not fit the pattern.

        Args:
          shape: (o, i).
          sparsity: the target, or None for a pattern that has only one.
          path: leaf path for the message.
        """
        self.check_shape(shape, path)
        checks.sparsity(sparsity, *self.sparsity_range(), self, path)


@dataclasses.dataclass(frozen=True)
class Grouped(Pattern):
    """n of every m consecutive inputs stay, and nothing else goes.

    Attributes:
      n: kept per group.
      m: group size; divides the inputs of the weight.
    """

    n: int = 2
    m: int = 4

    @property
    def form(self) -> tuple[int, int]:
        """(n, m)."""
        return self.n, self.m

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError unless m divides the inputs."""
        super().check_shape(shape, path)
        checks.divisible(shape[1], self.m, "in", "m", path)

    def sparsity_range(self) -> tuple[float, float]:
        """Only 1 - n / m."""
        return 1 - self.n / self.m, 1 - self.n / self.m

    def granularity(self, shape: tuple[int, int]) -> float:
        """One weight of a group: the kept fraction is n / m exactly."""
        return 1 / shape[1]


def check_n_of_m(n: int, m: int) -> None:
    """Raises ValueError unless 0 < n <= m, both integers."""
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
        raise ValueError(
            f"n={n!r}, m={m!r}: need integers with 0 < n <= m (n stay of m)"
        )
