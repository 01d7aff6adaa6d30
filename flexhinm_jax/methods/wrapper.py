"""Methods around another method: its support first, then something better from it."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from flexhinm_jax.methods.base import Method
from flexhinm_jax.methods.reconstruction import LayerFit, Solved
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.ops import gram
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.types import Plan, State, Stats, Support

INNER = "inner."


@dataclasses.dataclass(frozen=True)
class Nested(LayerFit):
    """A method on the Gram that starts from the plan of another one.

    Attributes:
      inner: the method whose plan is the start; its pattern is that of the wrapper. A
        pattern stands for Wanda with it.
      pattern: the pattern of `inner`; not an argument.
    """

    inner: Method = Wanda()
    pattern: Pattern = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        """Validates the configuration and takes the pattern over."""
        if isinstance(self.inner, Pattern):
            object.__setattr__(self, "inner", Wanda(self.inner))
        if not isinstance(self.inner, Method):
            raise ValueError(
                f"inner={self.inner!r}: {type(self).__name__} wraps a method, such as "
                f"{type(self).__name__}(Wanda(NM(2, 4)))"
            )
        object.__setattr__(self, "pattern", self.inner.pattern)
        super().__post_init__()

    def with_pattern(self, pattern: Pattern) -> Method:
        """The same method around the same inner one with another pattern."""
        return dataclasses.replace(self, inner=self.inner.with_pattern(pattern))

    def order_scores(self, w: Array, stats: Stats | None) -> Array:
        """Those of the inner method, which finds the support."""
        return self.inner.order_scores(w, stats)

    def diagnostics(self, state: State) -> dict[str, Array]:
        """The own ones, and those of the inner method as "inner.damping" etc."""
        inner = self.inner.diagnostics(state.fixed["inner"])
        named = {INNER + name: x for name, x in inner.items()}
        return super().diagnostics(state) | named

    def note(self, diagnostics: Mapping[str, Any]) -> str:
        """The own note and that of the inner method; see `Method.note`."""
        inner = {
            name.removeprefix(INNER): x
            for name, x in diagnostics.items()
            if name.startswith(INNER)
        }
        texts = super().note(diagnostics), self.inner.note(inner)
        return "; ".join(dict.fromkeys(filter(None, texts)))

    def centered(self, center: bool, *, has_bias: bool) -> Method:
        """The wrapper and the inner method; see `Method.centered`."""
        inner = self.inner.centered(center, has_bias=has_bias)
        outer = super().centered(center, has_bias=has_bias)
        return dataclasses.replace(outer, inner=inner)  # type: ignore[call-arg]

    def check(
        self,
        w: Any,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Checks what the wrapper and what the inner method need."""
        super().check(w, stats, sparsity, path)
        self.inner.check(w, stats, sparsity, path)

    def _first(self, key, w, stats, sparsity, prev):
        """An earlier support or None, and the state of the inner method within it."""
        before = inner = None
        if prev is not None:
            # The inner method continues from the support that the wrapper ended with.
            before, inner = prev.fixed["support"], prev.fixed["inner"]
            inner = dataclasses.replace(inner, fixed=inner.fixed | {"support": before})
        state = self.inner.solve(key, w, stats, sparsity=sparsity, prev=inner)
        return before, state


@dataclasses.dataclass(frozen=True)
class Wrapper(Nested):
    """Improves the plan of another method on the Gram.

    Attributes:
      inner: the method whose plan is the start; its pattern is that of the wrapper. A
        pattern stands for Wanda with it.
      pattern: the pattern of `inner`; not an argument.
    """

    @abc.abstractmethod
    def improve(
        self,
        task: gram.Problem,
        start: Array,
        support: Support,
        before: Support | None,
    ) -> Solved:
        """A better weight and support.

        Args:
          task: the problem.
          start: f[o, i], the weight of the inner plan, zero outside its support.
          support: its support.
          before: an earlier support to stay within, or None.
        """

    @functools.partial(jax.jit, static_argnums=0)
    def _solve(self, key, w, stats, sparsity, prev):
        """Solves with the inner method and improves its plan."""
        before, state = self._first(key, w, stats, sparsity, prev)
        plan = self.inner.decide(state, w)
        self._check_factors(plan)
        task = self.problem(w, stats)
        start = plan.weight.astype(task.gram.dtype)
        improved = self.improve(task, start, plan.support, before)
        outer = self.state(w, stats, task, improved)
        return State(learned=(), fixed=outer.fixed | {"inner": state})

    def _check_factors(self, plan: Plan) -> None:
        if plan.left is not None or plan.right is not None:
            raise ValueError(
                f"{type(self).__name__} needs a plan without block-diagonal factors; "
                f"{type(self.inner).__name__} returns them"
            )
