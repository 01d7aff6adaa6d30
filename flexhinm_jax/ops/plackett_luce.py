"""n of m drawn without replacement: the distribution of MaskPro.

MaskPro, ICLR 2026 (arXiv:2506.12876). A group of m logits gives p = softmax(logits);
n items are drawn one after the other, each in proportion to p among those left
(Plackett-Luce). One parameter per weight serves any n:m. The published gradient is
written by hand and holds for n = 2 only; ours is `jax.grad` of the closed form.
"""

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import checks

#: Largest n whose subsets are summed exactly; 2^n terms.
EXACT = 6


def sample(key: Array, logits: Array, *, n: int) -> Array:
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
    """bool[..., m] that marks the drawn items of `sample`."""
    items = jnp.arange(m, dtype=jnp.int32)
    return jnp.any(order[..., :, None] == items, axis=-2)


def log_prob(logits: Array, keep: Array, *, n: int) -> Array:
    """Log-probability of the drawn set, whatever its order.

    Sums over the orders through the subsets of the set: 2^n terms. Differentiable in
    `logits`.

    Args:
      logits: f[..., m].
      keep: bool[..., m], exactly n True per group.
      n: items drawn, at most `EXACT`; `ordered_log_prob` has no such limit.

    Returns:
      f32[...].

    Raises:
      ValueError: n above `EXACT`, or a concrete set that cannot be drawn.

    Source: arXiv:2506.12876, eq. for n = 2; the recursion over subsets is ours.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([0.3, -0.2, 0.5, 0.1])
      >>> keep = jnp.array([True, False, True, False])
      >>> round(float(log_prob(logits, keep, n=2)), 5)
      -1.32933
    """
    if n > EXACT:
        raise ValueError(
            f"n={n}: the sum over the orders has 2^n terms and stops at n={EXACT}; use "
            "ordered_log_prob of the order that was drawn"
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


def ordered_log_prob(logits: Array, order: Array) -> Array:
    """Log-probability of the items in the order drawn; any n.

    Its gradient is an unbiased score too, with a little more variance than that of
    `log_prob`.

    Args:
      logits: f[..., m].
      order: i32[..., n], as `sample` returns it.

    Returns:
      f32[...]; differentiable in `logits`.
    """
    logits = _centred(logits)
    drawn = jnp.zeros(logits.shape, bool)
    items = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    total = jnp.zeros(logits.shape[:-1], jnp.float32)
    for j in range(order.shape[-1]):
        item = order[..., j, None]
        left = jax.nn.logsumexp(jnp.where(drawn, -jnp.inf, logits), axis=-1)
        total += jnp.take_along_axis(logits, item, axis=-1)[..., 0] - left
        drawn = drawn | (items == item)
    return total


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
