"""MaskPro: learns N:M masks from losses alone, without a backward pass.

MaskPro, ICLR 2026 (arXiv:2506.12876). A group has one logit per weight and draws n of m
without replacement. The gradient is that of the log-probability of the drawn masks,
times how much higher their loss is than that of the first masks on the same batch, less
a moving average. Memory is one number per weight for any n:m.

Departure: the gradient is `jax.grad` of the exact log-probability for every n; the
published closed form holds for n = 2.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.methods.gated import Gated, mean_where, open_groups
from flexhinm_jax.methods.learned import ScoreFunction
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.ops import gates, groups, masks
from flexhinm_jax.types import Plan, State, Support


@dataclasses.dataclass(frozen=True)
class MaskPro(Gated, ScoreFunction):
    """Learns one logit per weight by the score function; the weights stay as they are.

    The loss is only evaluated, twice per step. As published, use plain `optax.sgd` with
    a large rate: the gradient is proportional to differences of losses.

    Attributes:
      pattern: supports with N:M groups, n at most 6.
      scores: the one-shot method whose mask is the prior and the baseline.
      temperature: not used.
      start: logit of the prior's weights over the others; at 10 one 2:4 group in 7000
        draws something else than the prior.
    """

    _: dataclasses.KW_ONLY
    scores: ScoreMethod = Wanda()
    temperature: tuple[float, float] = (1.0, 1.0)
    start: float = 10.0

    chooses_groups: ClassVar[bool] = True
    frozen_weights: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        n, _ = self.pattern.form or (1, 1)
        if n > gates.MAX_EXACT_N:
            raise ValueError(
                f"{self.pattern}: MaskPro sums over 2^n subsets and stops at n="
                f"{gates.MAX_EXACT_N}; MaskLLM(parameters='weights') does not"
            )

    def first(self, support: Support) -> Any:
        """The prior without noise."""
        regions = support.regions
        assert regions is not None
        keep = groups.to_groups(support.keep.astype(jnp.float32), regions)
        return {"logits": self.start * keep}

    def best(self, state: State) -> Array:
        """The n largest logits of every group."""
        regions = state.fixed["support"].regions
        kept = masks.group_ranks(state.learned["logits"]) < regions.n
        return groups.from_groups(kept, regions)

    def gates(
        self, state: State, shape: tuple[int, int], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Masks drawn without replacement: exactly n of m, no gradient; no terms."""
        del shape
        regions = state.fixed["support"].regions
        drawn = self._draw(state, key).astype(jnp.float32)
        return groups.from_groups(drawn, regions), {}

    def log_prob(self, state: State, *, key: Array) -> Array:
        """Log-probability of the masks that `decide` draws with this key, f32[]."""
        n = state.fixed["support"].regions.n
        drawn = self._draw(state, key)
        each = gates.log_prob(state.learned["logits"], drawn, n=n)
        free = open_groups(state)[:, None]
        return jnp.sum(jnp.where(free, each, 0), dtype=jnp.float32)

    def baseline(self, state: State, w: Array) -> Plan:
        """The first masks."""
        support = state.fixed["support"]
        weight = jnp.where(support.keep, w, jnp.zeros((), w.dtype))
        return Plan(weight, support, jnp.ones((), jnp.float32))

    def metrics(self, state: State) -> dict[str, Array]:
        """Also `gap`: mean distance of the kept logits of a group from the others."""
        logits = state.learned["logits"]
        best = masks.group_ranks(logits) < state.fixed["support"].regions.n
        low = jnp.min(jnp.where(best, logits, jnp.inf), axis=-1)
        high = jnp.max(jnp.where(best, -jnp.inf, logits), axis=-1)
        gap = mean_where(low - high, open_groups(state)[:, None])
        return super().metrics(state) | {"gap": gap}

    def _draw(self, state: State, key: Array) -> Array:
        """bool[t, v, i / m, m]."""
        regions = state.fixed["support"].regions
        order = gates.draw(key, state.learned["logits"], n=regions.n)
        return gates.members(order, m=regions.m)
