"""N:M sparsity: n weights stay of every m consecutive inputs of every row.

Mishra et al. 2021 (arXiv:2104.08378). 2:4 is what NVIDIA's sparse tensor cores run.
With a permutation the groups are m inputs of one order that all rows share (RIA channel
permutation, Zhang et al. 2024; apex ASP), which costs one gather at run time.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.ops import channels, masks, regions
from flexhinm_jax.patterns.base import Grouped, Pattern, Units, check_n_of_m
from flexhinm_jax.patterns.permute import PERMUTES, ChannelSearch
from flexhinm_jax.types import Regions, Support


@dataclasses.dataclass(frozen=True)
class NM(Grouped):
    """Keeps the n best of every m inputs.

    Attributes:
      n: kept per group.
      m: group size; divides the inputs of the weight.
      permute: None for natural order, ChannelSearch() for one searched input order.
    """

    permute: ChannelSearch | None = None
    letters: ClassVar[dict[str, str]] = {"n": "n", "m": "m", "permute": "permute"}
    choices: ClassVar[dict[str, dict[str, Any]]] = {
        "permute": {name: PERMUTES[name] for name in ("none", "channels")}
    }

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        check_n_of_m(self.n, self.m)
        if self.permute is not None and type(self.permute) is not ChannelSearch:
            raise ValueError(
                f"permute={self.permute!r}: N:M has no row tiles to search; need "
                "ChannelSearch() or None"
            )

    one_order: ClassVar[bool] = True

    def natural(self) -> Pattern:
        """Groups of consecutive inputs."""
        return dataclasses.replace(self, permute=None)

    def project(
        self,
        key: Array,
        scores: Array,
        sparsity: Array | float | None = None,
        prev: Support | None = None,
    ) -> Support:
        """Keeps the n best of each group; `sparsity` is not used.

        `key` is consumed by the search of the input order. With `prev` the support is
        `prev`: there is no smaller one of the same pattern.
        """
        del sparsity
        self.check_shape(jnp.shape(scores))
        if prev is not None:
            return prev
        if self.permute is not None:
            checks.finite(scores, "scores")
            return self._search(key, jnp.asarray(scores, jnp.float32))
        keep = masks.n_of_m(scores, n=self.n, m=self.m)
        groups = regions.natural_groups(scores.shape, self.n, self.m)
        return Support(keep, groups)

    def refine(self, support: Support, scores: Array) -> Support:
        """Chooses every group anew; in natural order without a gather."""
        if self.permute is not None:
            return super().refine(support, scores)
        return Support(masks.n_of_m(scores, n=self.n, m=self.m), support.regions)

    @functools.partial(jax.jit, static_argnums=0)
    def _search(self, key, scores):
        """The best of the natural and the searched input order."""
        assert self.permute is not None
        o, i = scores.shape
        tiles = scores[None]
        none = jnp.zeros((), jnp.int32)
        h = jnp.asarray(i // self.m, jnp.int32)

        def whole(order):
            return regions.Columns(order, none, h, self.n, self.m)

        natural = whole(regions.natural_order(i))
        dealt = whole(channels.serpentine(scores, self.m))
        better = regions.value(tiles, dealt) > regions.value(tiles, natural)
        start = whole(jnp.where(better, dealt.order, natural.order))
        order = self.permute.columns(key, tiles, start).order
        ends = jnp.zeros((1,), jnp.int32), jnp.full((1,), i, jnp.int32)
        keep = regions.kept(tiles, order, *ends, self.n, self.m)[0]
        rows = jnp.arange(o, dtype=jnp.int32)
        return Support(keep, Regions(rows, order, *ends, self.n, self.m))

    def units(self) -> Units:
        """Groups of inputs; all of them where their order is searched."""
        return Units(1, self.m if self.permute is None else None)
