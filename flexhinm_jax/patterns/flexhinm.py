"""Dense, N:M and pruned column vectors in every row tile (FlexHiNM).

FlexHiNM-GP, ICLR 2026 (openreview YaZraqRsbB). The paper moves the region boundaries by
a one-dimensional search with an adaptive step and stops when the retained saliency
falls; we evaluate every legal boundary and take the best, because the curve is not
always unimodal. The counts meet the budget exactly: with k = round(in * (1 -
sparsity)), a tile has D dense columns and h groups with D + n * h = k.

Spense (SpenseGPT, arXiv:2606.10445) splits a matrix into a 2:4 and a dense part, for
libraries that multiply with each: no pruned columns, one boundary for all rows. That is
`FlexHiNM(regions="dense+nm", boundary="matrix")`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.ops import regions
from flexhinm_jax.ops.regions import Columns, Steps
from flexhinm_jax.patterns.base import Levels, Units
from flexhinm_jax.patterns.permute import PERMUTES, ChannelSearch, Gyro
from flexhinm_jax.patterns.tiled import Tiled

REGIONS = ("exact", "search", "absorb", "dense+nm")
BOUNDARIES = ("tile", "matrix")


@dataclasses.dataclass(frozen=True)
class FlexHiNM(Tiled):
    """Splits the columns of every tile into dense, N:M and pruned ones.

    All tiles of a weight share the counts (D, h); which columns they are is the tile's
    own choice. At sparsity 0 everything is dense; without groups the result is that of
    `Vector`, without dense columns that of `HiNM`.

    What to expect: n dense and m - n pruned columns can always share a group that keeps
    at least as much (`ops.regions.absorb`). So from sparsity 1 - n / m on (50 % for
    2:4) three regions cannot retain more than `HiNM` with the best input order, and
    with `permute=Gyro()` the two agree to search noise. Regions help below that
    sparsity, where HiNM does not exist; a little without permutation, where columns
    dealt to groups by strength already give `HiNM` most of the gain; and at run time,
    because a dense column gathers half the activations of the group in its place.

    Attributes:
      vector_size: rows of a tile; divides the outputs of the weight.
      n: kept per group of the N:M region.
      m: group size; divides the inputs of the weight.
      permute: search of the row and column orders; None for natural rows with the
        columns dealt to groups by strength. The boundaries are chosen for the natural
        and twice for the searched rows, and the best is kept.
      regions: how the boundaries are chosen. "exact" evaluates every one; "search" is
        the paper's walk, which stops at the first drop; "absorb" starts from "exact",
        merges dense and pruned columns into groups and searches on: never below "exact"
        nor below no dense columns at all. "dense+nm" prunes no column, so the sparsity,
        at most 1 - n / m, says how many are dense. A pair (dense, nm) fixes the columns
        of both regions, and with them the sparsity.
      hardware: keep multiples of 32 N:M and of 16 dense columns.
      boundary: "tile" lets every tile choose its columns; "matrix" makes one tile of
        all rows, whatever `vector_size` is: one choice of columns, one gather of
        activations for the whole product, and no row order to search.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scores = jnp.array([[9.0, 1, 2, 8], [9, 2, 1, 8]])
      >>> pattern = FlexHiNM(vector_size=2, permute=None)
      >>> support = pattern.project(jax.random.key(0), scores, sparsity=0.75)
      >>> support.keep.tolist()
      [[True, False, False, False], [True, False, False, False]]
    """

    n: int = 2
    m: int = 4
    permute: ChannelSearch | None = Gyro()
    regions: Literal["exact", "search", "absorb", "dense+nm"] | tuple[int, int] = (
        "exact"
    )
    hardware: bool = False
    boundary: Literal["tile", "matrix"] = "tile"
    letters: ClassVar[dict[str, str]] = Tiled.letters | {
        "regions": "regions",
        "boundary": "boundary",
    }
    choices: ClassVar[dict[str, dict[str, Any]]] = {
        "permute": PERMUTES,
        "hardware": {"yes": True, "no": False},
        "regions": {name: name for name in REGIONS},
        "boundary": {name: name for name in BOUNDARIES},
    }
    rounds = 2

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if isinstance(self.regions, tuple):
            dense, nm = self.regions
            steps = self.dense_step, self.m * self.group_step
            if dense < 0 or nm < 0 or dense % steps[0] or nm % steps[1]:
                raise ValueError(
                    f"regions={self.regions}: need columns (dense, nm) that are "
                    f"multiples of {steps[0]} and {steps[1]}"
                )
        elif self.regions not in REGIONS:
            raise ValueError(
                f"regions={self.regions!r}: choose 'exact', 'search', 'absorb', "
                "'dense+nm' or a pair (dense, nm) of column counts"
            )
        if self.boundary not in BOUNDARIES:
            raise ValueError(
                f"boundary={self.boundary!r}: choose 'tile', where every tile has its "
                "own columns, or 'matrix', where all rows share them"
            )

    def tile_rows(self, outputs: int) -> int:
        """All rows where they share their columns."""
        if self.boundary == "matrix":
            return outputs
        return super().tile_rows(outputs)

    @property
    def _whole(self) -> bool:
        """Whether no column may be pruned."""
        return self.regions == "dense+nm"

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(n, m)."""
        return self.n, self.m

    def groups(self, tiles: Array, k: Array) -> Array:
        """The number of groups that retains most, or what is configured."""
        step = self.group_step
        if isinstance(self.regions, tuple):
            return jnp.asarray(self.regions[1] // self.m, jnp.int32)
        if self._whole:
            return (tiles.shape[-1] - k) // (self.m - self.n)
        if self.regions == "search":
            return regions.walk_groups(tiles, k, self.n, self.m, step)
        return regions.scan_groups(tiles, k, self.n, self.m, step)[0]

    def columns(self, key: Array, tiles: Array, k: Array, columns: Columns) -> Columns:
        """Searches the input orders; with "absorb" also without dense columns."""
        if self.regions != "absorb":
            return super().columns(key, tiles, k, columns)
        n, m = self.n_of_m
        flex_key, absorb_key, plain_key = jax.random.split(key, 3)
        flex = super().columns(flex_key, tiles, k, columns)
        merged = super().columns(absorb_key, tiles, k, regions.absorb(tiles, flex))
        step = self.group_step
        most = regions.most_groups(k, tiles.shape[-1], n, m) // step * step
        plain = self.strongest(tiles, k - n * most, most)
        plain = super().columns(plain_key, tiles, k, plain)
        better = regions.value(tiles, merged) >= regions.value(tiles, plain)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), merged, plain)

    def budget(self, columns: int, sparsity: Array) -> Array:
        """Column-equivalents that stay; fixed regions fix them."""
        if isinstance(self.regions, tuple):
            dense, nm = self.regions
            return jnp.asarray(dense + nm // self.m * self.n, jnp.int32)
        if not self._whole:
            return super().budget(columns, sparsity)
        # A group removes m - n columns, and nothing else removes any.
        step, (n, m) = self.group_step, self.n_of_m
        steps = jnp.round(columns * jnp.asarray(sparsity, jnp.float32) / (m - n) / step)
        h = jnp.clip(steps, 0, columns // m // step).astype(jnp.int32) * step
        return columns - (m - n) * h

    @property
    def steps(self) -> Steps:
        """The counts of columns that are legal."""
        return super().steps._replace(pruned=not self._whole)

    def units(self) -> Units:
        """Rows may be parted where all of them share their columns."""
        if self.boundary == "matrix":
            return Units(1, None, "a vector", "a tile")
        return super().units()

    def levels(self, scores: Array) -> Levels | None:
        """None where every column keeps something; see `Tiled.levels`."""
        return None if self._whole else super().levels(scores)

    def sparsity_range(self) -> tuple[float, float]:
        """Up to 1 - n / m where no column is pruned, else to empty."""
        return (0.0, 1 - self.n / self.m) if self._whole else super().sparsity_range()

    def granularity(self, shape: tuple[int, int]) -> float:
        """One column vector, or what one group removes."""
        if self._whole:
            return (self.m - self.n) * self.group_step / shape[1]
        return super().granularity(shape)

    def check(
        self, shape: tuple[int, ...], sparsity: Any = None, path: str = "weight"
    ) -> None:
        """Raises ValueError when shape or target do not fit the pattern."""
        if not isinstance(self.regions, tuple):
            super().check(shape, sparsity, path)
            return
        self.check_shape(shape, path)
        dense, nm = self.regions
        if dense + nm > shape[1]:
            raise ValueError(
                f"{path}: regions=({dense}, {nm}) need {dense + nm} columns of "
                f"in={shape[1]}"
            )
        own = 1 - (dense + nm // self.m * self.n) / shape[1]
        if sparsity is not None and checks.is_concrete(sparsity):
            checks.sparsity(sparsity, own, own, self, path)
