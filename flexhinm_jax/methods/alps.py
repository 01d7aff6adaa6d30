"""ALPS: supports by the alternating direction method of multipliers.

Meng et al. 2024 (arXiv:2406.07831), in coordinates where the damped Gram has a unit
diagonal, with the paper's schedule of the penalty rho and a refit by conjugate
gradients at the end. Any pattern: the D-step keeps order and regions, which come from
the starting score, and chooses again inside the groups; for transposable patterns a
tile never takes a mask that scores less, which makes the iteration converge although
that projection is approximate.
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

CHECK = 3  # iterations between two looks at the support
LEAST, MOST = 1e-6, 1e6  # range of the penalty


class Iterate(NamedTuple):
    """Where the iteration stands; matrices [o, i] in scaled coordinates.

    Attributes:
      b: the dense iterate B.
      d: the sparse iterate D.
      v: the multiplier V.
      keep: bool, support of D.
      last: bool, support at the last check.
      rho: f[], penalty.
      raised: bool[], whether rho was ever raised.
      step: i32[], iterations done.
      done: bool[], whether the support has settled.
    """

    b: Array
    d: Array
    v: Array
    keep: Array
    last: Array
    rho: Array
    raised: Array
    step: Array
    done: Array


@dataclasses.dataclass(frozen=True)
class ADMM(Reconstruction):
    """What `ALPS` and `StagedALPS` share: the iteration and its schedule.

    The state also holds `steps`, i32[], the iterations done, and `settled`, bool[],
    whether the support had stopped to change before they ran out.

    Attributes:
      pattern: the supports to choose from.
      rho: first penalty.
      iterations: at most so many steps.
      growth: penalty factors for many, some and few changes of the support. The paper's
        are the default; smaller ones take longer and find better supports.
      refit_steps: conjugate-gradient steps on the final support.
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
        if self.iterations < CHECK or self.refit_steps < 0:
            raise ValueError(
                f"iterations={self.iterations}, refit_steps={self.refit_steps}: need "
                f"at least {CHECK} and 0"
            )

    def alternate(
        self,
        key: Array,
        task: gram.Problem,
        sparsity: Array | float | None,
        before: Support | None,
    ) -> Solved:
        """Iterates until the support settles; with `before`, only inside it."""
        start = gram.solve(task) if task.has_targets else task.weight
        h, s = gram.unit_diagonal(task.gram)
        scores = first_scores(task, start, before)
        support = self.pattern.project(key, scores, sparsity, before)
        target = start * s
        g = task.cross / s
        steps = {"steps": jnp.zeros((), jnp.int32), "settled": jnp.ones((), bool)}
        if before is None or self.pattern.free_rows:
            support, steps = self.split(
                target, h, g, support, self.pattern.refine, before
            )
        b = jnp.where(support.keep, target, 0)
        solved = gram.descend(b, support.keep, h, g, self.refit_steps)
        return Solved(solved / s, support, steps)

    def split(
        self,
        target: Array,
        h: Array,
        g: Array,
        support: Support,
        refine: Callable[[Support, Array], Support],
        before: Support | None = None,
    ) -> tuple[Support, dict[str, Array]]:
        """The support that the iteration settles on, and how it went.

        Args:
          target: f[o, i], dense solution in scaled coordinates.
          h: f[i, i], Gram with unit diagonal.
          g: f[o, i], cross Gram.
          support: where to start; fixes order and regions.
          refine: the best support with the regions of a support, for scores.
          before: an earlier support to stay within, or None.
        """
        values, vectors = jnp.linalg.eigh(h)
        values = jnp.maximum(values, 0)

        def choose(scores, keep):
            if before is None:
                return refine(Support(keep, support.regions), scores).keep
            scores = jnp.where(before.keep, scores, -1.0)
            fresh = refine(Support(keep, support.regions), scores)
            return fresh.keep & before.keep

        def project(x, keep):
            return choose(jnp.square(x).astype(jnp.float32), keep)

        def admm(_, carry, inverse, rho):
            b, d, v, keep = carry
            b = gram.dot(g - v + rho * d, inverse)
            x = b + v / rho
            keep = project(x, keep)
            d = jnp.where(keep, x, 0)
            return b, d, v + rho * (b - d), keep

        def restart(at):
            b = target
            keep = project(b, support.keep)
            return at._replace(
                b=b, d=jnp.where(keep, b, 0), v=jnp.zeros_like(b), keep=keep
            )

        def advance(at):
            inverse = gram.dot(vectors / (values + at.rho), vectors.T)
            b, d, v, keep = lax.fori_loop(
                0,
                CHECK,
                lambda i, c: admm(i, c, inverse, at.rho),
                (at.b, at.d, at.v, at.keep),
            )
            at = at._replace(b=b, d=d, v=v, keep=keep, step=at.step + CHECK)
            changed = jnp.sum(keep != at.last, dtype=jnp.int32)
            share = changed / jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1)
            many, some, few = self.growth
            busy = share > 0.005
            factor = jnp.where(share > 0.1, many, jnp.where(busy, some, few))
            raised = at.raised | busy
            settled = (changed == 0) | ((at.step > 30) & (share < 3e-4))
            # A penalty that was never raised and moves little started too high.
            lower = ~raised
            again = lower & (changed > 0)
            rho = jnp.where(
                lower, at.rho / 5, jnp.where(settled, at.rho, at.rho * factor)
            )
            at = at._replace(
                rho=jnp.clip(rho, LEAST, MOST).astype(at.rho.dtype),
                raised=raised,
                done=settled & (raised | (at.rho <= LEAST)),
                last=keep,
            )
            return lax.cond(again, restart, lambda x: x, at)

        still = jnp.zeros((), bool)
        if before is not None:
            # Where there is nothing to choose, the iteration has nothing to find.
            other = choose(1.0 - support.keep.astype(jnp.float32), support.keep)
            still = jnp.all(other == support.keep)
        zero = jnp.zeros_like(target)
        at = Iterate(
            b=target,
            d=zero,
            v=zero,
            keep=support.keep,
            last=support.keep,
            rho=jnp.asarray(self.rho, target.dtype),
            raised=jnp.zeros((), bool),
            step=jnp.zeros((), jnp.int32),
            done=still,
        )
        at = restart(at)
        at = lax.while_loop(
            lambda at: ~at.done & (at.step < self.iterations),
            advance,
            at._replace(last=at.keep),
        )
        found = Support(at.keep, support.regions)
        return found, {"steps": at.step, "settled": at.done}


@dataclasses.dataclass(frozen=True)
class ALPS(ADMM):
    """Support and weights together, by splitting and a growing penalty.

    The state also holds `steps`, i32[], the iterations done, and `settled`, bool[],
    whether the support had stopped to change before they ran out.

    Attributes:
      pattern: the supports to choose from.
      rho: first penalty.
      iterations: at most so many steps.
      growth: penalty factors for many, some and few changes of the support. The paper's
        are the default; smaller ones take longer and find better supports.
      refit_steps: conjugate-gradient steps on the final support.
    """

    def reconstruct(
        self,
        key: Array,
        task: gram.Problem,
        sparsity: Array | float | None,
        before: Support | None,
    ) -> Solved:
        """Iterates until the support settles; with `before`, only inside it."""
        return self.alternate(key, task, sparsity, before)
