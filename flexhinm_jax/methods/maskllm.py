"""MaskLLM: learns which pattern every N:M group keeps, weights frozen.

MaskLLM, NeurIPS 2024 (arXiv:2409.17481). Each group has a logit per legal pattern;
training sees the mean of the patterns under Gumbel softmax, which gets colder while the
logits are scaled up, and the largest logit decides at the end. The defaults are those
of the released code: temperature 4 -> 0.05, scale 100 -> 500, prior strength 3, soft.

Departures: the groups are those of the regions, so HiNM, FlexHiNM and permuted N:M
learn inside the groups they have; the prior comes without noise, which the Gumbel noise
makes superfluous; the reward for large kept weights is relative to the weight's size.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods import gated
from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.methods.gated import Gated, mean_where, open_groups
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.ops import gates, groups
from flexhinm_jax.types import Plan, State, Support


@dataclasses.dataclass(frozen=True)
class MaskLLM(Gated):
    """Learns one of the C(m, n) patterns per group; the weights stay as they are.

    Attributes:
      pattern: supports with N:M groups.
      scores: the one-shot method whose mask is the prior.
      temperature: first and last temperature, linear in the progress.
      start: first scale x initial logit of the prior; 3 starts 2:4 with its prior
        pattern at probability .832, 0 without a prior.
      parameters: "patterns" for C(m, n) logits per group, "weights" for m scores.
      relaxation: what training sees: "soft", "straight_through", "expected" or
        "decided", see `ops.gates.pattern_mask`. With few steps from a good prior the
        noise of the first two costs more than it finds; "decided" trains the hard mask.
      scale: first and last factor on the logits, linear in the progress.
      reward: the share of the squared weights that is kept is subtracted from the loss
        with this factor, which fades to 0 with the progress.
    """

    _: dataclasses.KW_ONLY
    scores: ScoreMethod = Wanda()
    temperature: tuple[float, float] = (4.0, 0.05)
    start: float = 3.0
    parameters: gates.Parameters = "patterns"
    relaxation: gates.Relaxation = "soft"
    scale: tuple[float, float] = (100.0, 500.0)
    reward: float = 0.1

    chooses_groups: ClassVar[bool] = True
    frozen_weights: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.parameters not in ("patterns", "weights"):
            raise ValueError(
                f"parameters={self.parameters!r}: choose 'patterns' or 'weights'"
            )
        gates.check_relaxation(self.relaxation)
        if len(self.scale) != 2 or min(self.scale) <= 0:
            raise ValueError(f"scale={self.scale}: need (first, last), both above 0")

    def first(self, support: Support) -> Any:
        """The prior, so strong that its probability is as configured."""
        regions = support.regions
        assert regions is not None
        logits = gates.initial_logits(
            groups.to_groups(support.keep, regions),
            n=regions.n,
            m=regions.m,
            parameters=self.parameters,
            prior=self.start / self.scale[0],
        )
        return {"logits": logits}

    def best(self, state: State) -> Array:
        """The pattern of every group with the largest logit."""
        regions = state.fixed["support"].regions
        kept = gates.best_pattern(self._logits(state), regions.n, regions.m)
        return groups.from_groups(kept, regions)

    def gates(
        self, state: State, shape: tuple[int, int], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The relaxed masks of all groups; no terms."""
        del shape
        regions = state.fixed["support"].regions
        mixed = gates.pattern_mask(
            key,
            state.fixed["scale"] * self._logits(state),
            state.fixed["temperature"],
            n=regions.n,
            m=regions.m,
            relaxation=self.relaxation,
        )
        return groups.from_groups(mixed, regions), {}

    def sample(
        self, state: State, w: Array, *, key: Array
    ) -> tuple[Plan, dict[str, Array]]:
        """The sampled plan, and the reward for the squared weights that it keeps."""
        plan, terms = super().sample(state, w, key=key)
        return plan, terms | {"reward": gated.reward(self, state, plan.weight, w)}

    def penalty(self, state: State, w: Array, *, key: Array) -> dict[str, Array]:
        """The terms of the sample."""
        return self.sample(state, w, key=key)[1]

    def begin(self, support: Support, before: Support | None = None) -> State:
        """The state at the start of a stage, schedules included."""
        return self.anneal(super().begin(support, before), 0.0)

    def anneal(self, state: State, progress: Array | float) -> State:
        """Temperature and scale, linear in the progress."""
        return gated.scheduled(self, state, progress, "temperature", "scale")

    def metrics(self, state: State) -> dict[str, Array]:
        """Also `confidence`: mean probability of the pattern on top of open groups."""
        p = jax.nn.softmax(state.fixed["scale"] * self._logits(state), axis=-1)
        free = open_groups(state)[:, None]
        confidence = mean_where(jnp.max(p, axis=-1), free)
        return super().metrics(state) | {"confidence": confidence}

    def _logits(self, state: State) -> Array:
        """f32[t, v, i / m, C(m, n)], unscaled."""
        regions = state.fixed["support"].regions
        return gates.logits_of_patterns(
            state.learned["logits"],
            n=regions.n,
            m=regions.m,
            parameters=self.parameters,
        )
