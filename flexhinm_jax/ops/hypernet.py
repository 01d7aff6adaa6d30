"""A small net that gives every N:M group logits over its patterns.

HyperPrune (ICLR 2026, openreview lqjQs2lVNm): the net sees the weights of a group and
what the Gram says about their inputs, and which layer and which component they belong
to; all groups of a model share it. It learns a residual: its last layer starts at zero
and a prior is added outside, so the start is the prior.

What it said about earlier layers is held by a replay cache, a uniform sample of all
groups seen so far.

Letters: `s` groups of the cache, `f = 4 m` features, `K = C(m, n)` patterns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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
      price: f32[..., m], see `grouped_layer.prices`.

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
    found = x(jnp.maximum(at - size, 0))
    kept = jax.tree.map(lambda y: y[old], cache)
    mine = Place(*(jnp.zeros((), jnp.int32),) * 2) if place is None else place
    return Cache(
        jnp.where(new[:, None], found, kept.features),
        Place(*(jnp.where(new, a, b) for a, b in zip(mine, kept.place, strict=True))),
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
