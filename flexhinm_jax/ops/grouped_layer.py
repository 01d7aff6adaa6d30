"""A matrix for learning masks on its Gram: parts of rows with groups side by side.

A part is a row, or a tile where the tiles have orders of their own; columns are in the
order in which groups are contiguous. Steps that look at a few rows take some parts, and
the energy of the outputs that a mask loses adds up over parts.

Letters: `k` parts of `c` rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.ops import gram, groups
from flexhinm_jax.types import Regions, Support


class Layer(NamedTuple):
    """One matrix.

    Attributes:
      weight: f32[k, c, i], the dense weight.
      target: f32[k, c, i], the weight with the least error: mostly the same.
      keep: bool[k, c, i], the prior.
      price: f32[k, c, i], what removing a weight costs, see `prices`.
      within: bool[k, c, i], what an earlier stage kept, or None.
      live: bool[t, i], columns in an N:M group; t is k, or 1 for all parts.
      energy: f32[t, i], of every input.
      regions: of the tiles, to bring columns into the order of the Gram; None where
        that has the order of the columns: t is 1.
      gram: f32[i, i].
      rms: f32[], of the weight.
      total: f32[], energy of all outputs.
      lost: f32[], energy of the outputs that the prior lacks.
    """

    weight: Array
    target: Array
    keep: Array
    price: Array
    within: Array | None
    live: Array
    energy: Array
    regions: Regions | None
    gram: Array
    rms: Array
    total: Array
    lost: Array


def build(task: gram.Problem, support: Support, before: Support | None = None) -> Layer:
    """The layer of a problem.

    Args:
      task: the problem.
      support: of the prior, with regions.
      before: an earlier support to stay within, or None.
    """
    regions = support.regions
    assert regions is not None
    tiles, columns = regions.in_order.shape
    order = groups.group_order(regions)
    h = task.gram.astype(jnp.float32)
    w = task.weight.astype(jnp.float32)
    target = gram.solve(task).astype(jnp.float32) if task.has_targets else w
    missed = target - jnp.where(support.keep, w, 0)
    pull, diagonal = gram.dot(missed, h), jnp.diag(h)
    price = prices(w, target, missed, pull, diagonal)
    total, missed = jnp.sum(gram.dot(w, h) * w), jnp.sum(pull * missed)
    energy = diagonal[order]
    if tiles == 1:
        h = h[order[0]][:, order[0]]
    shape = (tiles if tiles > 1 else w.shape[0], -1, columns)
    store = lambda x: groups.to_groups(x, regions).reshape(shape)  # noqa: E731
    live = jnp.repeat(groups.live_groups(regions), regions.m, axis=1)
    mean = jnp.mean(jnp.square(w))
    return Layer(
        weight=store(w),
        target=store(target),
        keep=store(support.keep),
        price=store(price),
        within=None if before is None else store(before.keep),
        live=jnp.pad(live, ((0, 0), (0, columns - live.shape[1]))),
        energy=energy,
        regions=regions if tiles > 1 else None,
        gram=h,
        rms=jnp.sqrt(jnp.where(mean > 0, mean, 1)),
        total=jnp.where(total > 0, total, 1),
        lost=missed,
    )


def prices(w: Array, target: Array, missed: Array, pull: Array, energy: Array) -> Array:
    """What removing each weight adds to the error while all others stay as they are.

    For an input without correlation it is the square of the Wanda score.

    Args:
      w: f32[o, i], the weight.
      target: f32[o, i], the weight with the least error.
      missed: f32[o, i], target minus the weight under the prior.
      pull: f32[o, i], missed times the Gram.
      energy: f32[i], diagonal of the Gram.

    Returns:
      f32[o, i], negative where the error falls, relative to the mean of w^2 energy.
    """
    others = pull - missed * energy
    cost = 2 * w * others + energy * w * (2 * target - w)
    mean = jnp.mean(jnp.square(w) * energy)
    return cost / jnp.where(mean > 0, mean, 1)


def take(layer: Layer, index: Array) -> Layer:
    """Some parts of a layer; the total is scaled to their number."""
    parts, rows, _ = layer.weight.shape
    old = regions = layer.regions
    pick = lambda x: x if old is None else x[index]  # noqa: E731
    if old is not None:
        regions = Regions(
            out_order=jnp.arange(index.shape[0] * rows, dtype=jnp.int32),
            in_order=pick(old.in_order),
            dense_end=pick(old.dense_end),
            nm_end=pick(old.nm_end),
            n=old.n,
            m=old.m,
        )
    return layer._replace(
        weight=layer.weight[index],
        target=layer.target[index],
        keep=layer.keep[index],
        price=layer.price[index],
        within=None if layer.within is None else layer.within[index],
        live=pick(layer.live),
        energy=pick(layer.energy),
        regions=regions,
        total=layer.total * (index.shape[0] / parts),
    )


def lost(part: Layer, kept: Array) -> Array:
    """f32[]: energy of the outputs that the kept weights lack."""
    d = part.target - kept
    if part.regions is not None:
        d = groups.from_groups(grouped(d, part.regions.m), part.regions)
    else:
        d = d.reshape(-1, d.shape[-1])
    return jnp.sum(gram.dot(d, part.gram) * d)


def where_live(part: Layer, mask: Array, other: Array) -> Array:
    """The masks of the groups [k, c, i / m, m] where there is one, else the other."""
    return jnp.where(part.live[:, None], mask.reshape(other.shape), other)


def original(keep: Array, regions: Regions) -> Array:
    """[k, c, i] to [o, i] in original order."""
    tiles = keep.reshape(regions.in_order.shape[0], -1, keep.shape[-1])
    return groups.from_groups(grouped(tiles, regions.m), regions)


def grouped(x: Array, m: int) -> Array:
    """[..., i] to [..., i / m, m]."""
    return x.reshape(*x.shape[:-1], -1, m)
