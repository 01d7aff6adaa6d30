"""A learnable choice of n of m per group: logits, their prior, relaxations and result.

MaskLLM (arXiv:2409.17481) gives every group one logit per legal pattern. One logit per
weight ("weights") is smaller, takes any n:m without C(m, n) numbers, and represents the
sums of weight logits only: for 2:4 three of five degrees of freedom.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.ops import gates

Parameters = Literal["patterns", "weights"]


def similarity(keep: Array, *, n: int, m: int) -> Array:
    """How much every pattern agrees with a given mask, centred.

    Args:
      keep: bool[..., m], the prior mask of each group; n True, other counts allowed.
      n: kept per group.
      m: group size.

    Returns:
      f32[..., C(m, n)], common weights minus their mean n^2 / m over the patterns; for
      2:4 it is 1 for the same pattern, 0 for the neighbours and -1 for the complement.

    Source: arXiv:2409.17481, section 3.3.
    """
    table = jnp.asarray(gates.pattern_table(n, m), jnp.float32)
    common = jnp.matmul(keep.astype(jnp.float32), table.T, precision="highest")
    return common - n * n / m


def initial(
    keep: Array,
    *,
    n: int,
    m: int,
    parameters: Parameters = "patterns",
    prior: float = 0.03,
) -> Array:
    """Logits whose best pattern is a given mask.

    Args:
      keep: bool[..., m], the prior mask.
      n: kept per group.
      m: group size.
      parameters: "patterns" for one logit per pattern, "weights" for one per weight.
      prior: logit by which the pattern of the mask exceeds one with one weight less in
        common. Times the first scale it is the confidence of the start: at 3 a 2:4
        group has its prior pattern with probability .832.

    Returns:
      f32[..., C(m, n)] or f32[..., m].
    """
    if parameters == "weights":
        return prior * (keep.astype(jnp.float32) - n / m)
    return prior * similarity(keep, n=n, m=m)


def of_patterns(
    logits: Array, *, n: int, m: int, parameters: Parameters = "patterns"
) -> Array:
    """One logit per pattern, whatever the parameters are.

    Args:
      logits: f32[..., C(m, n)] or f32[..., m].
      n: kept per group.
      m: group size.
      parameters: what `logits` are.

    Returns:
      f32[..., C(m, n)].
    """
    if parameters == "patterns":
        return logits
    table = jnp.asarray(gates.pattern_table(n, m), jnp.float32)
    return jnp.matmul(logits, table.T, precision="highest")


def mask(
    key: Array,
    logits: Array,
    temperature: Array,
    *,
    n: int,
    m: int,
    relaxation: gates.Relaxation = "soft",
) -> Array:
    """A relaxed mask of every group.

    Args:
      key: consumed; not used when "expected" or "decided".
      logits: f32[..., C(m, n)], scaled.
      temperature: f32[], above 0.
      n: kept per group.
      m: group size.
      relaxation: "soft" is the mean of the patterns under Gumbel softmax,
        "straight_through" its largest pattern with the gradient of the soft one,
        "expected" the mean under softmax, without noise, "decided" the pattern with the
        largest logit, with the gradient of the mean under softmax at the temperature.

    Returns:
      f32[..., m]; every group sums to n.
    """
    if relaxation == "expected":
        return gates.mixed_pattern(jax.nn.softmax(logits, axis=-1), n, m)
    if relaxation == "decided":
        soft = gates.mixed_pattern(jax.nn.softmax(logits / temperature, axis=-1), n, m)
        return gates.straight_through(soft, gates.best_pattern(logits, n, m))
    soft = gates.mixed_pattern(gates.gumbel_softmax(key, logits, temperature), n, m)
    if relaxation == "soft":
        return soft
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)  # as in the softmax
    hard = gates.best_pattern(logits + noise, n, m)
    return gates.straight_through(soft, hard)
