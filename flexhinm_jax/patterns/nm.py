"""N:M sparsity: n weights stay of every m consecutive inputs of every row.

Mishra et al. 2021 (arXiv:2104.08378). 2:4 is what NVIDIA's sparse tensor cores run.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.ops import masks, regions
from flexhinm_jax.patterns.base import Pattern, check_n_of_m
from flexhinm_jax.types import Regions, Support


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """Keeps the n best of every m inputs, in natural order.

    Attributes:
      n: kept per group.
      m: group size; divides the inputs of the weight.
    """

    n: int = 2
    m: int = 4
    letters: ClassVar[dict[str, str]] = {"n": "n", "m": "m"}

    def __post_init__(self):
        """Validates the configuration."""
        check_n_of_m(self.n, self.m)

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """Keeps the n best of each group; `key` and `sparsity` are not used.

        With `prev` the support is `prev`: there is no smaller one of the same pattern.
        """
        del key, sparsity
        if prev is not None:
            return prev
        o, i = scores.shape
        keep = masks.n_of_m(scores, n=self.n, m=self.m)
        return Support(
            keep,
            Regions(
                out_order=jnp.arange(o, dtype=jnp.int32),
                in_order=regions.natural_order(1, i),
                dense_end=jnp.zeros((1,), jnp.int32),
                nm_end=jnp.full((1,), i, jnp.int32),
                n=self.n,
                m=self.m,
            ),
        )

    def check_shape(self, shape: tuple[int, ...], path: str = "weight") -> None:
        """Raises ValueError unless m divides the inputs."""
        super().check_shape(shape, path)
        checks.divisible(shape[1], self.m, "in", "m", path)

    def sparsity_range(self) -> tuple[float, float]:
        """Only 1 - n / m."""
        return 1 - self.n / self.m, 1 - self.n / self.m

    def granularity(self, shape: tuple[int, int]) -> float:
        """One weight of a group: the kept fraction is n / m exactly."""
        return 1 / shape[1]
