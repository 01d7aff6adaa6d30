"""RefineMask: exact coordinate descent over what a pattern leaves to choose.

For pure layer reconstruction this beats learned masks without a schedule or a learning
rate: it is the baseline that a learned method has to meet. Every move is exact on the
Gram, and which moves there are is the pattern's: the best of all patterns of a group of
n of m, single swaps in groups with more than 70 patterns, swaps within the row where it
is unstructured, exchanges between two rows of a transposable tile.

`SparseSwaps` (arXiv:2512.10922) is the same descent with the dense weights, until no
move gains.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.methods.base import Method
from flexhinm_jax.methods.reconstruction import Solved
from flexhinm_jax.methods.wrapper import Wrapper
from flexhinm_jax.ops import descent, elimination, gram, masks, regions
from flexhinm_jax.types import Support


@dataclasses.dataclass(frozen=True)
class RefineMask(Wrapper):
    """Re-chooses the support of any method's plan, group by group.

    Column vectors stay where they are: a `Vector` support has nothing to re-choose.

    Attributes:
      inner: the method that finds the start.
      sweeps: visits of every group, at most; with "dense" the descent ends when one of
        them changes nothing, and no move of the kind gains any more.
      weights: "solve" moves the weights with the support, "dense" keeps those of the
        dense matrix.
      refit_steps: conjugate-gradient steps after every sweep, with "solve".
    """

    _: dataclasses.KW_ONLY
    sweeps: int = 4
    weights: Literal["solve", "dense"] = "solve"
    refit_steps: int = 5

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.sweeps < 0 or self.refit_steps < 0:
            raise ValueError(
                f"sweeps={self.sweeps}, refit_steps={self.refit_steps}: need 0 or more"
            )
        if self.weights not in ("solve", "dense"):
            raise ValueError(f"weights={self.weights!r}: choose 'solve' or 'dense'")

    def for_fixed_weights(self) -> Method:
        """Refines the support under the dense weights."""
        return dataclasses.replace(self, weights="dense")

    def improve(
        self,
        task: gram.Problem,
        start: Array,
        support: Support,
        before: Support | None,
    ) -> Solved:
        """Sweeps over all groups, with a refit after each; stays within `before`."""
        solve = self.weights == "solve"
        within = jnp.ones(start.shape, bool) if before is None else before.keep
        fixed = before is not None and not self.pattern.free_rows
        if not solve:
            start = jnp.where(support.keep, task.weight, 0)

        def refit(b, keep):
            if not solve:
                return b
            h, g, steps = task.gram, task.cross, self.refit_steps
            return gram.refit(b, keep, h, g, steps)

        def once(carry):
            b, keep, left, _ = carry
            last = keep
            if not fixed:
                b, keep = self._sweep(task, b, Support(keep, support.regions), within)
            return refit(b, keep), keep, left - 1, solve | jnp.any(keep != last)

        left = jnp.asarray(self.sweeps, jnp.int32)
        first = start, support.keep, left, jnp.ones((), bool)
        b, keep, *_ = lax.while_loop(lambda c: c[3] & (c[2] > 0), once, first)
        return Solved(b, Support(keep, support.regions))

    def _sweep(self, task, b, support, within):
        """One visit of every group of every tile; new weights and support."""
        solve = self.weights == "solve"
        old = support.regions
        if old is None:
            matrices = b, support.keep, within, task.weight, task.gram, task.cross
            return descent.swap_rows(descent.Fit(*matrices), solve=solve)
        n, m = old.n, old.m
        if m == n:
            return b, support.keep
        if not self.pattern.free_rows:
            step = descent.best_cycle(m, solve)
        elif math.comb(m, n) <= descent.MAX_PATTERNS:
            step = descent.best_pattern(n, m, solve)
        else:
            step = descent.best_swap(solve)
        order, kind = elimination.column_order(old)

        def one(part):
            b, keep, within, dense, g, order, kind = part
            live = kind == elimination.CHOSEN
            h = task.gram[order][:, order]
            take = lambda x: x[:, order]  # noqa: E731
            b, keep, within, dense, g = map(take, (b, keep, within, dense, g))
            fit = descent.Fit(b, keep, within, dense, h, g)
            b, keep = descent.sweep(fit, live, step, m)
            back = jnp.argsort(order)
            return b[:, back], keep[:, back]

        rows = b.shape[0] // old.in_order.shape[0]
        cut = lambda x: regions.tile(x, old.out_order, rows)  # noqa: E731
        matrices = b, support.keep, within, task.weight, task.cross
        b, keep = lax.map(one, (*map(cut, matrices), order, kind))
        fold = lambda x: masks.fold_tiles(x, old.out_order)  # noqa: E731
        return fold(b), fold(keep)
