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

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.methods.reconstruction import Reconstruction, Solved, first_scores
from flexhinm_jax.ops import elimination, gram, masks, regions
from flexhinm_jax.types import Support

#: Columns between two updates of everything to the right, for N:M patterns.
BLOCK = 64

#: Columns swept together where there is nothing to choose.
UNIT = 8


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
    ) -> Solved:
        """Finds the structure on scores, then sweeps; see `Reconstruction`."""
        start = gram.solve(task) if task.has_targets else task.weight
        scores = first_scores(task, start, before)
        support = self.pattern.project(key, scores, sparsity, before)
        within = None if before is None else before.keep
        if self.mask == "first" or not (before is None or self.pattern.free_rows):
            within = support.keep
        if support.regions is None:
            return self._sweep_rows(key, start, task, support, sparsity, within)
        return self._sweep_tiles(start, task, support, within)

    def _sweep_rows(self, key, start, task, support, sparsity, within):
        """Unstructured: one threshold per block of columns."""
        r, columns = start.shape
        block = min(self.block, columns)
        step = self.pattern.granularity((r, columns))
        unit = self.pattern.granularity((r, block))
        wide = ((0, 0), (0, -columns % block))
        known = jnp.pad(support.keep, wide)
        allowed = None if within is None else jnp.pad(within, wide)

        def choose(scores, first):
            if allowed is not None:
                here = lax.dynamic_slice_in_dim(allowed, first, block, axis=1)
                count = lax.dynamic_slice_in_dim(known, first, block, axis=1)
                scores = jnp.where(here, scores, -1.0)
                return self.pattern.refine(Support(count), scores).keep & here
            # Rounded on the running total, so that the blocks add up.
            last = jnp.minimum(first + block, columns)
            share = (1.0 - jnp.asarray(sparsity, jnp.float32)) / (columns * step)
            count = jnp.round(last * share) - jnp.round(first * share)
            padding = (first + block - last) / (block * unit)
            kept = (count + padding) * unit
            return self.pattern.project(key, scores, 1.0 - kept).keep

        u = gram.inverse_factor(task.factor)
        solved, keep, lost = elimination.sweep(
            start, u, choose, unit=block, block=block
        )
        return Solved(solved, Support(keep), lost=jnp.sum(lost))

    def _sweep_tiles(self, start, task, support, within):
        """Tiles with regions: every one along its own columns."""
        old = support.regions
        n, m = old.n, old.m
        tiles = old.in_order.shape[0]
        rows = start.shape[0] // tiles
        order, kind = elimination.column_order(old)
        unit = m if m > 1 else math.gcd(start.shape[1], UNIT)
        block = unit * max(1, BLOCK // unit)
        fixed = within is support.keep or m == 1

        def one(part):
            w, keep, allowed, order, kind = part
            pad = (0, -len(kind) % block)
            known = jnp.pad(keep[:, order], ((0, 0), pad))
            allowed = jnp.pad(allowed[:, order], ((0, 0), pad))
            kinds = jnp.pad(kind, pad, constant_values=elimination.DENSE)

            def choose(scores, first):
                if fixed:
                    return lax.dynamic_slice_in_dim(known, first, unit, axis=1)
                here = lax.dynamic_slice_in_dim(kinds, first, unit)
                if within is None:
                    chosen = self.pattern.choose(scores, n, m)
                else:
                    own = lax.dynamic_slice_in_dim(allowed, first, unit, axis=1)
                    scores = jnp.where(own, scores, -1.0)
                    chosen = self.pattern.choose(scores, n, m) & own
                return jnp.where(
                    here == elimination.CHOSEN, chosen, here == elimination.DENSE
                )

            u = gram.permuted_inverse_factor(task.gram, order)
            solved, keep, lost = elimination.sweep(
                w[:, order], u, choose, unit=unit, block=block
            )
            back = jnp.argsort(order)
            return solved[:, back], keep[:, back], jnp.sum(lost)

        cut = lambda x: regions.tile(x, old.out_order, rows)  # noqa: E731
        parts = start, support.keep, support.keep if within is None else within
        parts = *map(cut, parts), order, kind
        if tiles == 1:
            each = jax.tree.map(lambda x: x[None], one(jax.tree.map(_first, parts)))
        else:
            each = lax.map(one, parts)
        solved, keep, lost = each
        fold = lambda x: masks.fold_tiles(x, old.out_order)  # noqa: E731
        lost = jnp.sum(lost)
        return Solved(fold(solved), Support(fold(keep), old), lost=lost)


def _first(x: Array) -> Array:
    return x[0]
