"""Leaves that a program puts side by side before it multiplies with them.

`x @ concatenate([q, k, v], 1)` is three products with one input, and
`x @ concatenate([a, b], 0)` is a sum of two, each with columns of x of its own. A
`Joined` value keeps its leaves apart through the layout primitives, so that every part
is a product with its own leaf.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax import jax_versions
from flexhinm_jax.tracing import experts, views
from flexhinm_jax.tracing.contractions import Followed, Product, Stop, Tracked

RAGGED = "ragged_dot_general"


@dataclasses.dataclass(frozen=True)
class Joined(Followed):
    """Leaves side by side along one axis of a value.

    Attributes:
      parts: the leaves, in order.
      sizes: how far each reaches along the axis.
      axis: of the value.
      dense: computes the value.
    """

    parts: tuple[Tracked, ...]
    sizes: tuple[int, ...]
    axis: int
    dense: Callable[[], Any]

    @property
    def tracked(self) -> tuple[Tracked, ...]:
        """The leaves."""
        return self.parts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        sizes = views.sizes(self.parts[0].view.dims)
        sizes[self.axis] = sum(self.sizes)
        return tuple(sizes)


class Step(NamedTuple):
    """One layout primitive, with parameters that fit a part.

    Attributes:
      name: of the primitive.
      params: of the equation.
      shape: of the result.
    """

    name: str
    params: dict[str, Any]
    shape: tuple[int, ...]

    def of(self, x: Array) -> Array:
        """The result for an array."""
        if self.name == "transpose":
            return x.transpose(self.params["permutation"])
        if self.name == "broadcast_in_dim":
            onto = self.params["broadcast_dimensions"]
            return lax.broadcast_in_dim(x, self.shape, onto)
        if self.name == "slice":
            return lax.slice(
                x, self.params["start_indices"], self.params["limit_indices"]
            )
        return x.reshape(self.shape)


def join(eqn: Any, operands: list) -> list[Followed] | None:
    """The result of a concatenate or stack of leaves alone, None for any other."""
    name = eqn.primitive.name
    if name not in ("concatenate", "stack"):
        return None
    if not all(isinstance(v, Followed) for v in operands):
        return None
    axis = eqn.params["axis" if name == "stack" else "dimension"]
    parts: list[Tracked] = []
    sizes: list[int] = []
    for v in operands:
        if isinstance(v, Joined):
            if name == "stack" or v.axis != axis:
                return None
            parts += v.parts
            sizes += v.sizes
        else:
            part = expanded(v, axis) if name == "stack" else v
            parts.append(part)
            sizes.append(views.sizes(part.view.dims)[axis])

    def dense() -> Any:
        return jax_versions.bind(eqn, [v.dense() for v in operands])[0]

    if len(parts) == 1:
        return [dataclasses.replace(parts[0], dense=dense)]
    return [Joined(tuple(parts), tuple(sizes), axis, dense)]


def expanded(part: Tracked, axis: int) -> Tracked:
    """A leaf with a unit axis more."""
    dims = list(part.view.dims)
    dims.insert(axis, ())
    return dataclasses.replace(
        part,
        view=part.view._replace(dims=tuple(dims)),
        dense=lambda: jnp.expand_dims(part.dense(), axis),
    )


def changed(joined: Joined, step: views.Change, dense: Callable[[], Any]) -> Joined:
    """What a change of every element makes of joined leaves."""

    def one(part: Tracked) -> Tracked:
        view = part.view._replace(changes=(*part.view.changes, step))
        return dataclasses.replace(
            part, view=view, dense=lambda: step.apply(part.dense())
        )

    return dataclasses.replace(joined, parts=tuple(map(one, joined.parts)), dense=dense)


def relayout(eqn: Any, joined: Joined, static: Sequence[Any]) -> list[Followed] | None:
    """The outputs of a layout primitive on joined leaves, None for any other.

    Args:
      eqn: the equation; its first operand is the joined value.
      joined: that value.
      static: the other operands, ints where they are written into the program.
    """
    name, p, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape

    def dense(k: int = 0) -> Any:
        return jax_versions.bind(eqn, [joined.dense(), *static])[k]

    if name in views.IDENTITY:
        return [dataclasses.replace(joined, dense=dense)]
    if name == "transpose":
        return _one(
            _each(joined, name, p, shape, p["permutation"].index(joined.axis)), dense
        )
    if name == "broadcast_in_dim":
        onto = p["broadcast_dimensions"][joined.axis]
        return _one(_each(joined, name, p, shape, onto), dense)
    if name == "squeeze" or (name == "reshape" and p["dimensions"] is None):
        return _one(_reshaped(joined, shape), dense)
    if name == "slice" and set(p["strides"] or [1]) == {1}:
        spans = [*zip(p["start_indices"], p["limit_indices"], strict=True)]
        return _one(_window(joined, spans), dense)
    if name == "split":
        outs: list[Followed] = []
        start = 0
        for k, n in enumerate(p["sizes"]):
            spans = [(0, size) for size in joined.shape]
            spans[p["axis"]] = start, start + int(n)
            outs += _one(_window(joined, spans), lambda k=k: dense(k)) or []
            start += int(n)
        return outs if len(outs) == len(p["sizes"]) else None
    if name == "dynamic_slice":
        sizes = p["slice_sizes"]
        spans = []
        for at, n, full in zip(static, sizes, joined.shape, strict=True):
            if n == full:
                spans.append((0, full))
            elif isinstance(at, int):
                low = min(max(at, 0), full - n)
                spans.append((low, low + n))
            else:
                return None
        return _one(_window(joined, spans), dense)
    return None


def _one(value: Followed | None, dense: Callable[[], Any]) -> list[Followed] | None:
    """One output, computed by `dense` where it is still several leaves."""
    if isinstance(value, Joined):
        value = dataclasses.replace(value, dense=dense)
    return None if value is None else [value]


def _each(
    joined: Joined, name: str, params: dict[str, Any], shape: tuple, axis: int
) -> Joined | None:
    """The same primitive on every part; the joined axis goes to `axis` of `shape`."""
    total, parts, sizes = sum(joined.sizes), [], []
    for part, size in zip(joined.parts, joined.sizes, strict=True):
        if shape[axis] * size % total:
            return None
        n = shape[axis] * size // total
        step = Step(name, params, (*shape[:axis], n, *shape[axis + 1 :]))
        moved = _stepped(part, step)
        if moved is None:
            return None
        parts.append(moved)
        sizes.append(n)
    return Joined(tuple(parts), tuple(sizes), axis, joined.dense)


def _stepped(part: Tracked, step: Step) -> Tracked | None:
    """One part after a layout primitive."""
    out = views.relayout(part.view, step.name, step.params, [step.shape])
    if out is None:
        return None
    return dataclasses.replace(part, view=out[0], dense=lambda: step.of(part.dense()))


def _reshaped(joined: Joined, shape: Sequence[int]) -> Joined | None:
    """Joined leaves under another shape, if the joined axis stays a leading factor."""
    # What comes before the joined axis must fill whole axes of the new shape: only then
    # the leaves still lie one after the other along one axis.
    before = math.prod(joined.shape[: joined.axis])
    for axis in range(len(shape)):
        if math.prod(shape[:axis]) == before and shape[axis] > 1:
            return _each(joined, "reshape", {"dimensions": None}, tuple(shape), axis)
    return None


def _window(joined: Joined, spans: Sequence[tuple[int, int]]) -> Followed | None:
    """The part of joined leaves between these borders of every axis."""
    low, high = spans[joined.axis]
    parts, sizes, start = [], [], 0
    for part, size in zip(joined.parts, joined.sizes, strict=True):
        first, last = max(low - start, 0), min(high - start, size)
        start += size
        if first >= last:
            continue
        own = [*spans[: joined.axis], (first, last), *spans[joined.axis + 1 :]]
        params = {
            "start_indices": tuple(a for a, _ in own),
            "limit_indices": tuple(b for _, b in own),
            "strides": None,
        }
        moved = _stepped(part, Step("slice", params, tuple(b - a for a, b in own)))
        if moved is None:
            return None
        parts.append(moved)
        sizes.append(last - first)
    if len(parts) == 1:
        return parts[0]
    return Joined(tuple(parts), tuple(sizes), joined.axis, joined.dense)


class Role(NamedTuple):
    """What a contraction does with the axis along which leaves are joined.

    Attributes:
      x_axis: axis of the other operand that is cut into parts, or None.
      y_axis: axis of the result along which the parts lie; None where they add up.
    """

    x_axis: int | None
    y_axis: int | None


def role(eqn: Any, position: int, axis: int) -> Role | None:
    """The role of an axis of an operand; None where the parts cannot be told apart."""
    p = eqn.params
    if eqn.primitive.name == "dot_general":
        contracted, batch = p["dimension_numbers"]
        own, other = (contracted[k] for k in (position, 1 - position))
        if axis in own:
            return Role(other[own.index(axis)], None)
        own_batch, other_batch = (batch[k] for k in (position, 1 - position))
        if axis in own_batch:
            k = own_batch.index(axis)
            return Role(other_batch[k], k)
        free = [
            [d for d in range(v.aval.ndim) if d not in (*contracted[k], *batch[k])]
            for k, v in enumerate(eqn.invars)
        ]
        before = len(own_batch) + (len(free[0]) if position else 0)
        return Role(None, before + free[position].index(axis))
    if eqn.primitive.name == "conv_general_dilated":
        lhs, rhs, out = p["dimension_numbers"]
        if position == 1 and p["feature_group_count"] == p["batch_group_count"] == 1:
            if axis == rhs[0]:
                return Role(None, out[1])
            if axis == rhs[1]:
                return Role(lhs[1], None)
    if eqn.primitive.name == RAGGED and position == 1:
        groups = p["ragged_dot_dimension_numbers"].rhs_group_dimensions
        return Role(None, None) if tuple(groups) == (axis,) else None
    return None


@dataclasses.dataclass(frozen=True)
class Piece:
    """The contraction of one part of joined leaves.

    Attributes:
      part: the leaf.
      product: the product, or why it is none.
      run: computes the piece of the result dense.
    """

    part: Tracked
    product: Product | Stop
    run: Callable[[], Any]


Match = Callable[[Any, list], Product | Stop]


def pieces(eqn: Any, operands: list, role: Role, match: Match) -> list[Piece]:
    """The contraction of joined leaves, leaf by leaf, in order.

    Args:
      eqn: the equation.
      operands: of it, one of them joined.
      role: what the axis of the leaves is to the equation.
      match: reads an equation with one leaf as a product, `walker.match`.
    """
    if eqn.primitive.name == RAGGED:
        return groups_of(eqn, operands, match)
    position = next(k for k, v in enumerate(operands) if isinstance(v, Joined))
    joined, x = operands[position], operands[1 - position]
    dtype, out, start = eqn.invars[position].aval.dtype, [], 0
    for part, size in zip(joined.parts, joined.sizes, strict=True):
        cut = cutter(role.x_axis, start, size)
        like: list[Any] = [None, None]
        like[position] = jax.ShapeDtypeStruct(views.sizes(part.view.dims), dtype)
        like[1 - position] = jax.eval_shape(cut, x)
        own = jax_versions.with_shapes(eqn, like)
        sides: list[Any] = [None, None]
        sides[position], sides[1 - position] = part, like[1 - position]
        product = match(own, sides)
        if isinstance(product, Product):
            product = _read_from(product, x, cut, (role.x_axis, start, size))

        def run(part: Tracked = part, own: Any = own, cut: Callable = cut) -> Any:
            values: list[Any] = [None, None]
            values[position], values[1 - position] = part.dense(), cut(x)
            return jax_versions.bind(own, values)[0]

        out.append(Piece(part, product, run))
        start += size
    return out


def groups_of(eqn: Any, operands: list, match: Match) -> list[Piece]:
    """A ragged dot with leaves side by side: each meets its own groups of tokens."""
    (x, stack, *rest), out, start = operands, [], 0
    for part, size in zip(stack.parts, stack.sizes, strict=True):
        product = match(eqn, [x, part, *rest])
        if isinstance(product, Product):
            product = experts.counted_from(product, start)
        edges = [(0, 0, 0)] * len(stack.shape)
        edges[stack.axis] = (start, sum(stack.sizes) - start - size, 0)

        def run(part: Tracked = part, edges: Any = edges) -> Any:
            # Zeros for the groups of the others: the results of all leaves add up.
            w = part.dense()
            w = lax.pad(w, jnp.zeros((), w.dtype), edges)
            return jax_versions.bind(eqn, [x, w, *rest])[0]

        out.append(Piece(part, product, run))
        start += size
    return out


def cutter(axis: int | None, start: int, size: int) -> Callable[[Array], Array]:
    """The part of an operand that meets one leaf."""
    if axis is None:
        return lambda x: x
    return lambda x: lax.slice_in_dim(x, start, start + size, axis=axis)


def _read_from(product: Product, x: Any, cut: Callable, span: tuple) -> Product:
    """The product in terms of the whole operand."""
    if span[0] is None:
        return dataclasses.replace(product, operand=x)
    arrange, parts = product.arrange, product.parts

    def cut_parts(whole: Product, limit: int) -> Iterator[tuple[int, Any]]:
        assert parts is not None
        for number, chunk in parts(whole, limit):
            yield number, lambda k, chunk=chunk: of_part(chunk(k))

    def of_part(chunk: Any) -> Any:
        return dataclasses.replace(chunk, tokens=lambda x: chunk.tokens(cut(x)))

    return dataclasses.replace(
        product,
        operand=x,
        arrange=lambda x: arrange(cut(x)),
        reading=(*product.reading, "part", *span),
        parts=None if parts is None else cut_parts,
    )


def combined(results: Sequence[Any], role: Role) -> Any:
    """The result of a contraction from those of its parts."""
    if role.y_axis is not None:
        return lax.concatenate(results, role.y_axis)
    total = results[0]
    for y in results[1:]:
        total = total + y
    return total
