"""Hard Concrete gates on the weights of N:M groups; with FlexHiNM, FlexHiNM-GP.

FlexHiNM-GP, ICLR 2026 (openreview YaZraqRsbB), gives every weight of an N:M group a
gate z of Louizos et al. 2018 (arXiv:1712.01312) and trains with

    loss + sparsity_weight * mean(z) + count_weight * mean over groups |sum z - n|

The paper leaves open both weights, the initialisation, the temperatures and what makes
a group exact at the end. Ours: gates start at +-`start` by the support of the scores,
the count term grows linearly over a stage, and hardening keeps the n largest
`log_alpha` of a group, which is the paper's threshold wherever that leaves n.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.gated import Gated, mean_where, open_groups
from flexhinm_jax.ops import gates, groups, masks
from flexhinm_jax.types import State, Support


@dataclasses.dataclass(frozen=True)
class HardConcrete(Gated):
    """One gate per weight of every open group.

    Attributes:
      pattern: the supports to choose from; `FlexHiNM(...)` gives FlexHiNM-GP.
      scores: importance for regions, orders and the first support.
      temperature: first and last temperature of a stage.
      start: log_alpha starts at +start where the first support keeps, else -start.
      sparsity_weight: weight of mean(z), the paper's lambda_s.
      count_weight: weight of mean |sum z - n| at the end of a stage, lambda_c.
      limit: |log_alpha| stays below it.
      relaxation: what training sees. "soft" samples gates, as the paper does;
        "straight_through" forwards exactly n of m, those with the largest noisy
        log_alpha, with the gradient of the samples. "expected" and "decided" are the
        same without noise: gates at log_alpha / temperature, and the hard mask with
        their gradient, which is zero from 2.4 temperatures on. Together with
        `relative` as their optimiser these beat the first two (train/LOG.md). With
        `Transposable` only the rows of hard masks are exact before `harden`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flexhinm_jax.patterns import NM
      >>> method, w = HardConcrete(NM(2, 4)), jnp.array([[3.0, 1, -2, 0]])
      >>> state = method.solve(jax.random.key(0), w, None)
      >>> method.decide(state, w).weight.tolist()
      [[3.0, 0.0, -2.0, 0.0]]
    """

    _: dataclasses.KW_ONLY
    sparsity_weight: float = 0.01
    count_weight: float = 1.0
    limit: float = 5.0
    relaxation: gates.Relaxation = "soft"

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        gates.check_relaxation(self.relaxation)
        if min(self.sparsity_weight, self.count_weight) < 0:
            raise ValueError(
                f"sparsity_weight={self.sparsity_weight}, count_weight="
                f"{self.count_weight}: need numbers >= 0"
            )
        edge = self.temperature[0] * gates.SATURATION
        if self.relaxation not in gates.NOISY and self.start >= edge:
            raise ValueError(
                f"relaxation={self.relaxation!r}, start={self.start}: without noise no "
                f"gate has a gradient from {edge:.3g} on, {gates.SATURATION:.3g} times "
                f"temperature[0]={self.temperature[0]:.3g}; give a smaller start, such "
                "as 0.5"
            )
        if not self.limit >= self.start:
            raise ValueError(
                f"limit={self.limit}: need at least start={self.start}, the first "
                "value of a gate"
            )

    def first(self, support: Support) -> Any:
        """+-start by the support."""
        if support.regions is None:
            return ()
        start = jnp.asarray(self.start, jnp.float32)
        return {"log_alpha": jnp.where(support.keep, start, -start)}

    def best(self, state: State) -> Array:
        """The n largest log_alpha of every group."""
        support, log_alpha = state.fixed["support"], state.learned["log_alpha"]
        if self.pattern.free_rows:
            return self._n_best(log_alpha, support)
        # Rows and columns are chosen together, by a solver that wants scores >= 0.
        return self.pattern.refine(support, log_alpha + self.limit).keep

    def gates(
        self, state: State, shape: tuple[int, ...], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The relaxed gates and the two loss terms."""
        support, free = state.fixed["support"], state.fixed["open"]
        if support.regions is None:
            return jnp.zeros(shape, jnp.float32), {}
        logits = state.learned["log_alpha"]
        if self.relaxation in gates.NOISY:
            logits += gates.logistic(key, shape)
        z = gates.stretch(logits / state.fixed["temperature"])
        regions = support.regions
        off = jnp.zeros((), jnp.float32)
        if self.relaxation in gates.HARD:  # every group of a row has n
            z = gates.straight_through(z, self._n_best(logits, support))
        else:
            totals = groups.sums(z, regions)
            wrong = jnp.abs(totals - regions.n)
            off = mean_where(wrong, open_groups(state)[:, None])
        if not self.pattern.free_rows:
            o, i = shape
            columns = jnp.sum(z.reshape(o // regions.m, regions.m, i), axis=1)
            some = jnp.any(free)
            off += jnp.where(some, jnp.mean(jnp.abs(columns - regions.n)), 0)
        ramp = self.count_weight * state.fixed["progress"]
        return z, {
            "gates": self.sparsity_weight * mean_where(z, free),
            "count": ramp * off,
        }

    def constrain(self, state: State) -> State:
        """Clips log_alpha to [-limit, limit]."""
        clip = lambda x: jnp.clip(x, -self.limit, self.limit)  # noqa: E731
        return dataclasses.replace(state, learned=jax.tree.map(clip, state.learned))

    def metrics(self, state: State) -> dict[str, Array]:
        """Also the sparsity expected of sampled gates."""
        figures = super().metrics(state)
        if state.fixed["support"].regions is None:
            return figures | {"expected_sparsity": figures["sparsity"]}
        density = gates.expected_l0(
            state.learned["log_alpha"], state.fixed["temperature"]
        )
        keep = state.fixed["support"].keep
        density = jnp.where(state.fixed["open"], density, keep)
        return figures | {"expected_sparsity": 1 - jnp.mean(density, dtype=jnp.float32)}

    def _n_best(self, logits: Array, support: Support) -> Array:
        """bool[o, i]: the n largest of every group."""
        regions = support.regions
        assert regions is not None
        ordered = groups.to_groups(jax.lax.stop_gradient(logits), regions)
        return groups.from_groups(masks.group_ranks(ordered) < regions.n, regions)
