"""ALPS in two stages for tiled patterns: first which columns, then which weights.

A score of single weights says little about which column vectors a tile needs once the
others can make up for them. So ALPS (Meng et al. 2024, arXiv:2406.07831) runs with the
vector constraint alone and chooses the columns of every tile; the input order of the
tile is searched on the refitted weights, W^2 H_jj; and ALPS runs again for n of every m
inside. Rows and region sizes come from the starting score.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.alps import ALPS
from flexhinm_jax.methods.reconstruction import Solved, squared_scores
from flexhinm_jax.ops import gram, masks, regions
from flexhinm_jax.types import Support


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
        if before is not None or not self.pattern.regroups:
            return super().reconstruct(key, task, sparsity, before)
        key, order_key = jax.random.split(key)
        start = gram.solve(task) if task.has_targets else task.weight
        h, s = gram.unit_diagonal(task.gram)
        g = task.cross / s
        chosen = self.pattern.project(key, squared_scores(task, start), sparsity)
        columns = best_columns(chosen, squared_scores(task, start))
        first = self.split(start * s, h, g, columns, best_columns)
        scores = squared_scores(task, self.refit(first, h, g) / s)
        support = self.pattern.regroup(order_key, chosen, scores)
        second = self.split(start * s, h, g, support, self.pattern.refine)
        reports = {
            "steps": first.step + second.step,
            "settled": first.settled & second.settled,
        }
        return Solved(self.refit(second, h, g) / s, second.support, reports)


def best_columns(support: Support, scores: Array) -> Support:
    """As many whole columns per tile as a support has, chosen freely by their score.

    Orders inside a tile mean nothing here.
    """
    old = support.regions
    assert old is not None
    rows = scores.shape[0] // old.in_order.shape[0]
    tiles = regions.tile(scores, old.out_order, rows)
    order = regions.ranked(jnp.sum(tiles, axis=1, dtype=jnp.float32))
    rank = jnp.argsort(order, axis=1)
    keep = jnp.broadcast_to((rank < old.nm_end[:, None])[:, None], tiles.shape)
    return Support(masks.fold_tiles(keep, old.out_order), old)
