"""SparseGPT: prune column by column and let later columns make up for it.

Frantar & Alistarh 2023 (arXiv:2301.00774). Works with every pattern: the order and the
regions of tiled patterns are found first, on a score; then every tile is swept along
its own columns (pruned, grouped, dense) and n of every m are chosen on the compensated
weights. Departures: one Cholesky factorisation of the reversed Gram instead of two and
an inverse; thresholds of unstructured blocks add up to the exact count.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.methods.reconstruction import Reconstruction, squared_scores
from flexhinm_jax.ops import elimination, gram, masks, regions
from flexhinm_jax.types import Support

#: Columns between two updates of everything to the right, for N:M patterns.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class SparseGPT(Reconstruction):
    """Optimal brain surgery in one sweep.

    Attributes:
      pattern: the supports to choose from.
      block: columns that share one threshold, for unstructured supports.
      mask: "adaptive" chooses weights during the sweep; "first" keeps the support of
        the starting score, as for a mask that is given.
    """

    _: dataclasses.KW_ONLY
    block: int = 128
    mask: Literal["adaptive", "first"] = "adaptive"

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"block={self.block}: need at least one column")
        if self.mask not in ("adaptive", "first"):
            raise ValueError(f"mask={self.mask!r}: choose 'adaptive' or 'first'")

    def reconstruct(
        self,
        key: Array,
        task: gram.Problem,
        sparsity: Array | float | None,
        before: Support | None,
    ) -> tuple[Array, Support]:
        """Finds the structure on scores, then sweeps; see `Reconstruction`."""
        start = gram.solve(task) if task.has_targets else task.weight
        scores = squared_scores(task, start)
        support = self.pattern.project(key, scores, sparsity, before)
        fixed = before is not None or self.mask == "first"
        if support.regions is None:
            return self._sweep_rows(key, start, task, support, sparsity, fixed)
        return self._sweep_tiles(start, task, support, fixed)

    def _sweep_rows(self, key, start, task, support, sparsity, fixed):
        """Unstructured: one threshold per block of columns."""
        r, columns = start.shape
        block = min(self.block, columns)
        step = self.pattern.granularity((r, columns))
        unit = self.pattern.granularity((r, block))
        wide = jnp.pad(support.keep, ((0, 0), (0, -columns % block)))

        def choose(scores, first):
            if fixed:
                return lax.dynamic_slice_in_dim(wide, first, block, axis=1)
            # Rounded on the running total, so that the blocks add up.
            last = jnp.minimum(first + block, columns)
            share = (1.0 - jnp.asarray(sparsity, jnp.float32)) / (columns * step)
            count = jnp.round(last * share) - jnp.round(first * share)
            padding = (first + block - last) / (block * unit)
            kept = (count + padding) * unit
            return self.pattern.project(key, scores, 1.0 - kept).keep

        u = gram.inverse_factor(task.factor)
        solved, keep, _ = elimination.sweep(start, u, choose, unit=block, block=block)
        return solved, Support(keep)

    def _sweep_tiles(self, start, task, support, fixed):
        """Tiles with regions: every one along its own columns."""
        given = support.regions
        n, m = given.n, given.m
        tiles = given.in_order.shape[0]
        rows = start.shape[0] // tiles
        order, kind = elimination.column_order(given)
        unit = m if m > 1 else math.gcd(start.shape[1], elimination.WRITTEN_OUT)
        block = unit * max(1, BLOCK // unit)

        def one(part):
            w, keep, order, kind = part
            pad = (0, -len(kind) % block)
            known = jnp.pad(keep[:, order], ((0, 0), pad))
            kinds = jnp.pad(kind, pad, constant_values=elimination.DENSE)

            def choose(scores, first):
                if fixed or m == 1:
                    return lax.dynamic_slice_in_dim(known, first, unit, axis=1)
                here = lax.dynamic_slice_in_dim(kinds, first, unit)
                chosen = self.pattern.choose(scores, n, m)
                return jnp.where(
                    here == elimination.CHOSEN, chosen, here == elimination.DENSE
                )

            u = gram.permuted_inverse_factor(task.gram, order)
            solved, keep, _ = elimination.sweep(
                w[:, order], u, choose, unit=unit, block=block
            )
            back = jnp.argsort(order)
            return solved[:, back], keep[:, back]

        cut = lambda x: regions.tile(x, given.out_order, rows)  # noqa: E731
        solved, keep = lax.map(one, (cut(start), cut(support.keep), order, kind))
        fold = lambda x: masks.fold_tiles(x, given.out_order)  # noqa: E731
        return fold(solved), Support(fold(keep), given)
