"""ALPS: supports by the alternating direction method of multipliers.

Meng et al. 2024 (arXiv:2406.07831), in coordinates where the damped Gram has a unit
diagonal, with the paper's schedule of the penalty rho, spread over the iterations, and
a refit by conjugate gradients at the end. Any pattern: the D-step keeps order and
regions, which come from the starting score, and chooses again inside the groups; for
transposable patterns a tile never takes a mask that scores less, which makes the
iteration converge although that projection is approximate.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.methods.reconstruction import (
    Reconstruction,
    Solved,
    first_scores,
)
from flexhinm_jax.ops import gram
from flexhinm_jax.types import Support

PERIOD = 3  # iterations in which the penalty grows by a factor of `growth`
SETTLED = 2e-3  # share of the support that changes in a step, when it has settled
LEAST, MOST = 1e-6, 1e6  # range of the penalty
POLISH = 3  # conjugate-gradient steps from a D whose support has settled


class Iterate(NamedTuple):
    """Where the iteration stands; matrices [o, i] in scaled coordinates.

    Attributes:
      d: the sparse iterate D.
      v: the multiplier V.
      keep: bool, support of D.
      last: bool, support one step before.
      rho: f[], penalty.
      raised: bool[], whether rho was ever raised.
      step: i32[], iterations done.
      done: bool[], whether the support has settled.
    """

    d: Array
    v: Array
    keep: Array
    last: Array
    rho: Array
    raised: Array
    step: Array
    done: Array


class Split(NamedTuple):
    """What the iteration ends with.

    Attributes:
      d: f[o, i], the sparse iterate D in scaled coordinates.
      support: its support.
      step: i32[], iterations done.
      settled: bool[], whether the support had stopped to change.
    """

    d: Array
    support: Support
    step: Array
    settled: Array


@dataclasses.dataclass(frozen=True)
class ALPS(Reconstruction):
    """Support and weights together, by splitting and a growing penalty.

    The state also holds `steps`, i32[], the iterations done, and `settled`, bool[],
    whether the support had stopped to change before they ran out.

    Attributes:
      pattern: the supports to choose from.
      rho: first penalty.
      iterations: at most so many steps.
      growth: penalty factors for many, some and few changes of the support, of three
        iterations. The paper's are the default, which takes them at every third; here
        every iteration takes the cube root. Smaller ones take longer and find better
        supports.
      refit_steps: conjugate-gradient steps on the final support, at most; where the
        iteration has settled, its weights need three.
    """

    _: dataclasses.KW_ONLY
    rho: float = 0.1
    iterations: int = 300
    growth: tuple[float, float, float] = (1.3, 1.2, 1.1)
    refit_steps: int = 10

    reports: ClassVar[tuple[str, ...]] = ("damping", "steps", "settled")

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if not self.rho > 0:
            raise ValueError(f"rho={self.rho}: need a penalty > 0")
        if len(self.growth) != 3 or min(self.growth) <= 1:
            raise ValueError(f"growth={self.growth}: need three factors > 1")
        if self.iterations < 1 or self.refit_steps < 0:
            raise ValueError(
                f"iterations={self.iterations}, refit_steps={self.refit_steps}: need "
                "at least 1 and 0"
            )

    def reconstruct(
        self,
        key: Array,
        task: gram.Problem,
        sparsity: Array | float | None,
        before: Support | None,
    ) -> Solved:
        """Iterates until the support settles; with `before`, only inside it."""
        start = gram.solve(task) if task.has_targets else task.weight
        # A unit diagonal makes one rho mean the same in every layer and input.
        h, s = gram.unit_diagonal(task.gram)
        scores = first_scores(task, start, before)
        support = self.pattern.project(key, scores, sparsity, before)
        target = start * s
        g = task.cross / s
        if before is None or self.pattern.free_rows:
            split = self.split(target, h, g, support, self.pattern.refine, before)
        else:
            d = jnp.where(support.keep, target, 0)
            split = Split(d, support, jnp.zeros((), jnp.int32), jnp.ones((), bool))
        solved = self.refit(split, h, g) / s
        reports = {"steps": split.step, "settled": split.settled}
        return Solved(solved, split.support, reports)

    def refit(self, split: Split, h: Array, g: Array) -> Array:
        """f[o, i]: the weights of the final support, by conjugate gradients.

        Algorithm 2 of arXiv:2406.07831; the unit diagonal is its preconditioner.
        They start from D, which is all but the solution when the support has settled:
        on a layer where ten steps from the dense weight end at 1.002 times the least
        error, D itself has 1.0001 times.

        Args:
          split: from `split`.
          h: f[i, i], Gram with unit diagonal.
          g: f[o, i], cross Gram.
        """
        near = split.settled & (split.step > 0)
        steps = jnp.where(near, min(POLISH, self.refit_steps), self.refit_steps)
        return gram.descend(split.d, split.support.keep, h, g, steps)

    def split(
        self,
        target: Array,
        h: Array,
        g: Array,
        support: Support,
        refine: Callable[[Support, Array], Support],
        before: Support | None = None,
    ) -> Split:
        """The support that the iteration settles on, with its weights.

        Args:
          target: f[o, i], dense solution in scaled coordinates.
          h: f[i, i], Gram with unit diagonal.
          g: f[o, i], cross Gram.
          support: where to start; fixes order and regions.
          refine: the best support with the regions of a support, for scores.
          before: an earlier support to stay within, or None.
        """
        eye = jnp.eye(h.shape[0], dtype=h.dtype)

        def choose(scores, keep):
            if before is None:
                return refine(Support(keep, support.regions), scores).keep
            scores = jnp.where(before.keep, scores, -1.0)
            fresh = refine(Support(keep, support.regions), scores)
            return fresh.keep & before.keep

        def project(x, keep):
            return choose(jnp.square(x).astype(jnp.float32), keep)

        def alternate(at):
            """B, D and V in turn: Algorithm 1 of arXiv:2406.07831."""
            # B: the least error with a spring to D, (G - V + rho D) (H + rho I)^-1.
            # Two triangular solves cost what one product with the inverse does, and
            # the factorisation a sixth of it: every step affords a penalty of its own.
            factor = gram.factor_of(h + at.rho * eye)
            b = gram.solve_by(factor, g - at.v + at.rho * at.d)
            # D: the nearest matrix to B + V / rho with a support of the pattern
            x = b + at.v / at.rho
            keep = project(x, at.keep)
            d = jnp.where(keep, x, 0)
            # V: the price of B and D being apart
            v = at.v + at.rho * (b - d)
            return at._replace(d=d, v=v, keep=keep, step=at.step + 1)

        def restart(at):
            keep = project(target, support.keep)
            d = jnp.where(keep, target, 0)
            return at._replace(d=d, v=jnp.zeros_like(d), keep=keep)

        def advance(at):
            at, again = self.scheduled(alternate(at))
            return lax.cond(again, restart, lambda x: x, at)

        still = jnp.zeros((), bool)
        if before is not None:
            # Where there is nothing to choose, the iteration has nothing to find.
            other = choose(1.0 - support.keep.astype(jnp.float32), support.keep)
            still = jnp.all(other == support.keep)
        zero = jnp.zeros_like(target)
        first = restart(
            Iterate(
                d=zero,
                v=zero,
                keep=support.keep,
                last=support.keep,
                rho=jnp.asarray(self.rho, target.dtype),
                raised=jnp.zeros((), bool),
                step=jnp.zeros((), jnp.int32),
                done=still,
            )
        )
        last = lax.while_loop(
            lambda at: ~at.done & (at.step < self.iterations),
            advance,
            first._replace(last=first.keep),
        )
        return Split(last.d, Support(last.keep, support.regions), last.step, last.done)

    def scheduled(self, at: Iterate) -> tuple[Iterate, Array]:
        """The next penalty, from how much of the support has changed.

        Args:
          at: after some iterations.

        Returns:
          The iterate, and whether it must start again with a lower penalty.

        Source: arXiv:2406.07831, its update of rho.
        """
        # A rho that grows geometrically has a finite sum of 1 / rho, which bounds how
        # far B and D still move: that is what makes the iteration converge.
        changed = jnp.sum(at.keep != at.last, dtype=jnp.int32)
        share = changed / jnp.maximum(jnp.sum(at.keep, dtype=jnp.int32), 1)
        many, some, few = (factor ** (1 / PERIOD) for factor in self.growth)
        busy = share > 0.005
        factor = jnp.where(share > 0.1, many, jnp.where(busy, some, few))
        raised = at.raised | busy
        settled = share < SETTLED
        # A penalty that was never raised and moves little started too high. The first
        # steps from the dense weight move little under any.
        lower = ~raised & (at.step >= PERIOD)
        raise_ = jnp.where(settled, at.rho, at.rho * factor)
        rho = jnp.clip(jnp.where(lower, at.rho / 5, raise_), LEAST, MOST)
        at = at._replace(
            rho=rho.astype(at.rho.dtype),
            raised=raised,
            done=settled & (raised | (at.rho <= LEAST)),
            last=at.keep,
        )
        return at, lower & (changed > 0)
