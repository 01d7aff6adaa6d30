"""Leaves in eight bits that a program multiplies with a scale before it uses them.

    w = q.astype(jnp.float32) * scale        # q int8 or float8, scale a leaf beside it

The values of such a leaf lie on a grid: what stands for a weight is a step times its
scale. Whoever judges the leaf reads it with its scale (`dequantised`), whoever writes
it rounds to the grid (`quantised`), and a product with packed steps scales its outputs.
A scale may vary along any axes of the leaf, also in blocks; along the outputs and the
stack alone it is a factor of every output, and a program may as well multiply these:

    y = (x @ q.astype(jnp.float32)) * scale
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.kernels import quantised as grid
from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.contractions import Tracked
from flexhinm_jax.tracing.views import Atom
from flexhinm_jax.types import AxisFactor, ChannelScale, Layout, Use


def multiplied(weight: Tracked, scale: Tracked) -> views.Change | None:
    """What multiplying a leaf of eight bits with another leaf does to it.

    Returns:
      The change, whose `apply` leaves the steps as they are; None for other leaves, and
      for a scale that is more than a leaf in some dtype.
    """
    reaches = {step.reach for step in scale.view.changes}
    if not weight.on_grid or scale.on_grid or scale.packed is not None:
        return None
    if reaches - {views.Reach.EVERY_FACTOR}:
        return None
    own = channel_scale(weight, scale)
    if own is None:
        return None
    return views.Change(lambda x: x, views.Reach.ONE_FACTOR, scale=own)


def channel_scale(weight: Tracked, scale: Tracked) -> ChannelScale | None:
    """How a leaf scales another one in the product of both, element by element.

    Returns:
      The description, or None where an axis of one is cut, turned or only a part of an
      axis of the other.
    """
    pairs: list[tuple[AxisFactor, AxisFactor]] = []
    for own, dim in zip(weight.view.dims, scale.view.dims, strict=True):
        if all(a.axis == views.REPEAT for a in dim):
            continue
        sizes = [a.size for a in max(own, dim, key=len)]
        aligned = [views.regroup((atoms,), sizes) for atoms in (own, dim)]
        if None in aligned:
            return None
        for (*_, a), (*_, b) in zip(*aligned, strict=True):  # pyright: ignore[reportArgumentType]
            if not (_plain(a) and _plain(b) and a.size == b.size):
                return None
            pairs.append((a.factor, b.factor))
    for b, at in scale.view.index:
        entries = [a for a, there in weight.view.index if _same(at, there)]
        if len(entries) != 1 or entries[0].full != b.full:
            return None
        pairs.append((entries[0].factor, b.factor))
    if math.prod(b.size for _, b in pairs) != math.prod(scale.shape):
        return None
    return ChannelScale(scale.path, tuple(pairs))


def _plain(a: Atom) -> bool:
    return a.axis >= 0 and a.whole and not a.flipped


def _same(at: Any, there: Any) -> bool:
    return at == there if isinstance(at, int) else at is there


def of_outputs(path: str, layout: Layout) -> ChannelScale:
    """A scale [*stack, o] that multiplies the outputs of a product."""
    factors = layout.stack + layout.out
    flat, stride = [], 1
    for f in reversed(factors):
        flat.append(AxisFactor(0, stride, f.size))
        stride *= f.size
    return ChannelScale(path, tuple(zip(factors, flat[::-1], strict=True)))


def spread(values: Any, scale: ChannelScale, shape: tuple[int, ...]) -> Array:
    """The values of a scale for every element of the leaf that it scales.

    Args:
      values: the leaf of the scale.
      scale: its description.
      shape: of the leaf that it scales.

    Returns:
      f32[*shape].
    """
    pairs = scale.factors
    stored = sorted(range(len(pairs)), key=lambda k: views.leaf_order(pairs[k][1]))
    wanted = sorted(range(len(pairs)), key=lambda k: views.leaf_order(pairs[k][0]))
    parts = jnp.asarray(values).reshape([pairs[k][1].size for k in stored])
    parts = parts.transpose([stored.index(k) for k in wanted])
    pieces: list[tuple[int, bool]] = []  # (size, whether the scale varies along it)
    for axis, size in enumerate(shape):
        rest = size
        for f in (pairs[k][0] for k in wanted if pairs[k][0].axis == axis):
            pieces += [(rest // (f.stride * f.size), False), (f.size, True)]
            rest = f.stride
        pieces.append((rest, False))
    parts = parts.reshape([size if varies else 1 for size, varies in pieces])
    whole = jnp.broadcast_to(parts, [size for size, _ in pieces])
    return whole.reshape(shape).astype(jnp.float32)


def of_leaf(leaves: Mapping[str, Any], use: Use) -> Array:
    """What every step of a leaf on a grid is multiplied with, f32."""
    shape = use.layout.shape
    if use.scale is None:
        return jnp.ones(shape, jnp.float32)
    return spread(leaves[use.scale.path], use.scale, shape)


def dequantised(leaves: Mapping[str, Any], use: Use) -> Array:
    """The weights that a leaf on a grid stands for, f32 in the shape of the leaf."""
    return jnp.asarray(leaves[use.path]).astype(jnp.float32) * of_leaf(leaves, use)


def quantised(weights: Array, leaves: Mapping[str, Any], use: Use) -> Array:
    """The nearest steps to weights in the shape of a leaf, in its dtype."""
    return grid.to_grid(weights, of_leaf(leaves, use), leaves[use.path].dtype)


def rows(
    leaves: Mapping[str, Any], changes: tuple[views.Change, ...], layout: Layout
) -> Array | None:
    """What all scales among the changes of a leaf come to for every output.

    Returns:
      f32[*stack, o]; None where one varies along the inputs.
    """
    inner = layout.inputs
    own = [step.scale for step in changes if step.scale is not None]
    if any(_overlap(a, f) for s in own for a, _ in s.factors for f in inner):
        return None

    def of(scale: ChannelScale) -> Array:
        whole = spread(leaves[scale.path], scale, layout.shape)
        return views.matrix(whole, layout)[..., 0]

    ones = jnp.ones((*layout.stack_shape, layout.matrix_shape[0]), jnp.float32)
    return functools.reduce(jnp.multiply, map(of, own), ones)


def _overlap(a: AxisFactor, b: AxisFactor) -> bool:
    ends = min(a.stride * a.size, b.stride * b.size)
    return a.axis == b.axis and max(a.stride, b.stride) < ends
