"""Choices with gradients: Hard Concrete gates, and n of m weights of a group.

- Hard Concrete (Louizos et al. 2018, arXiv:1712.01312) stretches a sigmoid of logistic
  noise to (gamma, zeta) and clips it, so that exact zeros and ones have probability.
  `gamma < 0` and `zeta > 1` are the ends of the stretched interval, `temperature > 0`
  shrinks the noise.
- One logit per legal pattern of a group (MaskLLM, arXiv:2409.17481), drawn by Gumbel
  softmax (Jang et al. 2017, arXiv:1611.01144). One logit per weight ("weights") is
  smaller, takes any n:m without C(m, n) numbers, and represents the sums of weight
  logits only: for 2:4 three of five degrees of freedom.
- n of m drawn without replacement, each in proportion to softmax(logits) among those
  left (Plackett-Luce; MaskPro, arXiv:2506.12876). The published gradient is written by
  hand and holds for n = 2 only; ours is `jax.grad` of the closed form.

Everything is float32 and finite for |log_alpha| up to 80.
"""

import itertools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import checks

GAMMA, ZETA = -0.1, 1.1
SATURATION = math.log((1 - GAMMA) / (ZETA - 1))  # |x| at which `stretch` clips
TINY = 1e-6  # the uniform draws are this far from 0 and 1

Relaxation = Literal["soft", "straight_through", "expected", "decided"]
NOISY = ("soft", "straight_through")
HARD = ("straight_through", "decided")

Parameters = Literal["patterns", "weights"]

#: Largest n whose subsets `log_prob` sums; 2^n terms.
MAX_EXACT_N = 6


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


def stretch(x: Array) -> Array:
    """A Hard Concrete gate, clip(sigmoid(x) * (ZETA - GAMMA) + GAMMA, 0, 1).

    Args:
      x: f32[...], (noise + log_alpha) / temperature with `logistic` noise; without it
        the gate is the one at the median.

    Returns:
      f32[...] in [0, 1], with gradient zero where the gate is exactly 0 or 1.

    Source: arXiv:1712.01312, equations 10 and 11.
    """
    return jnp.clip(jax.nn.sigmoid(x) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def expected_l0(log_alpha: Array, temperature: Array | float) -> Array:
    """P(z > 0), the expected number of non-zeros per gate, f32[...].

    Source: arXiv:1712.01312, equation 12.
    """
    return jax.nn.sigmoid(log_alpha - temperature * math.log(-GAMMA / ZETA))


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
    table = jnp.asarray(pattern_table(n, m), jnp.float32)
    common = jnp.matmul(keep.astype(jnp.float32), table.T, precision="highest")
    return common - n * n / m


def initial_logits(
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


def logits_of_patterns(
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
    table = jnp.asarray(pattern_table(n, m), jnp.float32)
    return jnp.matmul(logits, table.T, precision="highest")


def pattern_mask(
    key: Array,
    logits: Array,
    temperature: Array,
    *,
    n: int,
    m: int,
    relaxation: Relaxation = "soft",
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
        return mixed_pattern(jax.nn.softmax(logits, axis=-1), n, m)
    if relaxation == "decided":
        soft = mixed_pattern(jax.nn.softmax(logits / temperature, axis=-1), n, m)
        return straight_through(soft, best_pattern(logits, n, m))
    soft = mixed_pattern(gumbel_softmax(key, logits, temperature), n, m)
    if relaxation == "soft":
        return soft
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)  # as in the softmax
    hard = best_pattern(logits + noise, n, m)
    return straight_through(soft, hard)


def draw(key: Array, logits: Array, *, n: int) -> Array:
    """Draws n of m without replacement, independently per group.

    Adding Gumbel noise and taking the n largest draws exactly from Plackett-Luce.

    Args:
      key: consumed.
      logits: f[..., m].
      n: items to draw, at most m.

    Returns:
      i32[..., n], the items in the order drawn.
    """
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return jax.lax.top_k(logits.astype(jnp.float32) + noise, n)[1].astype(jnp.int32)


def members(order: Array, *, m: int) -> Array:
    """bool[..., m] that marks the drawn items of `draw`."""
    items = jnp.arange(m, dtype=jnp.int32)
    return jnp.any(order[..., :, None] == items, axis=-2)


def log_prob(logits: Array, keep: Array, *, n: int) -> Array:
    """Log-probability of the drawn set, whatever its order.

    Sums over the orders through the subsets of the set: 2^n terms. Differentiable in
    `logits`.

    Args:
      logits: f[..., m].
      keep: bool[..., m], exactly n True per group.
      n: items drawn, at most `MAX_EXACT_N`.

    Returns:
      f32[...].

    Raises:
      ValueError: n above `MAX_EXACT_N`, or a concrete set that cannot be drawn.

    Source: arXiv:2506.12876, eq. for n = 2; the recursion over subsets is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([0.3, -0.2, 0.5, 0.1])
      >>> keep = jnp.array([True, False, True, False])
      >>> round(float(log_prob(logits, keep, n=2)), 5)
      -1.32933
    """
    if n > MAX_EXACT_N:
        raise ValueError(
            f"n={n}: the sum over the orders has 2^n terms and stops at n="
            f"{MAX_EXACT_N}; draw fewer items of a group"
        )
    _check_drawable(keep, n)
    logits = _centred(logits)
    # The kept logits first, in index order; the rest only enters by its log-sum.
    order = jnp.argsort(~keep, axis=-1, stable=True)[..., :n]
    kept = jnp.take_along_axis(logits, order, axis=-1)
    rest = jax.nn.logsumexp(jnp.where(keep, -jnp.inf, logits), axis=-1)
    if n == logits.shape[-1]:
        return jnp.zeros(logits.shape[:-1], jnp.float32)
    reached = [jnp.zeros(rest.shape, jnp.float32)]  # by subset, a bit per kept item
    for subset in range(1, 1 << n):
        ways = []
        for j in (j for j in range(n) if subset >> j & 1):
            before = subset & ~(1 << j)
            left = [kept[..., i] for i in range(n) if not before >> i & 1]
            total = jax.nn.logsumexp(jnp.stack([rest, *left]), axis=0)
            ways.append(reached[before] + kept[..., j] - total)
        reached.append(jax.nn.logsumexp(jnp.stack(ways), axis=0))
    return reached[-1]


def _centred(logits: Array) -> Array:
    """f32 logits with a largest of 0: the same draws, no cancellation far from 0."""
    logits = logits.astype(jnp.float32)
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def _check_drawable(keep: Array, n: int) -> None:
    if not checks.is_concrete(keep):
        return
    counts = jnp.sum(keep, axis=-1, dtype=jnp.int32)
    if bool(jnp.any(counts != n)):
        worst = int(jnp.argmax(counts.reshape(-1) != n))
        raise ValueError(
            f"group {worst} keeps {int(counts.reshape(-1)[worst])} of {keep.shape[-1]}:"
            f" a draw of n={n} cannot give it"
        )
