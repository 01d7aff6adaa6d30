"""Which weights of an N:M group to remove together, by the block Fisher.

The loss of removing a set Q while the rest of its block makes up for it is
w_Q^T ([F^-1]_QQ)^-1 w_Q / 2: optimal brain surgery on sets (Kurtic et al. 2022,
arXiv:2203.07259, equation 6). Single weights that look cheap may stand in for each
other; then removing both is dear, which no score of single weights can say.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from flexhinm_jax.ops import descent, groups
from flexhinm_jax.types import Regions, Support


def inverse_blocks(fisher: Array, damp: float) -> Array:
    """Inverses of the damped blocks.

    Args:
      fisher: f32[o, i / b, b, b], sum of g g^T over blocks of b consecutive inputs.
      damp: added to the diagonal, as a fraction of the mean of the whole diagonal.

    Returns:
      f32[o, i / b, b, b], symmetric.
    """
    b = fisher.shape[-1]
    fisher = fisher.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(fisher, axis1=-2, axis2=-1))
    eye = jnp.eye(b, dtype=jnp.float32)
    ridge = damp * jnp.where(mean > 0, mean, 1)
    factor = jnp.linalg.cholesky(fisher + ridge * eye)
    half = solve_triangular(factor, jnp.broadcast_to(eye, fisher.shape), lower=True)
    product = jnp.einsum("...ka,...kb->...ab", half, half, precision="highest")
    return (product + jnp.swapaxes(product, -1, -2)) / 2


def removal_loss(w: Array, inverse: Array) -> Array:
    """w^T A^-1 w / 2 for many small A, by elimination without a library call each.

    Args:
      w: f32[..., k], the weights removed.
      inverse: f32[..., k, k], A: their part of the inverse Fisher, positive definite.

    Returns:
      f32[...].
    """
    total = jnp.zeros(w.shape[:-1], jnp.float32)
    for j in range(w.shape[-1]):
        pivot = inverse[..., j, j]
        total += jnp.square(w[..., j]) / pivot
        column = inverse[..., j] / pivot[..., None]
        w = w - column * w[..., j, None]
        inverse = inverse - column[..., None] * inverse[..., j, None, :]
    return total / 2


def group_inverse(inverse: Array, regions: Regions) -> Array:
    """The inverse Fisher of every group: 0 between inputs of different blocks.

    Args:
      inverse: f32[o, i / b, b, b].
      regions: which columns form groups, in any order.

    Returns:
      f32[t, v, i / m, m, m], groups as in `groups.to_groups`.
    """
    b = inverse.shape[-1]
    order = groups.group_order(regions)
    tiles = order.shape[0]
    columns = order.reshape(tiles, 1, -1, regions.m)
    rows = regions.out_order.reshape(tiles, -1, 1, 1, 1)
    block, place = columns // b, columns % b
    blocks = inverse[rows, block[..., None], place[..., None], place[..., None, :]]
    return jnp.where(block[..., None] == block[..., None, :], blocks, 0)


def best_removal(
    w: Array, inverse: Array, support: Support, within: Array | None = None
) -> Support:
    """Re-chooses the weights of every N:M group, all removed ones of it together.

    Args:
      w: [o, i].
      inverse: f32[o, i / b, b, b], from `inverse_blocks`.
      support: a support with regions; its order and regions stay.
      within: bool[o, i], what may be kept; None for everything.

    Returns:
      The support whose groups raise the loss least, each for itself. Of equally good
      sets the first in `descent.patterns` wins.

    Raises:
      ValueError: groups with more than `descent.MAX_PATTERNS` patterns.
    """
    before = support.regions
    assert before is not None
    n, m = before.n, before.m
    if n == m:
        return support
    if math.comb(m, n) > descent.MAX_PATTERNS:
        raise ValueError(
            f"{n}:{m} groups have {math.comb(m, n)} patterns; at most "
            f"{descent.MAX_PATTERNS} are compared, as for 4:8: use kind='block'"
        )
    table = descent.patterns(n, m)
    removed = jnp.asarray(np.stack([np.flatnonzero(~row) for row in table]), jnp.int32)
    x = groups.to_groups(w.astype(jnp.float32), before)
    f = group_inverse(inverse, before)
    allowed = jnp.ones(x.shape, bool)
    if within is not None:
        allowed = groups.to_groups(within, before)
    kept = jnp.asarray(table)

    def better(p, best):
        at = removed[p]
        loss = removal_loss(x[..., at], f[..., at[:, None], at[None]])
        loss = jnp.where(jnp.any(kept[p] & ~allowed, axis=-1), jnp.inf, loss)
        return jnp.minimum(loss, best[0]), jnp.where(loss < best[0], p, best[1])

    worst = jnp.full(x.shape[:-1], jnp.inf, jnp.float32)
    start = worst, jnp.zeros(worst.shape, jnp.int32)
    _, index = lax.fori_loop(0, len(table), better, start)
    live = groups.live_groups(before)[:, None, :, None]
    old = groups.to_groups(support.keep, before)
    keep = groups.from_groups(jnp.where(live, kept[index], old), before)
    return Support(keep, before)
