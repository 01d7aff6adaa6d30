"""Gumbel softmax over the C(m, n) patterns of every group: the usual baseline.

FlexHiNM-GP (ICLR 2026, openreview YaZraqRsbB) compares its gates with this choice, as
does MaskLLM (arXiv:2409.17481), which learns it on frozen weights with a loss of its
own. Every sample keeps n of m on average by construction, so there is no count term.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.gated import Gated
from flexhinm_jax.ops import gates, groups
from flexhinm_jax.types import State, Support

MOST = 256  # patterns of a group; 4:8 has 70


@dataclasses.dataclass(frozen=True)
class GumbelPatterns(Gated):
    """One logit per pattern of every open group, trained with the weights.

    Attributes:
      pattern: the supports to choose from.
      scores: importance for regions, orders and the first support.
      temperature: first and last temperature of a stage.
      start: the first pattern's logit begins here, the others at 0.
    """

    free_rows: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        n, m = self.pattern.form or (1, 1)
        if math.comb(m, n) > MOST:
            raise ValueError(
                f"{self.pattern}: {n} of {m} has {math.comb(m, n)} patterns per group, "
                f"more than {MOST}; use HardConcrete, which needs {m} gates"
            )

    def first(self, support: Support) -> Any:
        """A bonus for the pattern of the support."""
        regions = support.regions
        if regions is None:
            return ()
        table = jnp.asarray(gates.pattern_table(regions.n, regions.m), jnp.float32)
        keep = groups.to_groups(support.keep.astype(jnp.float32), regions)
        same = jnp.einsum("tvgm,km->tvgk", keep, table) >= regions.n
        return {"logits": self.start * same.astype(jnp.float32)}

    def best(self, state: State) -> Array:
        """The pattern of every group with the largest logit."""
        regions = state.fixed["support"].regions
        kept = gates.best_pattern(state.learned["logits"], regions.n, regions.m)
        return groups.from_groups(kept, regions)

    def gates(
        self, state: State, shape: tuple[int, ...], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The mixture of patterns that Gumbel softmax draws."""
        regions = state.fixed["support"].regions
        if regions is None:
            return jnp.zeros(shape, jnp.float32), {}
        logits, temperature = state.learned["logits"], state.fixed["temperature"]
        drawn = gates.gumbel_softmax(key, logits, temperature)
        mixed = gates.mixed_pattern(drawn, regions.n, regions.m)
        return groups.from_groups(mixed, regions), {}
