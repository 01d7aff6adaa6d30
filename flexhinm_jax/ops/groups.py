"""Matrices by group: every tile in the order in which its N:M groups are contiguous.

A group is m columns that follow each other in the order of their tile, so sums over
groups read the matrix through that order. Both directions are gathers, and so are their
gradients: the transpose of a gather is a scatter, which is slow, but that of a
permutation is the gather with its inverse.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.types import Regions


def group_order(regions: Regions) -> Array:
    """The columns of every tile: N:M ones in their groups, pruned ones, dense ones.

    The order of the regions, rotated so that the first group begins at position 0.

    Args:
      regions: of one matrix.

    Returns:
      i32[t, i], original column at each position; every row is a permutation.
    """
    i = regions.in_order.shape[-1]
    p = jnp.arange(i, dtype=jnp.int32) + regions.dense_end[:, None]
    return jnp.take_along_axis(regions.in_order, p % i, axis=1)


def live_groups(regions: Regions) -> Array:
    """Which groups of `to_groups` are N:M groups, bool[t, i // m]."""
    i = regions.in_order.shape[-1]
    g = jnp.arange(i // regions.m, dtype=jnp.int32)
    return g < ((regions.nm_end - regions.dense_end) // regions.m)[:, None]


def inverse(order: Array) -> Array:
    """The inverse of permutations along the last axis, i32."""
    if order.ndim > 1:
        return jax.vmap(inverse)(order)
    p = jnp.arange(order.shape[0], dtype=jnp.int32)
    # five times faster than a sort on a CPU
    return jnp.zeros_like(p).at[order].set(p, unique_indices=True)


def to_groups(x: Array, regions: Regions) -> Array:
    """A matrix by tile, row and group.

    Args:
      x: [o, i] in original order; m divides i.
      regions: which columns form groups.

    Returns:
      [t, v, i // m, m]; only the groups that `live_groups` marks are N:M groups. The
      gradient is exact and a gather.
    """
    order = group_order(regions)
    tiles = _storage(x, regions.out_order, order)
    return tiles.reshape(*tiles.shape[:-1], -1, regions.m)


def from_groups(groups: Array, regions: Regions) -> Array:
    """The inverse of `to_groups`: [t, v, i // m, m] to [o, i] in original order."""
    order = group_order(regions)
    tiles = groups.reshape(*groups.shape[:2], -1)
    return _original(tiles, regions.out_order, order)


def sums(x: Array, regions: Regions) -> Array:
    """The sum of every group, f[t, v, i // m], added in the order of the group.

    Args:
      x: [o, i] in original order; m divides i.
      regions: which columns form groups.

    Returns:
      `to_groups(x, regions).sum(-1)`, whose gradient is exact and one gather.
    """
    return _sums(regions.m, x, regions.out_order, group_order(regions))


def nm_weights(regions: Regions) -> Array:
    """Which weights lie in an N:M group, bool[o, i] in original order."""
    position = inverse(regions.in_order)
    after = position >= regions.dense_end[:, None]
    return _by_column(after & (position < regions.nm_end[:, None]), regions)


def dense_weights(regions: Regions) -> Array:
    """Which weights lie in a dense column, bool[o, i] in original order."""
    position = inverse(regions.in_order)
    return _by_column(position < regions.dense_end[:, None], regions)


def _by_column(columns: Array, regions: Regions) -> Array:
    """[t, i] -> [o, i]: every row gets the line of its tile."""
    rows = regions.out_order.shape[0] // columns.shape[0]
    return columns[inverse(regions.out_order) // rows]


@jax.custom_vjp
def _storage(x: Array, out_order: Array, order: Array) -> Array:
    """[o, i] -> [t, v, i]."""
    tiles = x[out_order].reshape(order.shape[0], -1, order.shape[1])
    return jax.vmap(lambda rows, columns: rows[:, columns])(tiles, order)


@jax.custom_vjp
def _original(tiles: Array, out_order: Array, order: Array) -> Array:
    """[t, v, i] -> [o, i]."""
    columns = inverse(order)
    tiles = jax.vmap(lambda rows, columns: rows[:, columns])(tiles, columns)
    return tiles.reshape(-1, tiles.shape[-1])[inverse(out_order)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(m: int, x: Array, out_order: Array, order: Array) -> Array:
    """[o, i] -> [t, v, i // m]."""
    tiles = _storage(x, out_order, order)
    # On a CPU a reduction over so short an axis takes longer than the gather.
    each = [tiles[..., j::m] for j in range(m)]
    return functools.reduce(jnp.add, each)


def _spread(m: int, orders: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    """The transpose of `_sums`."""
    out_order, order = orders
    group = inverse(order) // m  # [t, i]
    rows = jax.vmap(lambda rows, columns: rows[:, columns])(g, group)
    return rows.reshape(-1, rows.shape[-1])[inverse(out_order)], None, None


_sums.defvjp(
    lambda m, x, out_order, order: (_sums(m, x, out_order, order), (out_order, order)),
    _spread,
)
_storage.defvjp(
    lambda x, out_order, order: (_storage(x, out_order, order), (out_order, order)),
    lambda orders, g: (_original(g, *orders), None, None),
)
_original.defvjp(
    lambda x, out_order, order: (_original(x, out_order, order), (out_order, order)),
    lambda orders, g: (_storage(g, *orders), None, None),
)
