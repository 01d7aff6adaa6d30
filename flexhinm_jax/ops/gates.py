"""Random gates in [0, 1] with gradients: Hard Concrete, and Gumbel over patterns.

Hard Concrete (Louizos et al. 2018, arXiv:1712.01312) stretches a sigmoid of logistic
noise to (gamma, zeta) and clips it, so that exact zeros and ones have probability. The
baseline draws one of the C(m, n) patterns of a group by Gumbel softmax (Jang et al.
2017, arXiv:1611.01144).

`gamma < 0` and `zeta > 1` are the ends of the stretched interval, `temperature > 0`
shrinks the noise. Everything is float32 and finite for |log_alpha| up to 80.
"""

import itertools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.ops import masks

GAMMA, ZETA = -0.1, 1.1
SATURATION = math.log((1 - GAMMA) / (ZETA - 1))  # |x| at which `stretch` clips
TINY = 1e-6  # the uniform draws are this far from 0 and 1

Relaxation = Literal["soft", "straight_through", "expected", "decided"]
NOISY = ("soft", "straight_through")
HARD = ("straight_through", "decided")


def check_relaxation(relaxation: str) -> None:
    """Refuses an unknown relaxation.

    Raises:
      ValueError: it is none of `Relaxation`.
    """
    known = get_args(Relaxation)
    if relaxation not in known:
        raise ValueError(f"relaxation={relaxation!r}: choose one of {', '.join(known)}")


def logistic(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard logistic noise log(u) - log(1 - u), u in (1e-6, 1 - 1e-6).

    Args:
      key: PRNG key, consumed.
      shape: of the result.

    Returns:
      f32[shape], within +-13.9.
    """
    u = jax.random.uniform(key, shape, jnp.float32, TINY, 1 - TINY)
    return jnp.log(u) - jnp.log1p(-u)


def hard_concrete(
    key: Array,
    log_alpha: Array,
    temperature: Array | float,
    *,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Array:
    """Samples gates.

    Args:
      key: PRNG key, consumed.
      log_alpha: f32[...], location; a gate is 1 rather than 0 where it is positive.
      temperature: f32[], above 0.
      gamma: lower end of the stretch, below 0.
      zeta: upper end, above 1.

    Returns:
      f32[...] in [0, 1]; differentiable in `log_alpha`, with gradient zero where the
      gate is exactly 0 or 1.

    Source: arXiv:1712.01312, equations 10 and 11.
    """
    noise = logistic(key, log_alpha.shape)
    return stretch((noise + log_alpha) / temperature, gamma, zeta)


def stretch(x: Array, gamma: float = GAMMA, zeta: float = ZETA) -> Array:
    """clip(sigmoid(x) * (zeta - gamma) + gamma, 0, 1)."""
    return jnp.clip(jax.nn.sigmoid(x) * (zeta - gamma) + gamma, 0.0, 1.0)


def probability_zero(
    log_alpha: Array,
    temperature: Array | float,
    *,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Array:
    """P(z = 0), f32[...]; for the arguments see `hard_concrete`."""
    return jax.nn.sigmoid(temperature * math.log(-gamma / zeta) - log_alpha)


def probability_one(
    log_alpha: Array,
    temperature: Array | float,
    *,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Array:
    """P(z = 1), f32[...]; for the arguments see `hard_concrete`."""
    # s >= (1 - gamma) / (zeta - gamma)
    edge = math.log((1 - gamma) / (zeta - 1))
    return jax.nn.sigmoid(log_alpha - temperature * edge)


def expected_l0(
    log_alpha: Array,
    temperature: Array | float,
    *,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> Array:
    """P(z > 0), the expected number of non-zeros per gate, f32[...].

    Source: arXiv:1712.01312, equation 12.
    """
    return jax.nn.sigmoid(log_alpha - temperature * math.log(-gamma / zeta))


def deterministic(
    log_alpha: Array, *, gamma: float = GAMMA, zeta: float = ZETA
) -> Array:
    """The gate without noise and at temperature 1, as in arXiv:1712.01312 (13)."""
    return stretch(log_alpha, gamma, zeta)


def harden(log_alpha: Array, n: int) -> Array:
    """Opens exactly n gates of every group: those with the largest log_alpha.

    It is the mask "deterministic gate above 1/2" wherever that already opens n.

    Args:
      log_alpha: [..., m], one group along the last axis.
      n: gates to open.

    Returns:
      bool[..., m]; ties go to the lower index.

    Example:
      >>> import jax.numpy as jnp
      >>> harden(jnp.array([0.3, -1.0, 0.3, 2.0]), 2).tolist()
      [True, False, False, True]
    """
    return masks.group_ranks(log_alpha) < n


def straight_through(soft: Array, hard: Array) -> Array:
    """The value of `hard` with the gradient of `soft` (arXiv:1308.3432)."""
    hard = jax.lax.stop_gradient(hard.astype(soft.dtype))
    # In this order the value is exactly that of `hard`.
    return hard + (soft - jax.lax.stop_gradient(soft))


def pattern_table(n: int, m: int) -> np.ndarray:
    """All ways to keep n of m.

    Returns:
      bool[C(m, n), m], in lexicographic order of the kept positions.

    Example:
      >>> pattern_table(1, 3).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    table = np.zeros((math.comb(m, n), m), bool)
    for row, kept in zip(table, itertools.combinations(range(m), n), strict=True):
        row[list(kept)] = True
    return table


def gumbel_softmax(key: Array, logits: Array, temperature: Array | float) -> Array:
    """Samples a relaxed choice along the last axis.

    Args:
      key: PRNG key, consumed.
      logits: f32[..., k].
      temperature: f32[], above 0; towards 0 the result is a vertex.

    Returns:
      f32[..., k], non-negative, sums to 1; differentiable in `logits`.

    Source: arXiv:1611.01144, equation 2.
    """
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


def mixed_pattern(choice: Array, n: int, m: int) -> Array:
    """The mixture of all patterns under the given weights.

    Args:
      choice: f32[..., C(m, n)], sums to 1 along the last axis.
      n: kept per group.
      m: group size.

    Returns:
      f32[..., m] in [0, 1], sums to n.
    """
    table = jnp.asarray(pattern_table(n, m), choice.dtype)
    return jnp.matmul(choice, table, precision="highest")


def best_pattern(logits: Array, n: int, m: int) -> Array:
    """The pattern with the largest logit, the first of equals, bool[..., m]."""
    return jnp.asarray(pattern_table(n, m))[jnp.argmax(logits, axis=-1)]
