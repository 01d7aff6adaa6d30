"""What methods that learn gates inside N:M groups share.

A weight lies in a dense column, in a pruned one, or in an N:M group. Only groups that
are still open have gates; everywhere else the support decides. At the end of a stage
the gates harden to exactly n of m, and the next stage opens gates only in groups of
columns that were dense before, so the kept set never grows back (FlexHiNM-GP, ICLR
2026, openreview YaZraqRsbB; which groups survive a stage is our choice, see
`ops.regions.shrink`).
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.methods.magnitude import Magnitude
from flexhinm_jax.ops import groups, masks, saliency
from flexhinm_jax.types import Plan, State, Stats, Support


@dataclasses.dataclass(frozen=True)
class Gated(LearnedMethod):
    """Gates that choose the n of m, starting from the support that scores find.

    `State.fixed` holds `support` (of the last hard choice), `open` (bool[o, i], where a
    gate is still free), `temperature` and `progress`. A pattern without groups
    (`Vector`, `Unstructured`) has no gates and behaves like its scores.

    Attributes:
      scores: importance for regions, orders and the first support; a pattern given to
        it is replaced by that of the method.
      temperature: first and last temperature of a stage, between them geometric.
      start: what the gates of the first support start with; the others are negative.
    """

    _: dataclasses.KW_ONLY
    scores: ScoreMethod = Magnitude()
    temperature: tuple[float, float] = (2 / 3, 0.1)
    start: float = 2.0

    adopts_plans: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if not isinstance(self.scores, ScoreMethod):
            raise ValueError(
                f"scores={self.scores!r}: need a method that scores, such as Magnitude"
                "() or Wanda(); to start from the plans of another method, use "
                "adopt"
            )
        object.__setattr__(self, "scores", self.scores.with_pattern(self.pattern))
        first, last = self.temperature
        if not first >= last > 0:
            raise ValueError(
                f"temperature={self.temperature}: need (first, last) with first >= "
                "last > 0"
            )
        if not self.start >= 0:
            raise ValueError(f"start={self.start}: need a number >= 0")

    @property
    def needs(self) -> Any:
        """What the scores read of the statistics."""
        return self.scores.needs

    @abc.abstractmethod
    def first(self, support: Support) -> Any:
        """`State.learned` whose hard choice is the given support."""

    @abc.abstractmethod
    def best(self, state: State) -> Array:
        """The n of every group that the gates prefer now, bool[o, i]."""

    def choice(self, state: State) -> Support:
        """The best n of every open group, elsewhere the support."""
        support: Support = state.fixed["support"]
        if support.regions is None:
            return support
        keep = jnp.where(state.fixed["open"], self.best(state), support.keep)
        return Support(keep, support.regions)

    @abc.abstractmethod
    def gates(
        self, state: State, shape: tuple[int, ...], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Sampled gates f32[o, i], read where they are open, and their loss terms."""

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Projects the scores and opens gates in every new group; see `Method.solve`.

        With `prev`, gates that are still open harden first.
        """
        self.check(w, stats, sparsity)
        scores = self.scores.score(w, stats)
        before = None if prev is None else self.harden(prev, w).fixed["support"]
        support = self.pattern.project(key, scores, sparsity, before)
        return self.begin(support, before)

    def begin(self, support: Support, before: Support | None = None) -> State:
        """The state at the start of a stage.

        Args:
          support: regions and first choice.
          before: the hardened support of the stage before: its groups stay hardened.
        """
        if support.regions is None:
            free = jnp.zeros(support.keep.shape, bool)
        else:
            free = groups.nm_weights(support.regions)
            if before is not None:
                assert before.regions is not None
                free &= groups.dense_weights(before.regions)
        fixed = {
            "support": support,
            "open": free,
            "temperature": jnp.asarray(self.temperature[0], jnp.float32),
            "progress": jnp.zeros((), jnp.float32),
        }
        return State(self.first(support), fixed)

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """The weight under its gates.

        With a key the gates are sampled; the support of that plan holds every weight
        that may still be chosen, so it is looser than the pattern.
        """
        if key is not None:
            return self.sample(state, w, key=key)[0]
        support = self.choice(state)
        weight = jnp.where(support.keep, w, jnp.zeros((), w.dtype))
        return Plan(weight, support, _retained(w, support.keep))

    def sample(
        self, state: State, w: Array, *, key: Array
    ) -> tuple[Plan, dict[str, Array]]:
        """The sampled plan and its loss terms."""
        support, free = state.fixed["support"], state.fixed["open"]
        z, terms = self.gates(state, w.shape, key)
        zero = jnp.zeros((), w.dtype)
        kept = jnp.where(support.keep, w, zero)
        weight = jnp.where(free, w * z.astype(w.dtype), kept)
        keep = support.keep | free
        return Plan(weight, Support(keep, support.regions), _retained(w, keep)), terms

    def penalty(self, state: State, w: Array, *, key: Array) -> dict[str, Array]:
        """The loss terms of the sampled gates."""
        return self.gates(state, w.shape, key)[1]

    def anneal(self, state: State, progress: Array | float) -> State:
        """Sets the temperature, first * (last / first)^progress."""
        first, last = self.temperature
        progress = jnp.clip(jnp.asarray(progress, jnp.float32), 0, 1)
        now = {"temperature": first * (last / first) ** progress, "progress": progress}
        return dataclasses.replace(state, fixed=state.fixed | now)

    def harden(self, state: State, w: Array) -> State:
        """Closes every gate at exactly n of m."""
        del w
        now = {
            "support": self.choice(state),
            "open": jnp.zeros_like(state.fixed["open"]),
        }
        return dataclasses.replace(state, fixed=state.fixed | now)

    def metrics(self, state: State) -> dict[str, Array]:
        """Hard sparsity, temperature and the fraction of weights with an open gate."""
        keep = state.fixed["support"].keep
        return {
            "sparsity": 1 - jnp.mean(keep, dtype=jnp.float32),
            "temperature": state.fixed["temperature"],
            "open": jnp.mean(state.fixed["open"], dtype=jnp.float32),
        }


def open_groups(state: State) -> Array:
    """Which groups of `groups.to_groups` still have free gates, bool[t, i // m]."""
    regions = state.fixed["support"].regions
    tiles = regions.in_order.shape[0]
    rows = regions.out_order.reshape(tiles, -1)[:, 0]
    order = groups.group_order(regions)[:, :: regions.m]
    free = jnp.take_along_axis(state.fixed["open"][rows], order, axis=1)
    return free & groups.live_groups(regions)


def scheduled(method: Any, state: State, progress: Any, *names: str) -> State:
    """The state with fields (first, last) of a method, linear in the progress."""
    progress = jnp.clip(jnp.asarray(progress, jnp.float32), 0, 1)
    now = {"progress": progress}
    for name in names:
        first, last = getattr(method, name)
        now[name] = first + (last - first) * progress
    return dataclasses.replace(state, fixed=state.fixed | now)


def reward(method: Any, state: State, weight: Array, w: Array) -> Array:
    """The loss term of the squared weights that a sample keeps, fading, f32[]."""
    kept = jnp.sum(jnp.square(weight.astype(jnp.float32)))
    total = jnp.sum(jnp.square(w.astype(jnp.float32)))
    share = kept / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return -method.reward * (1 - state.fixed["progress"]) * share


def mean_where(x: Array, mask: Array) -> Array:
    """Mean of the entries that `mask` marks, 0 when there are none, f32[]."""
    mask = jnp.broadcast_to(mask, x.shape)
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32) / jnp.maximum(count, 1)


def _retained(w: Array, keep: Array) -> Array:
    return jax.lax.stop_gradient(masks.retained(saliency.squared(w), keep))
