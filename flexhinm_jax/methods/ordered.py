"""Solves another method in an input order that is given with the statistics.

Weights that read the same input (query, key and value; gate and up) can share one order
of it, so that the input is gathered once, or not at all where the order folds into its
producer (Zhang et al. 2024, RIA, ICLR). The inner method sees permuted inputs and needs
to know nothing of it: its natural N:M groups are groups of the given order.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.base import Method
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.types import BlockDiagonal, Plan, State, Stats, Support


@dataclasses.dataclass(frozen=True)
class Ordered(Method):
    """The inner method with N:M groups along `stats.order`, of any score or solver.

    Without an order in the statistics it is the inner method in natural order. The
    state has fixed = {"order": i32[i], "inner": State}.

    Attributes:
      inner: the method; with a search in its pattern, the given order replaces it.
      pattern: that of `inner`; not an argument.
    """

    inner: Method = Wanda()
    pattern: Pattern = dataclasses.field(init=False, repr=False)

    #: An order is carried by statistics, also for a method that looks at none.
    needs: ClassVar[Any] = "norms"
    one_order: ClassVar[bool] = True
    follows_order: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration and takes the pattern over."""
        if not isinstance(self.inner, Method) or isinstance(self.inner, LearnedMethod):
            raise ValueError(
                f"inner={self.inner!r}: Ordered takes a method that solves, such as "
                "Wanda(NM(2, 4)), not one that learns"
            )
        object.__setattr__(self, "pattern", self.inner.pattern)
        needs = self.inner.needs
        object.__setattr__(self, "needs", "norms" if needs == "nothing" else needs)
        super().__post_init__()

    @property
    def natural(self) -> Method:
        """The inner method without a search."""
        return self.inner.with_pattern(self.pattern.natural())

    def with_pattern(self, pattern: Pattern) -> Method:
        """The same with another pattern; one that is not N:M is solved by `inner`."""
        inner = self.inner.with_pattern(pattern)
        return Ordered(inner) if self.fits(pattern) else inner

    def check(
        self,
        w: Any,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Checks what the inner method needs, and that statistics can be permuted."""
        super().check(w, stats, sparsity, path)
        self.inner.check(w, stats, sparsity, path)
        if stats is not None and stats.order is not None and stats.fisher is not None:
            raise ValueError(
                f"{path}: blocks of a Fisher matrix cannot be permuted; accumulate its "
                "diagonal, or do not share orders"
            )

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Solves with permuted inputs; with `prev` in the order of `prev`."""
        self.check(w, stats, sparsity)
        assert stats is not None
        order = stats.order
        if prev is not None:
            order = prev.fixed["order"]
        elif order is None:
            order = jnp.arange(w.shape[1], dtype=jnp.int32)
        before = None if prev is None else prev.fixed["inner"]
        ordered = permuted(stats, order)
        state = self.natural.solve(
            key, w[:, order], ordered, sparsity=sparsity, prev=before
        )
        return State(learned=(), fixed={"order": order, "inner": state})

    def importance(self, w: Array, stats: Stats | None) -> Array:
        """That of the inner method."""
        return self.inner.importance(w, stats)

    def order_scores(self, w: Array, stats: Stats | None) -> Array:
        """Those of the inner method."""
        return self.inner.order_scores(w, stats)

    def diagnostics(self, state: State) -> dict[str, Array]:
        """Those of the inner method."""
        return self.inner.diagnostics(state.fixed["inner"])

    def note(self, diagnostics: Mapping[str, Any]) -> str:
        """That of the inner method."""
        return self.inner.note(diagnostics)

    def centered(self, center: bool, *, has_bias: bool) -> Method:
        """The same around the centred inner method; see `Method.centered`."""
        return Ordered(self.inner.centered(center, has_bias=has_bias))

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """The plan of the inner method, back in original order."""
        order = state.fixed["order"]
        inner = self.natural.decide(state.fixed["inner"], w[:, order], key=key)
        return restored(inner, order)


def permuted(stats: Stats, order: Array) -> Stats:
    """The statistics of the same inputs in another order.

    Args:
      stats: without blocks of a Fisher matrix.
      order: i32[i], original channel at each position.

    Returns:
      The statistics, with `order` cleared.
    """

    def take(x: Array | None) -> Array | None:
        return None if x is None else x[..., order]

    gram = stats.gram
    return dataclasses.replace(
        stats,
        sq_norm=stats.sq_norm[order],
        mean=stats.mean[order],
        gram=None if gram is None else gram[order][:, order],
        cross=take(stats.cross),
        sq_grad=take(stats.sq_grad),
        order=None,
    )


def restored(plan: Plan, order: Array) -> Plan:
    """A plan for permuted inputs, in original input order.

    Args:
      plan: its input j is the original input order[j].
      order: i32[i].

    Returns:
      The plan of the original inputs: same regions, same groups.
    """
    back = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)
    )
    regions = plan.support.regions
    if regions is not None:
        regions = dataclasses.replace(regions, in_order=order[regions.in_order])
    right = plan.right
    if right is not None:
        inside = order if right.order is None else order[right.order]
        right = BlockDiagonal(right.blocks, inside)
    return dataclasses.replace(
        plan,
        weight=plan.weight[:, back],
        support=Support(plan.support.keep[:, back], regions),
        right=right,
    )
