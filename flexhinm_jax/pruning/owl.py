"""OWL: blocks with many outlying weights keep more of them.

Yin et al., "Outlier Weighed Layerwise Sparsity: a missing secret sauce for pruning LLMs
to high sparsity" (arXiv:2310.05175). The score of a weight is Wanda's; the layerwise
outlier distribution (LOD) is, per block, the share of scores above M times the mean of
the block. Densities follow it linearly within a range of 2 lambda and are shifted to
the target. The paper's blocks have equal sizes and any sparsity can be had; here the
shift weighs blocks by their weights and stays within what every pattern can express.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.ops import saliency
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Stats, Uses

BLOCK = r"^.*?[^./]*\d(?=[./]|$)"
"""Up to the first part of a path that ends in a digit: "model.layers.3"."""


@dataclasses.dataclass(frozen=True)
class OWL:
    """How sparsities follow the outliers of blocks.

    Attributes:
      multiple: M; a weight is an outlier when its score is more than so many times the
        mean score of its block. 5 in the paper.
      spread: lambda; densities of the blocks lie in a range of twice this width. 0.08
        in the paper.
      block: regular expression; paths with the same match are one block. A path
        without a match is a block of its own.

    Example:
      >>> OWL().name("model.layers.12.self_attn.q_proj.weight")
      'model.layers.12'
    """

    multiple: float = 5.0
    spread: float = 0.08
    block: str = BLOCK

    def __post_init__(self):
        """Validates the configuration."""
        arguments.configuration(self)
        if not isinstance(self.block, str):
            raise ValueError(f"block={self.block!r}: need a regular expression")
        if not self.multiple > 0:
            raise ValueError(f"multiple={self.multiple}: need a positive number")
        if not 0 <= self.spread <= 0.5:
            raise ValueError(
                f"spread={self.spread}: need a number in [0, 0.5], half the range of"
                " the densities"
            )
        try:
            re.compile(self.block)
        except re.error as error:
            raise ValueError(
                f"block={self.block!r} is no regular expression: {error}"
            ) from error

    def name(self, path: str) -> str:
        """The block of a leaf."""
        block = re.search(self.block, path)
        return path if block is None else block[0]


def outlier_shares(
    owl: OWL, params: Any, uses: Uses, stats: Mapping[str, Stats] | None
) -> dict[str, float]:
    """The share of outliers in the block of every prunable leaf (equation 1: LOD).

    Args:
      owl: which weights are outliers, and what a block is.
      params: the parameter tree.
      uses: from `discover`.
      stats: from `calibrate`; norms are enough. None counts magnitudes.

    Returns:
      path -> fraction in [0, 1], the same for all leaves of a block.
    """
    leaves = Leaves.of(params).dense(uses)
    blocks = defaultdict(list)
    for path in uses.leaves:
        blocks[owl.name(path)].append(path)
    shares = {}
    for paths in blocks.values():
        pairs = []
        for path in paths:
            w, energy = leaves.matrix(uses.leaves[path]), None
            if stats is not None:
                one = stats[path]
                count = jnp.maximum(one.count, 1.0)[..., None]
                energy = one.sq_norm / count
            pairs.append((w, energy))
        shares |= dict.fromkeys(paths, share(pairs, owl.multiple))
    return {path: shares[path] for path in uses.leaves}


def share(pairs: Iterable[tuple[Array, Array | None]], multiple: float) -> float:
    """The fraction of all scores that are above `multiple` times their mean.

    Args:
      pairs: weights [*stack, o, i] and mean squared inputs f32[*stack, i], or None.
      multiple: M.

    Example:
      >>> import jax.numpy as jnp
      >>> share([(jnp.array([[1.0, 1, 1, 13]]), jnp.ones(4))], multiple=3)
      0.25
    """
    pairs = list(pairs)
    size = sum(w.size for w, _ in pairs)
    # Rows on the device, their sum in double precision: matrices may be large.
    total = sum(np.asarray(_sums(*pair), np.float64).sum() for pair in pairs)
    limit = jnp.asarray(multiple * total / size, jnp.float32)
    above = sum(np.asarray(_above(*pair, limit), np.int64).sum() for pair in pairs)
    return float(above / size)


def _scores(w: Array, sq_norm: Array | None) -> Array:
    if sq_norm is None:
        return saliency.magnitude(w)
    return saliency.wanda(w, sq_norm[..., None, :])


@jax.jit
def _sums(w: Array, sq_norm: Array | None) -> Array:
    return jnp.sum(_scores(w, sq_norm), axis=-1)


@jax.jit
def _above(w: Array, sq_norm: Array | None, limit: Array) -> Array:
    return jnp.sum(_scores(w, sq_norm) > limit, axis=-1, dtype=jnp.int32)


def densities(owl: OWL, shares: Mapping[str, float]) -> dict[str, float]:
    """Densities up to a common shift: shares scaled to [0, 2 lambda].

    Args:
      owl: the spread.
      shares: path -> share of outliers in its block.

    Raises:
      ValueError: all leaves lie in one block.

    Example:
      >>> densities(OWL(spread=0.25), {"a.0": 0.25, "a.1": 0.75, "a.2": 0.5})
      {'a.0': 0.0, 'a.1': 0.5, 'a.2': 0.25}
    """
    names = {owl.name(path) for path in shares}
    if len(names) < 2:
        raise ValueError(
            f"owl compares blocks, but all weights are of one, {', '.join(names)!r};"
            f" {arguments.say('owl blocks')}"
        )
    least, most = min(shares.values()), max(shares.values())
    scale = 2 * owl.spread / (most - least) if most > least else 0.0
    return {path: (x - least) * scale for path, x in shares.items()}
