"""ARMOR: block-diagonal factors around a sparse core, fitted together.

W is replaced by diag(A) S diag(B) with S sparse and A, B made of small square blocks.
Their (o p + i q) extra weights buy back most of what the pattern costs: at run time two
batched block products around the sparse one. ARMOR (arXiv:2510.05528, ICLR 2026) fits
all three by Adam and re-draws one group per block and iteration; that loop is kept for
comparison. By default everything is solved exactly instead (equations (1) to (5) of
`ops.factorised`), which falls monotonically and needs a fraction of the time.

The target is W / (r c) with the norms c of its columns, then r of its rows, as in NoWag
(arXiv:2504.14569); r and c are folded into A and B at the end.

The extension `weighting="gram"` fits the outputs with all correlations of the inputs,
and other targets than W x where the statistics have them.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.methods.base import Method
from flexhinm_jax.methods.reconstruction import LayerFit
from flexhinm_jax.ops import blocks, descent, factorised, gram, masks, saliency
from flexhinm_jax.ops.factorised import Factors, Groups
from flexhinm_jax.types import BlockDiagonal, Plan, State, Stats, Support

BLOCK = 32  # block sizes that are not given: the largest divisor up to this
STEPS = {"exact": 20, "adam": 2000}


@dataclasses.dataclass(frozen=True)
class ARMOR(LayerFit):
    """Fits block-diagonal factors, the values of the core and, for N:M, its support.

    The core starts as the plan of `start`, with identity factors, and the fit is never
    worse than that. The groups of `NM` are chosen again as the factors move; with any
    other pattern the support of the start stays. With `NM(..., permute=)` the blocks on
    the inputs are cut in the searched order.

    The state holds `support`, `weight` (the core), `left`, `right`, `retained` (share
    of the NoWag score), `error` (relative loss at the end), `trace` f32[steps + 1] (the
    loss after every step, from that of the start), `overhead` (weights of the factors
    per weight of the matrix, which is also their share of its multiplications),
    `damping` and, when centred, `bias`.

    Attributes:
      pattern: the supports to choose from.
      damp: ridge towards the dense weight, of `weighting="gram"`.
      center: fits around the means of the inputs and refits the bias.
      block: side of the blocks, or (on the outputs, on the inputs); must divide the
        sides of the weight, that on the inputs also be a multiple of m for N:M. None
        takes the largest divisor up to 32. Blocks of 1 on both sides change nothing.
      solver: "exact" steps, or "adam", the published loop.
      steps: None for 20 exact or 2000 Adam steps.
      updates: groups chosen again per row of a block and step, 0 keeps the support;
        "adam" draws one group per block unless it is 0.
      values: conjugate-gradient steps on the values of the core per step.
      weighting: "diagonal", each input by its energy, rows and columns normalised; or
        "gram", the squared error of the outputs.
      start: the method whose plan is the start, with the pattern of this one; None for
        NoWag-P.
      rate: learning rate of "adam".
    """

    _: dataclasses.KW_ONLY
    block: int | tuple[int, int] | None = None
    solver: Literal["exact", "adam"] = "exact"
    steps: int | None = None
    updates: int = 2
    values: int = 4
    weighting: Literal["diagonal", "gram"] = "diagonal"
    start: Method | None = None
    rate: float = 1e-4

    reports: ClassVar[tuple[str, ...]] = ("damping", "overhead")

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.precision != "float32":
            raise ValueError(f"precision={self.precision!r}: ARMOR works in float32")
        for name, known in (
            ("solver", ("exact", "adam")),
            ("weighting", ("diagonal", "gram")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose {' or '.join(known)}"
                )
        sides = self.block if isinstance(self.block, tuple) else (self.block,)
        good = len(sides) in (1, 2) and all(
            b is None or (isinstance(b, int) and b > 0) for b in sides
        )
        if not good or (len(sides) == 2 and None in sides):
            raise ValueError(
                f"block={self.block!r}: need a positive number, a pair (on the "
                "outputs, on the inputs), or None"
            )
        if min(self.steps or 0, self.updates, self.values) < 0 or not self.rate > 0:
            raise ValueError(
                f"steps={self.steps}, updates={self.updates}, values={self.values}, "
                f"rate={self.rate}: need counts of 0 or more and a rate > 0"
            )
        if self.start is not None and not isinstance(self.start, Method):
            raise ValueError(f"start={self.start!r}: need a method such as Wanda()")
        if isinstance(self.start, ARMOR):
            raise ValueError(
                "start=ARMOR(...): need a method whose plans have no factors, such as "
                "Wanda()"
            )
        if self.groups is not None and self.updates > 0:
            n, m = self.groups
            if math.comb(m, n) > descent.MAX_PATTERNS:
                raise ValueError(
                    f"{n}:{m} has {math.comb(m, n)} patterns per group, more than the "
                    f"{descent.MAX_PATTERNS} that are tried; pass updates=0 to keep "
                    "the support of the start"
                )

    @property
    def groups(self) -> tuple[int, int] | None:
        """(n, m) of groups that are chosen again, None where the support stays."""
        return self.pattern.form if self.pattern.one_order else None

    @property
    def needs(self) -> Literal["nothing", "norms", "gram", "gradients"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The Gram matrix only for the weighting or the start that reads it."""
        theirs = "norms" if self.start is None else self.start.needs
        if self.weighting == "gram" or theirs == "gram":
            return "gram"
        return "gradients" if theirs == "gradients" else "norms"

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Block sizes on the outputs and on the inputs of a matrix `[o, i]`."""
        if self.block is None:
            unit = 1 if self.groups is None else self.groups[1]
            return (
                blocks.largest_block(shape[0], BLOCK),
                blocks.largest_block(shape[1], BLOCK, unit),
            )
        both = isinstance(self.block, tuple)
        return self.block if both else (self.block, self.block)  # type: ignore[return-value]

    def check(
        self,
        w: Any,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Raises ValueError also for blocks that do not fit; see `Method.check`."""
        super().check(w, stats, sparsity, path)
        if self._start is not None:
            self._start.check(w, stats, sparsity, path)
        p, q = self.sides(w.shape)
        checks.divisible(w.shape[0], p, "out", "block", path)
        checks.divisible(w.shape[1], q, "in", "block", path)
        if self.groups is not None and q > 1 and q % self.groups[1]:
            raise ValueError(
                f"{path}: blocks of {q} inputs cut through groups of m="
                f"{self.groups[1]}; need a multiple of m, or 1"
            )

    @property
    def _start(self) -> Method | None:
        """The start with the pattern and the centring of this method."""
        if self.start is None:
            return None
        start = self.start.with_pattern(self.pattern)
        return start.centered(self.center, has_bias=self.center)

    @functools.partial(jax.jit, static_argnums=0)
    def _solve(self, key, w, stats, sparsity, prev):
        """`solve` after the checks."""
        first_key, key = jax.random.split(key)
        target, h, r, c, damping = self._objective(w, stats)
        core, support, inner = self._first(first_key, w, stats, sparsity, prev)
        core = target if core is None else core / r[:, None] / c
        order = self._order(support)
        into = lambda x: x if order is None else x[..., order]  # noqa: E731
        back = lambda x: x if order is None else x[..., jnp.argsort(order)]  # noqa: E731
        if order is not None:
            h = h[order] if h.ndim == 1 else h[order][:, order]
        keep = into(support.keep)
        first = factorised.start(
            jnp.where(keep, into(core), 0), keep, self.sides(w.shape)
        )
        factors, trace = self._fit(key, first, into(target), h, prev is not None)
        a, s, b, keep = factors
        a = a * r.reshape(a.shape[0], -1, 1)
        b = b * into(c).reshape(b.shape[0], 1, -1)
        a, s, b = blocks.balance(a, s, b)
        support = Support(back(keep), support.regions)
        fixed = {
            "support": support,
            "weight": back(s),
            "left": BlockDiagonal(a),
            "right": BlockDiagonal(b, order),
            "retained": masks.retained(saliency.nowag(w, stats.sq_norm), support.keep),
            "error": jnp.min(trace),
            "trace": trace,
            "overhead": jnp.asarray((a.size + b.size) / w.size, jnp.float32),
            "damping": damping,
        }
        if inner is not None:
            fixed["start"] = inner
        if self.center:
            dense = back(factorised.product(Factors(a, s, b, keep)))
            fixed["bias"] = gram.bias(w.astype(jnp.float32), dense, stats)
        return State(learned=(), fixed=fixed)

    def _objective(self, w: Array, stats: Stats) -> tuple[Array, ...]:
        """Target f32[o, i], weighting of the inputs, row and column scales, damping."""
        o, i = w.shape
        if self.weighting == "gram":
            task = self.problem(w, stats)
            target = gram.solve(task) if task.has_targets else task.weight
            size = jnp.mean(jnp.diagonal(task.gram))
            ones = jnp.ones((o,), jnp.float32), jnp.ones((i,), jnp.float32)
            return target, task.gram / size, *ones, task.damping.astype(jnp.float32)
        energy = stats.sq_norm / stats.count
        if self.center:
            energy = energy - jnp.square(stats.mean)
        bar, r, c = saliency.normalise(w)
        return bar, saliency.channel_weights(energy), r, c, jnp.zeros((), jnp.float32)

    def _first(
        self,
        key: Array,
        w: Array,
        stats: Stats,
        sparsity: Array | float | None,
        prev: State | None,
    ) -> tuple[Array | None, Support, State | None]:
        """The core f32[o, i] (None for the target), its support, the inner state."""
        before = None if prev is None else prev.fixed["support"]
        if self._start is None:
            scores = saliency.nowag(w, stats.sq_norm)
            return None, self.pattern.project(key, scores, sparsity, before), None
        if prev is not None:
            fixed = prev.fixed["start"].fixed | {"support": before}
            prev = dataclasses.replace(prev.fixed["start"], fixed=fixed)
        state = self._start.solve(key, w, stats, sparsity=sparsity, prev=prev)
        plan = self._start.decide(state, w)
        return plan.weight.astype(jnp.float32), plan.support, state

    def _order(self, support: Support) -> Array | None:
        """i32[i]: the order in which the inputs are cut into blocks; None: natural."""
        if self.groups is not None and self.pattern != self.pattern.natural():
            assert support.regions is not None
            return support.regions.in_order[0]
        return None

    def _fit(
        self, key: Array, first: Factors, target: Array, h: Array, fixed: bool
    ) -> tuple[Factors, Array]:
        """The best factors and the trace of losses; `fixed` keeps the support."""
        groups = Groups(1, 1, 0)
        if self.groups is not None and not fixed and first.b.shape[1] > 1:
            n, m = self.groups
            groups = Groups(n, m, self.updates if n < m else 0)
        steps = STEPS[self.solver] if self.steps is None else self.steps
        if self.solver == "adam":
            return factorised.fit_adam(
                key, first, target, h, groups, steps=steps, rate=self.rate
            )
        return factorised.fit(first, target, h, groups, steps=steps, values=self.values)

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """Core and factors in the dtype of `w`, of which nothing else is used."""
        del key
        fixed, bias = state.fixed, state.fixed.get("bias")
        cast = lambda f: dataclasses.replace(f, blocks=f.blocks.astype(w.dtype))  # noqa: E731
        return Plan(
            weight=fixed["weight"].astype(w.dtype),
            support=fixed["support"],
            retained=fixed["retained"],
            bias=None if bias is None else bias.astype(w.dtype),
            left=cast(fixed["left"]),
            right=cast(fixed["right"]),
        )
