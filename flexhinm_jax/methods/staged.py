"""ALPS in two stages for tiled patterns: first which columns, then which weights.

A score of single weights says little about which column vectors a tile needs once the
others can make up for them. So ALPS (Meng et al. 2024, arXiv:2406.07831) runs with the
vector constraint alone and chooses the columns of every tile; the input order of the
tile is searched on the refitted weights, W^2 H_jj; and ALPS runs again for n of every m
inside. Rows and region sizes come from the starting score.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.alps import ALPS
from flexhinm_jax.methods.reconstruction import Solved, squared_scores
from flexhinm_jax.ops import gram, least_squares, masks, regions
from flexhinm_jax.patterns import FlexHiNM, HiNM, Pattern
from flexhinm_jax.types import Support


@dataclasses.dataclass(frozen=True)
class Columns(Pattern):
    """As many whole columns per tile as a support has, chosen freely by their score."""

    def refine(self, support: Support, scores: Array) -> Support:
        """The best columns of every tile; orders inside a tile mean nothing here."""
        given = support.regions
        assert given is not None
        rows = scores.shape[0] // given.in_order.shape[0]
        tiles = regions.tile(scores, given.out_order, rows)
        order = regions.ranked(jnp.sum(tiles, axis=1, dtype=jnp.float32))
        rank = jnp.argsort(order, axis=1)
        keep = jnp.broadcast_to((rank < given.nm_end[:, None])[:, None], tiles.shape)
        return Support(masks.fold_tiles(keep, given.out_order), given)

    def project(self, key: Array, scores: Array, *rest: Any) -> Support:
        """Not used: the number of columns comes from a support."""
        raise NotImplementedError

    def sparsity_range(self) -> tuple[float, float]:
        """Any."""
        return 0.0, 1.0

    def granularity(self, shape: tuple[int, int]) -> float:
        """One column."""
        return 1 / shape[1]


@dataclasses.dataclass(frozen=True)
class StagedALPS(ALPS):
    """ALPS that also chooses the columns of HiNM and FlexHiNM tiles.

    With other patterns, and when the kept set may only shrink, it is ALPS.

    Attributes:
      pattern: the supports to choose from.
    """

    def reconstruct(
        self,
        key: Array,
        task: gram.Problem,
        sparsity: Array | float | None,
        before: Support | None,
    ) -> Solved:
        """Columns, input orders, weights; see `ALPS.reconstruct`."""
        if before is not None or not isinstance(self.pattern, HiNM | FlexHiNM):
            return super().reconstruct(key, task, sparsity, before)
        key, order_key = jax.random.split(key)
        start = gram.solve(task) if task.has_targets else task.weight
        h, s = least_squares.unit_diagonal(task.gram)
        g = task.cross / s

        def solve(support: Support) -> Array:
            b = jnp.where(support.keep, start * s, 0)
            steps = self.refit_steps
            return least_squares.descend(b, support.keep, h, g, steps) / s

        chosen = self.pattern.project(key, squared_scores(task, start), sparsity)
        stage = dataclasses.replace(self, pattern=Columns())
        columns = stage.pattern.refine(chosen, squared_scores(task, start))
        columns, first = stage.split(start * s, h, g, columns)
        scores = squared_scores(task, solve(columns))
        support = self.regroup(order_key, scores, chosen)
        support, second = self.split(start * s, h, g, support)
        steps = {
            "steps": first["steps"] + second["steps"],
            "settled": first["settled"] & second["settled"],
        }
        return Solved(solve(support), support, steps)

    def regroup(self, key: Array, scores: Array, support: Support) -> Support:
        """The best columns by score, dealt to groups and searched.

        Args:
          key: consumed.
          scores: f32[o, i].
          support: fixes the rows of every tile and the sizes of the regions.
        """
        given, pattern = support.regions, self.pattern
        assert given is not None and isinstance(pattern, HiNM | FlexHiNM)
        n, m = given.n, given.m
        tiles = regions.tile(scores, given.out_order, pattern.vector_size)
        dense = given.dense_end[0]
        groups = (given.nm_end[0] - dense) // m
        rank = regions.ranked(jnp.sum(tiles, axis=1, dtype=jnp.float32))
        order = regions.column_order(rank, dense, groups, m)
        if pattern.permute is not None:
            order = pattern.permute.columns(key, tiles, order, dense, groups, n, m)
        keep = regions.kept(tiles, order, given.dense_end, given.nm_end, n, m)
        found = dataclasses.replace(given, in_order=order)
        return Support(masks.fold_tiles(keep, given.out_order), found)
