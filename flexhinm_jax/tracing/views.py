"""What a reshaped, transposed or sliced weight still says about its leaf.

A `View` describes every current axis of a value as a tuple of `Atom`s, major first:
pieces of the axes of the parameter leaf. Layout primitives permute, split, regroup and
narrow the atoms; when the value is contracted, the atoms say which leaf axes are
inputs, outputs and stacked, whatever happened in between. Nothing here traces: views
are plain tuples.

Equations that change a weight element by element and keep its zeros are part of the
view. A packed weight takes part in them value by value: casts, roundings, factors and
the end of its derivative apply to the kept values alone.
"""

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.core import Tracer

from flexhinm_jax.types import AxisFactor, ChannelScale, Layout

REPEAT = -1
ROUTED = -2

#: Position of an equation in a program: indices into nested jaxprs, and what tells the
#: bodies and products of one equation apart.
Where = tuple[Any, ...]


class Atom(NamedTuple):
    """A factor of a leaf axis, seen through the window [start, start + size).

    Attributes:
      axis: axis of the leaf, REPEAT for an axis that a broadcast added, or ROUTED for
        one that a lookup added, with positions among its ids.
      stride: distance of two neighbours, in positions of that axis.
      full: number of positions of the factor.
      start: first position in the window.
      size: number of positions in the window.
      flipped: whether the value shows the last position first.
    """

    axis: int
    stride: int
    full: int
    start: int
    size: int
    flipped: bool = False

    @property
    def whole(self) -> bool:
        """Whether the window shows all positions."""
        return self.size == self.full

    @property
    def factor(self) -> AxisFactor:
        """The factor without its window."""
        return AxisFactor(self.axis, self.stride, self.full)


class Reach(enum.Enum):
    """What a change does to a product of factors."""

    EVERY_FACTOR = enum.auto()
    ONE_FACTOR = enum.auto()
    PRODUCT_ONLY = enum.auto()  # known for the multiplied out product alone


class Change(NamedTuple):
    """What an equation does to every element of a weight.

    Attributes:
      apply: the change, for an array of any shape.
      reach: how it passes through a product of factors.
      scaled_at: position of the equation that scales by a value of the program.
      factor: what every element is multiplied with; None for a number that is known
        only when the program runs, or that has no inverse.
      scale: the leaf that it multiplies a leaf of eight bits with; see `scales`.
    """

    apply: Callable[[Array], Array]
    reach: Reach = Reach.EVERY_FACTOR
    scaled_at: Where | None = None
    scale: ChannelScale | None = None
    factor: float | None = 1.0


Dims = tuple[tuple[Atom, ...], ...]


class Lookup(NamedTuple):
    """Position of a factor of a leaf that is read at many places at once.

    Attributes:
      ids: i32[n], the places; those outside of the factor are none.
      source: what they were computed from: equal sources and keys, equal ids.
      key: how, hashable.
    """

    ids: Array
    source: Any
    key: tuple


