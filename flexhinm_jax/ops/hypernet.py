"""A small net that gives every N:M group logits over its patterns.

HyperPrune (ICLR 2026, openreview lqjQs2lVNm): the net sees the weights of a group and
what the Gram says about their inputs, and which layer and which component they belong
to; all groups of a model share it. It learns a residual: its last layer starts at zero
and a prior is added outside, so the start is the prior.

What it said about earlier layers is held by a replay cache, a uniform sample of all
groups seen so far.

A `Layer` is the matrix that masks are learned for: parts of rows with groups side by
side. A part is a row, or a tile where the tiles have orders of their own; columns are
in the order in which groups are contiguous. Steps that look at a few rows take some
parts, and the energy of the outputs that a mask loses adds up over parts.

Letters: `s` groups of the cache, `f = 4 m` features, `K = C(m, n)` patterns, `k` parts
of `c` rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.ops import gram, groups
from flexhinm_jax.types import Regions, Support

#: {"dense": [{"kernel": f32[a, b], "bias": f32[b]}, ...]}, and with embeddings
#: "layers": f32[L, e], "components": f32[C, e].
Theta = dict[str, Any]

DEPTH = 4  # dense layers


class Place(NamedTuple):
    """Which embeddings belong to a group; i32[...] each."""

    layer: Array
    component: Array


class Cache(NamedTuple):
    """Groups of earlier layers.

    Attributes:
      features: f32[s, f].
      place: i32[s] each.
      priority: f32[s] in [0, 1); -1 where the slot is empty.
    """

    features: Array
    place: Place
    priority: Array


def initial(
    key: Array,
    *,
    m: int,
    patterns: int,
    hidden: int,
    embedding: int = 0,
    layers: int = 0,
    components: int = 0,
) -> Theta:
    """Random weights whose last layer is zero.

    Args:
      key: consumed.
      m: group size.
      patterns: C(m, n).
      hidden: width of the three hidden layers.
      embedding: length of each of the two embeddings; 0 for a net without them.
      layers: number of layer embeddings.
      components: number of component embeddings.

    Returns:
      The net.
    """
    keys = jax.random.split(key, DEPTH + 2)
    widths = [4 * m + 2 * embedding, *[hidden] * (DEPTH - 1), patterns]
    dense = []
    for j, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        scale = 0.0 if j == DEPTH - 1 else a**-0.5
        kernel = scale * jax.random.normal(keys[j], (a, b), jnp.float32)
        dense.append({"kernel": kernel, "bias": jnp.zeros((b,), jnp.float32)})
    theta: Theta = {"dense": dense}
    for name, count, k in zip(
        ("layers", "components"), (layers, components), keys[DEPTH:], strict=True
    ):
        if embedding:
            theta[name] = jax.random.normal(k, (count, embedding), jnp.float32)
    return theta


def features(w: Array, scale: Array, price: Array) -> Array:
    """What the net sees of a group.

    Args:
      w: f32[..., m], weights relative to the rms of their matrix.
      scale: f32[..., m], log(1 + mean square of the input / that of all inputs).
      price: f32[..., m], see `prices`.

    Returns:
      f32[..., 4 m]: w, |w|, scale and asinh of the price.
    """
    scale = jnp.broadcast_to(scale, w.shape)
    return jnp.concatenate([w, jnp.abs(w), scale, jnp.arcsinh(price)], axis=-1)


def logits(theta: Theta, x: Array, place: Place | None = None) -> Array:
    """The residual logits of groups.

    Args:
      theta: the net.
      x: f32[..., f], from `features`.
      place: scalars, or arrays of the leading shape of `x`; read by a net with
        embeddings.

    Returns:
      f32[..., K]; differentiable in `theta`.
    """
    first, *others = theta["dense"]
    if "layers" in theta:
        assert place is not None
        layer = theta["layers"][place.layer]
        component = theta["components"][place.component]
        # The embeddings of a whole matrix are multiplied once.
        e = jnp.concatenate([layer, component], axis=-1)
        size = x.shape[-1]
        y = x @ first["kernel"][:size] + e @ first["kernel"][size:]
    else:
        y = x @ first["kernel"]
    y = y + first["bias"]
    for dense in others:
        y = jax.nn.gelu(y) @ dense["kernel"] + dense["bias"]
    return y


def empty(size: int, m: int) -> Cache:
    """A cache without groups."""
    none = jnp.zeros((size,), jnp.int32)
    x = jnp.zeros((size, 4 * m), jnp.float32)
    return Cache(x, Place(none, none), jnp.full((size,), -1, jnp.float32))


def remember(
    key: Array, cache: Cache, x: Any, live: Array, place: Place | None
) -> Cache:
    """Adds the groups of a matrix; every group seen so far is as likely to stay.

    Each group keeps the random priority it came with, and the largest stay.

    Args:
      key: consumed.
      cache: the groups so far.
      x: called with i32[s], positions in `live`, returns their features f32[s, f].
      live: bool[groups], which groups there are.
      place: of the matrix, scalars.

    Returns:
      The cache.
    """
    size = cache.priority.shape[0]
    fresh = jnp.where(live, jax.random.uniform(key, live.shape, jnp.float32), -1)
    priority, at = jax.lax.top_k(jnp.concatenate([cache.priority, fresh]), size)
    new, old = at >= size, jnp.minimum(at, size - 1)
    past = x(jnp.maximum(at - size, 0))
    kept = jax.tree.map(lambda y: y[old], cache)
    own = Place(*(jnp.zeros((), jnp.int32),) * 2) if place is None else place
    return Cache(
        jnp.where(new[:, None], past, kept.features),
        Place(*(jnp.where(new, a, b) for a, b in zip(own, kept.place, strict=True))),
        priority,
    )


def drift(theta: Theta, cache: Cache, before: Array) -> Array:
    """How far the net has moved on the cached groups.

    Args:
      theta: the net now.
      cache: the groups.
      before: f32[s, K], what it said about them before.

    Returns:
      f32[], the mean squared difference of the logits; 0 for an empty cache.
    """
    there = (cache.priority >= 0).astype(jnp.float32)
    now = logits(theta, cache.features, cache.place)
    each = jnp.mean(jnp.square(now - before), axis=-1)
    return jnp.sum(each * there) / jnp.maximum(jnp.sum(there), 1)


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


def build_layer(
    task: gram.Problem, support: Support, before: Support | None = None
) -> Layer:
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
    total, missed = gram.energy(w, h), jnp.sum(pull * missed)
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


def take_parts(layer: Layer, index: Array) -> Layer:
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
    return gram.energy(d, part.gram)


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
