"""Which weights of a group the core S of diag(A) S diag(B) keeps, see `factorised`.

With the half gradient G = P S Q - F kept at hand, the objective as a function of the m
weights v of one group in row t is, up to a constant,

    P_tt v^T Q_g v + 2 u^T v              with u = G_g - P_tt Q_g s_g, G without it  (5)

so the best values v = -Q_p^-1 u_p / P_tt of each of the C(m, n) patterns p and their
exact gain u_p^T Q_p^-1 u_p / P_tt are small closed forms, and a change costs a rank-1
update of G. ARMOR (arXiv:2510.05528, section 3) draws one group per block by its
gradient and multiplies the whole product again; here every row of every block is
visited, and blocks, which do not interact, are visited at once.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops.descent import patterns

PATTERN_RIDGE = 1e-6  # of the diagonal of Q, in the inverse of every pattern
NOISE = 1e-6  # a change must gain more than this share of what it compares


def diagonal_blocks(q: Array, m: int) -> Array:
    """f32[c, b / m, m, m] on the diagonal of f32[c, b, b]."""
    starts = range(0, q.shape[-1], m)
    return jnp.stack([q[:, j : j + m, j : j + m] for j in starts], axis=1)


def pattern_inverses(q: Array, n: int, m: int) -> Array:
    """Inverse of every group of Q restricted to every pattern.

    Args:
      q: f32[c, b, b], symmetric; m divides b.
      n: kept per group.
      m: group size.

    Returns:
      f32[c, b / m, C(m, n), m, m], zero outside the pattern.
    """
    table = jnp.asarray(patterns(n, m))
    c, b, _ = q.shape
    groups = diagonal_blocks(q, m)
    diagonal = jnp.diagonal(groups, axis1=2, axis2=3)
    diagonal = jnp.where(diagonal > 0, diagonal, 1) * (1 + PATTERN_RIDGE)
    eye = jnp.eye(m, dtype=q.dtype)
    groups = jnp.where(eye > 0, diagonal[..., None], groups)[:, :, None]
    pair = table[:, :, None] & table[:, None]
    x = jnp.where(pair, groups, eye)
    # The sweep operator turns a definite matrix into minus its inverse, pivot by pivot.
    for k in range(m):
        pivot = 1 / x[..., k, k]
        row, column = x[..., k, :], x[..., :, k]
        swept = x - column[..., :, None] * row[..., None, :] * pivot[..., None, None]
        at = jnp.arange(m) == k
        swept = jnp.where(at[:, None], (row * pivot[..., None])[..., None, :], swept)
        swept = jnp.where(at, (column * pivot[..., None])[..., :, None], swept)
        x = jnp.where(at[:, None] & at, -pivot[..., None, None], swept)
    return jnp.where(pair, -x, 0)


def best_values(
    s: Array, gradient: Array, scale: Array, q: Array, inverse: Array, n: int
) -> tuple[Array, Array, Array]:
    """The best pattern and values of every group, equation (5), if it alone may change.

    Sums and maxima over the few weights of a group are written out: one elementwise
    program instead of reductions over axes of four.

    Args:
      s: f32[..., g, m], values now, zero where nothing is kept.
      gradient: f32[..., g, m], half gradient there.
      scale: f32[..., 1], P_tt of the row, positive.
      q: f32[..., g, m, m], Q of every group.
      inverse: f32[..., g, C, m, m], from `pattern_inverses`.
      n: kept per group.

    Returns:
      The fall of the objective f32[..., g], 0 when nothing gains more than rounding;
      the new values f32[..., g, m]; the new support bool[..., g, m].
    """
    m = s.shape[-1]
    every = range(m)
    own = [sum(q[..., j, k] * s[..., k] for k in every) * scale for j in every]
    u = [gradient[..., j] - own[j] for j in every]
    now = -jnp.asarray(sum(s[..., j] * (gradient[..., j] + u[j]) for j in every))
    top = jnp.full_like(now, -jnp.inf)
    values = [jnp.zeros_like(now)] * m
    kept = [jnp.zeros(now.shape, bool)] * m
    for row, pattern in enumerate(patterns(n, m)):
        inside = [j for j in every if pattern[j]]
        best = {
            j: -sum(inverse[..., row, j, k] * u[k] for k in inside) / scale
            for j in inside
        }
        worth = -sum(best[j] * u[j] for j in inside)
        better = worth > top  # the first of equal patterns stays
        top = jnp.where(better, worth, top)
        values = [jnp.where(better, best.get(j, 0.0), values[j]) for j in every]
        kept = [jnp.where(better, j in best, kept[j]) for j in every]
    gain = top - now
    noise = NOISE * (jnp.abs(top) + jnp.abs(now))
    gain = jnp.where(gain > noise, gain, 0)
    return gain, jnp.stack(values, axis=-1), jnp.stack(kept, axis=-1)


def sweep(
    s: Array,
    keep: Array,
    gradient: Array,
    p: Array,
    q: Array,
    *,
    n: int,
    m: int,
    picks: int,
) -> tuple[Array, Array]:
    """Visits every row of every block; re-chooses its `picks` most rewarding groups.

    Args:
      s: f32[k, c, a, b], zero outside `keep`.
      keep: bool[k, c, a, b], n of every m.
      gradient: f32[k, c, a, b], P S Q - F.
      p: f32[k, a, a].
      q: f32[c, b, b]; m divides b.
      n: kept per group.
      m: group size.
      picks: changes per row of a block.

    Returns:
      The new values and their support; the objective never rises.
    """
    k, c, a, b = s.shape
    inverse = pattern_inverses(q, n, m)
    own = diagonal_blocks(q, m)
    bands = q.reshape(c, b // m, m, b)
    groups = lambda x: x.reshape(k, c, -1, m)  # noqa: E731
    scales = jnp.diagonal(p, axis1=1, axis2=2).T  # [a, k]

    def row(gradient, part):
        t, s, keep, scale = part
        start = lax.dynamic_index_in_dim(gradient, t, 0, False)
        live = (scale > 0)[:, None, None]
        safe = jnp.where(scale > 0, scale, 1)[:, None, None]

        def pick(_, carry):
            s, keep, h = carry
            x = groups(s), groups(h), safe, own, inverse
            gain, fresh, kept = best_values(*x, n)
            best = jnp.argmax(gain, axis=-1)  # [k, c]
            hit = jnp.arange(b // m) == best[..., None]
            hit = hit & (gain > 0) & live
            change = jnp.where(hit[..., None], fresh - groups(s), 0)
            delta = jnp.sum(change, axis=2)  # [k, c, m]
            band = bands[jnp.arange(c), best]  # [k, c, m, b]
            h = h + safe * jnp.sum(delta[..., None] * band, axis=2)
            s = s + change.reshape(s.shape)
            keep = jnp.where(hit[..., None], kept, groups(keep)).reshape(keep.shape)
            return jnp.where(keep, s, 0), keep, h

        s, keep, h = lax.fori_loop(0, picks, pick, (s, keep, start))
        moved = (h - start) / safe
        column = lax.dynamic_index_in_dim(p, t, 2, False).T  # [a, k]
        return gradient + column[:, :, None, None] * moved, (s, keep)

    first = lambda x: jnp.moveaxis(x, 2, 0)  # noqa: E731
    parts = jnp.arange(a, dtype=jnp.int32), first(s), first(keep), scales
    _, (s, keep) = lax.scan(row, first(gradient), parts)
    return jnp.moveaxis(s, 0, 2), jnp.moveaxis(keep, 0, 2)


def draw(
    key: Array,
    s: Array,
    keep: Array,
    gradient: Array,
    p: Array,
    q: Array,
    n: int,
    m: int,
) -> tuple[Array, Array]:
    """Re-chooses one group per block, drawn by the L1 norm of its gradient.

    The discrete step of the published loop, with its exact sub-problem.

    Args:
      key: PRNG key, consumed.
      s: f32[k, c, a, b], zero outside `keep`.
      keep: bool[k, c, a, b].
      gradient: f32[k, c, a, b], P S Q - F.
      p: f32[k, a, a].
      q: f32[c, b, b].
      n: kept per group.
      m: group size.

    Returns:
      The new values and their support.
    """
    k, c, a, b = s.shape
    groups = lambda x: x.reshape(k, c, -1, m)  # noqa: E731
    odds = jnp.sum(jnp.abs(groups(gradient)), axis=-1)
    at = jax.random.categorical(key, jnp.log(jnp.maximum(odds, 1e-30)))  # [k, c]
    row, column = at // (b // m), at % (b // m)
    take = lambda x: jnp.take_along_axis(groups(x), at[..., None, None], 2)  # noqa: E731
    own = diagonal_blocks(q, m)
    here = jnp.arange(c), column
    scale = jnp.diagonal(p, axis1=1, axis2=2)[jnp.arange(k)[:, None], row]
    safe = jnp.where(scale > 0, scale, 1)[..., None]
    gain, fresh, kept = best_values(
        take(s),
        take(gradient),
        safe,
        own[here][:, :, None],
        pattern_inverses(q, n, m)[here][:, :, None],
        n,
    )
    hit = jnp.arange(groups(s).shape[2]) == at[..., None]
    hit = (hit & (gain > 0) & (scale > 0)[..., None])[..., None]
    s = jnp.where(hit, fresh, groups(s)).reshape(s.shape)
    keep = jnp.where(hit, kept, groups(keep)).reshape(keep.shape)
    return s, keep