class View(NamedTuple):
    """How a value reads its leaf.

    Attributes:
      dims: per axis of the value its atoms, major first; () for a unit axis.
      index: (atom, position) of the factors indexed away. A position is an int when it
        is static, otherwise a traced scalar, or an `Lookup` of one per token.
      changes: what changed the values, in order.
    """

    dims: Dims
    index: tuple[tuple[Atom, Any], ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def factor(self) -> float | None:
        """What all elements are multiplied with; None where a factor is not known."""
        factors = [step.factor for step in self.changes]
        return None if None in factors else math.prod(factors)  # type: ignore[arg-type]


def whole(shape: Sequence[int]) -> View:
    """The view of an untouched leaf."""
    return View(
        tuple((Atom(d, 1, n, 0, n),) if n > 1 else () for d, n in enumerate(shape))
    )


def flat(dims: Iterable[Iterable[Atom]]) -> list[Atom]:
    """All atoms, in the order of the axes."""
    return [atom for dim in dims for atom in dim]


def sizes(dims: Iterable[Iterable[Atom]]) -> list[int]:
    """Size of every axis."""
    return [math.prod(atom.size for atom in dim) for dim in dims]


def leaf_order(atom: Atom | AxisFactor) -> tuple[int, int]:
    """Sort key: position of the factor in the leaf, major first."""
    return atom.axis, -atom.stride


def ordered(atoms: Iterable[Atom]) -> list[Atom]:
    """Atoms in leaf order."""
    return sorted(atoms, key=leaf_order)


def factors(
    atoms: Iterable[Atom], merge: bool = True, sort: bool = True
) -> tuple[AxisFactor, ...]:
    """The factors of `atoms`; `sort` into leaf order, `merge` those that adjoin."""
    out: list[AxisFactor] = []
    own = [atom.factor for atom in atoms]
    for f in sorted(own, key=leaf_order) if sort else own:
        if merge and out and out[-1].axis == f.axis:
            if out[-1].stride == f.stride * f.size:
                f = AxisFactor(f.axis, f.stride, f.size * out.pop().size)
        out.append(f)
    return tuple(out)


def regroup(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The atoms of `dims` dealt out over axes of the sizes in `shape`.

    Returns:
      The new axes, or None where a border would cut an atom, or its window, unevenly.
    """
    if 0 in shape:
        return None
    atoms, out = flat(dims), []
    for n in shape:
        dim = []
        while n > 1:
            a = atoms.pop(0)
            if n % a.size:  # a border of the axes lies inside the atom: cut it there
                minor = a.size // n
                if a.size % n or a.full % minor or a.start % minor:
                    return None
                rest = a._replace(full=minor, start=0, size=minor)
                atoms.insert(0, rest)
                stride, full = a.stride * minor, a.full // minor
                a = Atom(a.axis, stride, full, a.start // minor, n, a.flipped)
            dim.append(a)
            n //= a.size
        out.append(tuple(dim))
    return tuple(out)


def window(view: View, d: int, start: int, n: int) -> View | None:
    """The view of [start, start + n) along axis `d`; one position becomes an index.

    Returns:
      The narrowed view, or None when the window cuts through a minor atom.
    """
    dim = view.dims[d]
    minor = math.prod(atom.size for atom in dim[1:])
    if n == minor * (dim[0].size if dim else 1):
        return view
    if start % minor or n % minor or not n:
        return None
    a, first, count = dim[0], start // minor, n // minor
    if a.flipped:
        first = a.size - first - count
    a = a._replace(start=a.start + first, size=count)
    kept, gone = ((a,), ()) if a.size > 1 else ((), ((a, a.start),))
    dims = (*view.dims[:d], kept + dim[1:], *view.dims[d + 1 :])
    return view._replace(dims=dims, index=view.index + gone)


def take(view: View, d: int, position: Any) -> View | None:
    """The view with one position of axis `d`, which stays as a unit axis.

    Returns:
      The narrowed view, or None when the axis is not one whole factor of the leaf.
    """
    dim = view.dims[d]
    if isinstance(position, int):
        top = math.prod(atom.size for atom in dim) - 1
        return window(view, d, min(max(position, 0), top), 1)
    if len(dim) != 1 or not dim[0].whole or dim[0].flipped:
        return None
    dims = (*view.dims[:d], (), *view.dims[d + 1 :])
    return view._replace(dims=dims, index=(*view.index, (dim[0], position)))


def parted(
    dim: tuple[Atom, ...],
) -> tuple[tuple[Atom, ...], tuple[tuple[Atom, Any], ...]]:
    """An axis whose window is one of equal parts, as that part and its position.

    Returns:
      (the axis without the position, the factors indexed away).
    """
    if not dim or dim[0].whole or dim[0].start % dim[0].size:
        return dim, ()
    a = dim[0]
    if a.full % a.size:
        return dim, ()
    part = Atom(a.axis, a.stride * a.size, a.full // a.size, a.start // a.size, 1)
    inside = a._replace(full=a.size, start=0)
    return (inside, *dim[1:]), ((part, part.start),)


def flip(dim: Iterable[Atom]) -> tuple[Atom, ...]:
    """The atoms of an axis that is read backwards."""
    return tuple(atom._replace(flipped=not atom.flipped) for atom in dim)


def broadcast(view: View, shape: Sequence[int], onto: Sequence[int]) -> View:
    """The view broadcast to `shape`, its axes going to the axes `onto`."""
    dims: list[tuple[Atom, ...]]
    dims = [(Atom(REPEAT, 1, n, 0, n),) if n > 1 else () for n in shape]
    for d, dim in zip(onto, view.dims, strict=True):
        if dim or shape[d] == 1:
            dims[d] = dim
    return view._replace(dims=tuple(dims))


#: Primitives that change neither a value nor its derivative.
IDENTITY = frozenset(
    "copy sharding_constraint layout_constraint name device_put reshard pvary".split()
)


def relayout(
    view: View,
    name: str,
    params: dict[str, Any],
    shapes: Sequence[Sequence[int]],
    operands: Sequence[Any] = (),
) -> list[View] | None:
    """The views of the outputs of a primitive that only moves its operand around.

    Args:
      view: view of the first operand.
      name: name of the primitive.
      params: parameters of the equation.
      shapes: shapes of the outputs.
      operands: the other operands (positions of a dynamic_slice, ints where static).

    Returns:
      One view per output, or None for any other primitive, or one that mixes factors.
    """
    out: list[View | None] = [None]
    if name in IDENTITY:
        out = [view]
    elif name == "transpose":
        dims = tuple(view.dims[d] for d in params["permutation"])
        out = [view._replace(dims=dims)]
    elif name == "rev":
        dims = tuple(
            flip(dim) if d in params["dimensions"] else dim
            for d, dim in enumerate(view.dims)
        )
        out = [view._replace(dims=dims)]
    elif name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        dims = regroup(view.dims, shapes[0])
        out = [None if dims is None else view._replace(dims=dims)]
    elif name == "broadcast_in_dim":
        out = [broadcast(view, shapes[0], params["broadcast_dimensions"])]
    elif name == "slice" and set(params["strides"] or [1]) == {1}:
        bounds = zip(params["start_indices"], params["limit_indices"], strict=True)
        narrowed: View | None = view
        for d, (low, high) in enumerate(bounds):
            narrowed = narrowed and window(narrowed, d, low, high - low)
        out = [narrowed]
    elif name == "split":
        ends = np.cumsum(params["sizes"])
        spans = [
            (int(end - n), int(n)) for end, n in zip(ends, params["sizes"], strict=True)
        ]
        out = [window(view, params["axis"], *span) for span in spans]
    elif name == "dynamic_slice":
        narrowed = view
        for d, n in enumerate(params["slice_sizes"]):
            if narrowed and n != sizes(view.dims)[d]:
                narrowed = take(narrowed, d, operands[d]) if n == 1 else None
        out = [narrowed]
    return None if None in out else out  # type: ignore[return-value]


def change(eqn: Any, where: Where, position: int, operands: list) -> Change | None:
    """What an equation does to the weight at a position of its operands.

    Args:
      eqn: the equation.
      where: its position.
      position: which operand the weight is.
      operands: all of them; only scalars are read.

    Returns:
      The change, or None for an equation that is not one.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "convert_element_type":
        dtype = params["new_dtype"]
        if not jnp.issubdtype(dtype, np.floating):
            return None
        return Change(lambda x: x.astype(dtype))
    if name == "stop_gradient":
        return Change(lax.stop_gradient)
    if name == "reduce_precision":
        return Change(lambda x: lax.reduce_precision(x, **params), Reach.PRODUCT_ONLY)
    if name == "neg":
        return Change(lax.neg, Reach.ONE_FACTOR, factor=-1.0)
    if name == "mul" or (name == "div" and position == 0):
        scalar = operands[1 - position]
        if np.shape(scalar):
            return None
        f = lax.mul if name == "mul" else lax.div
        return Change(
            lambda x: f(x, jnp.asarray(scalar, x.dtype)),
            Reach.ONE_FACTOR,
            where,
            factor=constant(scalar, inverse=name == "div"),
        )
    return None


def constant(scalar: Any, inverse: bool) -> float | None:
    """A scalar that is written into a program, or its inverse.

    Returns:
      The number; None for a scalar that the program computes, and where the number or
      its inverse is not finite.
    """
    if isinstance(scalar, Tracer) or not getattr(scalar, "is_fully_addressable", True):
        return None
    number = float(scalar)
    if not math.isfinite(number) or not number or not math.isfinite(1 / number):
        return None
    return 1 / number if inverse else number


def positions(view: View, shape: Sequence[int]) -> np.ndarray:
    """Flat position in a leaf of `shape` of every element of `view`.

    Broadcast axes have size 1 and indexed factors are read at position 0.
    """
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    out = np.zeros((), np.int64)
    for dim in view.dims:
        real = [atom for atom in dim if atom.axis != REPEAT]
        along = np.zeros((), np.int64)
        for a in dim if real else ():
            step = 0 if a.axis == REPEAT else a.stride * strides[a.axis]
            own = np.arange(a.size)[:: -1 if a.flipped else 1]
            along = along[..., None] + step * (a.start + own)
        out = out[..., None] + along.reshape(-1)
    return out


def matrix(leaf: Any, layout: Layout) -> Any:
    """A leaf as its stack of matrices.

    Args:
      leaf: array of shape `layout.shape`, numpy or jax.
      layout: which axes are stacked, outputs and inputs.

    Returns:
      [*stack, o, i]; exact inverse of `leaf`.
    """
    groups = layout.stack + layout.out + layout.inputs
    order = sorted(range(len(groups)), key=lambda k: leaf_order(groups[k]))
    parts = leaf.reshape([groups[k].size for k in order])
    parts = parts.transpose([int(k) for k in np.argsort(order)])
    return parts.reshape(*layout.stack_shape, *layout.matrix_shape)


def leaf(matrix: Any, layout: Layout) -> Any:
    """A stack of matrices as the leaf they came from.

    Args:
      matrix: [*stack, o, i], numpy or jax.
      layout: the layout with which `views.matrix` read the leaf.

    Returns:
      Array of shape `layout.shape`; exact inverse of `matrix`.
    """
    groups = layout.stack + layout.out + layout.inputs
    order = sorted(range(len(groups)), key=lambda k: leaf_order(groups[k]))
    parts = matrix.reshape([f.size for f in groups]).transpose(order)
    return parts.reshape(layout.shape)


def layout(
    shape: Sequence[int], stack: list[Atom], out: list[Atom], inputs: list[Atom]
) -> Layout:
    """The layout whose axes are these atoms; the inputs in the order they are in."""
    return Layout(
        tuple(shape),
        factors(stack, merge=False),
        factors(out),
        factors(inputs, sort=False),
    )


def plain_layout(shape: Sequence[int]) -> Layout:
    """The layout of a leaf that is an `[o, i]` matrix already, stacked if longer."""
    axes = [AxisFactor(d, 1, n) for d, n in enumerate(shape)]
    stack = tuple(f for f in axes[:-2] if f.size > 1)
    out = tuple(f for f in axes[-2:-1] if f.size > 1)
    inputs = tuple(f for f in axes[-1:] if f.size > 1)
    return Layout(tuple(shape), stack, out, inputs)
