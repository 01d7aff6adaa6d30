"""Dot products and convolutions in which a weight takes part, read as matrix products.

A `Product` says that x `[batch, free, in]` is contracted with a weight whose axes are
known in terms of its leaf. It puts x into the column order of the matrix `[*stack, o,
i]` of the leaf and takes the result back, so that whoever handles a product sees plain
matrices and never the axes of the program.
"""

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.views import Atom, Dims, Lookup, View, Where
from flexhinm_jax.types import AxisFactor, Layout, PackedWeight


class Kind(enum.Enum):
    """What kind of use ends the tracking of a leaf."""

    PRIMITIVE = enum.auto()  # a primitive that has no rule
    LOOKUP = enum.auto()  # rows are read, as from an embedding
    PRODUCT = enum.auto()  # a contraction that is no product with a matrix
    AUXILIARY = enum.auto()  # a product with a vector of parameters
    CONTROL = enum.auto()  # a loop, a shard_map or a derivative rule in the way


class Stop(NamedTuple):
    """Why a leaf is needed dense.

    Attributes:
      text: the reason, for people.
      kind: the reason, for programs.
    """

    text: str
    kind: Kind = Kind.CONTROL


LOOKUP = Stop("read by gather (embedding)", Kind.LOOKUP)


class Body(NamedTuple):
    """The part of a position that enters a body which runs less or more than once.

    Attributes:
      name: of the body, such as "branch" or "step".
      number: of the branch.
    """

    name: str
    number: int = 0


class Part(NamedTuple):
    """The part of a position that tells the products of one equation apart.

    Attributes:
      number: of the leaf, among those that the program put side by side.
    """

    number: int


def equation(where: Where) -> Where:
    """The position of the equation of a product."""
    return where[:-1] if isinstance(where[-1], Part) else where


def context(where: Where) -> Where:
    """The innermost body at a position; two positions in one body run together."""
    bodies = [k for k, step in enumerate(where) if isinstance(step, Body)]
    return where[: bodies[-1] + 1] if bodies else ()


class Followed:
    """A value of the walk that still is what became of leaves.

    Attributes:
      dense: computes the value; called only where a dense value is needed.
      tracked: the leaves.
    """

    dense: Callable[[], Any]
    tracked: "tuple[Tracked, ...]"


@dataclasses.dataclass(frozen=True)
class Tracked(Followed):
    """A parameter leaf inside the walk.

    Attributes:
      path: normalised path of the leaf.
      shape: shape of the leaf.
      view: how the current value reads the leaf.
      dense: computes the current value; called only where a dense value is needed.
      packed: the packed leaf, or None when the leaf is dense.
      left: the stack factors that the arrays of `packed` still have, in order.
      on_grid: whether it has eight bits, so that a scale may be multiplied on.
    """

    path: str
    shape: tuple[int, ...]
    view: View
    dense: Callable[[], Any]
    packed: PackedWeight | None = None
    left: tuple[AxisFactor, ...] = ()
    on_grid: bool = False

    @property
    def tracked(self) -> "tuple[Tracked, ...]":
        """The leaf."""
        return (self,)

    @property
    def lookup(self) -> Lookup | None:
        """The lookup that some factor of the leaf is read with, if there is one."""
        index = self.view.index
        return next((at for _, at in index if isinstance(at, Lookup)), None)


@dataclasses.dataclass(frozen=True)
class Product:
    """One matched contraction of a weight with an input.

    Attributes:
      weight: the leaf, with its view.
      batch: axes of the weight that are shared with x without being contracted.
      out: axes of the weight that only the result has.
      inputs: axes of the weight that are contracted.
      operand: the other operand, as the program has it.
      arrange: operand -> [batch, free, in]; for a convolution the im2col.
      free: sizes of the token axes, which only x has.
      finish: [batch, free, out] -> the result as the program wants it; uses `reshape`
        and `transpose` alone, so it serves numpy as well.
      result: shape, dtype and sharding of the result.
      reading: what `arrange` does, hashable: same operand and reading, same x.
      order: of the inputs in the matrix, by number of atom; None for leaf order.
      parts: (product, bytes) -> chunks of its tokens, for an `arrange` that takes more
        than the operand; see `convolutions.Window.parts`.
      least_bytes: what the least chunk takes.
      keep_positions: mask of the operand -> bool[*free], for an `arrange` that does
        more than to move the operand.
      routed: i64[tokens], where tokens have matrices of their own: which of the ids of
        the lookup of the weight belongs to each; see `experts`.
    """

    weight: Tracked
    batch: Dims
    out: Dims
    inputs: Dims
    operand: Any
    arrange: Callable[[Any], Any]
    free: tuple[int, ...]
    finish: Callable[[Any], Any]
    result: Any
    reading: tuple
    order: tuple[int, ...] | None = None
    parts: Callable[..., Iterator[tuple[int, Any]]] | None = None
    least_bytes: int = 0
    keep_positions: Callable[[Array], Array] | None = None
    routed: np.ndarray | None = None

    @functools.cached_property
    def atoms(self) -> tuple[list[Atom], ...]:
        """The atoms of the batch axes, of the outputs and of the inputs."""
        return tuple(map(views.flat, (self.batch, self.out, self.inputs)))

    @property
    def of_stack(self) -> list[Atom]:
        """The atoms of the batch axes."""
        return self.atoms[0]

    @property
    def of_out(self) -> list[Atom]:
        """The atoms of the outputs."""
        return self.atoms[1]

    @property
    def of_inputs(self) -> list[Atom]:
        """The atoms of the inputs, in the order of the program."""
        return self.atoms[2]

    @functools.cached_property
    def by_stack(self) -> list[Atom]:
        """The atoms of the batch axes in the order of the leaf."""
        return views.ordered(self.of_stack)

    @functools.cached_property
    def by_out(self) -> list[Atom]:
        """The atoms of the outputs in the order of the leaf."""
        return views.ordered(self.of_out)

    @property
    def obstacle(self) -> Stop | None:
        """Why this is no product with a matrix of the leaf; None if it is one."""
        every = itertools.chain(*self.atoms)
        if any(a.axis == views.REPEAT for a in every):
            return Stop("broadcast before it is contracted", Kind.PRODUCT)
        if not self.of_inputs:
            return Stop("scales its input by one value per output", Kind.PRODUCT)
        if not self.of_out:
            return Stop("contracted as a vector", Kind.PRODUCT)
        if not all(a.whole for a in self.of_stack):
            return Stop("contracted over a part of a batch axis", Kind.PRODUCT)
        return None

    @property
    def index(self) -> dict[AxisFactor, Any]:
        """Position per stack factor that the program indexed away."""
        index = self.weight.view.index
        return {a.factor: at for a, at in index if not isinstance(at, Lookup)}

    @property
    def route(self) -> tuple[Atom, Any] | None:
        """The factor whose entry every token has of its own, and the lookup."""
        index = self.weight.view.index
        return next((pair for pair in index if isinstance(pair[1], Lookup)), None)

    def routes(self) -> Array | None:
        """Entry of the routed factor per token, i32[tokens]; None without one."""
        return None if self.route is None else self.route[1].ids[self.routed]

    @functools.cached_property
    def layout(self) -> Layout:
        """The matrix view of the leaf in this product."""
        stack = self.of_stack + [atom for atom, _ in self.weight.view.index]
        stack = [atom for atom in stack if atom.axis >= 0]
        return views.layout(self.weight.shape, stack, self.of_out, self.ordered_inputs)

    @functools.cached_property
    def ordered_inputs(self) -> list[Atom]:
        """The atoms of the inputs in the order of the columns of the matrix."""
        atoms = self.of_inputs
        if self.order is None:
            return views.ordered(atoms)
        return [atoms[k] for k in self.order]

    def ordered_as(self, inputs: Sequence[AxisFactor]) -> "Product":
        """The same product with its inputs in the order of these factors."""

        def rank(a: Atom) -> tuple[int, int]:
            """Number of the factor that contains the atom, then major first."""
            for k, f in enumerate(inputs):
                if f.axis == a.axis and f.stride <= a.stride < f.stride * f.size:
                    return k, -a.stride
            return len(inputs), -a.stride

        atoms = self.of_inputs
        order = sorted(range(len(atoms)), key=lambda k: rank(atoms[k]))
        if [atoms[k] for k in order] == self.ordered_inputs:
            return self
        return dataclasses.replace(self, order=tuple(order))

    @property
    def stacked(self) -> tuple[AxisFactor, ...]:
        """The stack factors that are batch axes here, in the order of the layout."""
        return views.factors(self.of_stack, merge=False)

    @property
    def whole(self) -> bool:
        """Whether it takes all outputs of its matrices."""
        return all(a.whole for a in self.of_stack + self.of_out)

    @property
    def factor(self) -> float | None:
        """The constant with which x becomes the inputs of the leaf itself.

        The program multiplies the leaf with it. None where that number is not known; 1
        where the product has a part of the outputs, which share x with the others.
        """
        return self.weight.view.factor if self.whole else 1.0

    @property
    def columns(self) -> tuple:
        """Hashable: which columns of which x, times what, the inputs are."""
        atoms = self.of_inputs
        order = tuple(atoms.index(a) for a in self.ordered_inputs)
        spans = tuple((a.start, a.size, a.full, a.flipped) for a in atoms)
        stack = self.of_stack
        return (
            self.reading,
            order,
            spans,
            tuple(stack.index(a) for a in self.by_stack),
            self.factor,
        )

    def absorbed(self) -> "Product":
        """The same product with statically indexed factors read as output windows."""
        static = [pair for pair in self.weight.view.index if isinstance(pair[1], int)]
        if not static:
            return self
        index = tuple(p for p in self.weight.view.index if not isinstance(p[1], int))
        view = self.weight.view._replace(index=index)
        atoms = tuple(atom for atom, _ in static)
        out = (atoms + self.out[0], *self.out[1:]) if self.out else (atoms,)
        weight = dataclasses.replace(self.weight, view=view)
        return dataclasses.replace(self, weight=weight, out=out)

    @functools.cached_property
    def readings(self) -> "tuple[Product, ...]":
        """Ways to see the product as one with a matrix, the program's own first."""
        ways = self, self.absorbed(), self.split()
        return tuple({id(product): product for product in ways}.values())

    def split(self) -> "Product":
        """The same product with windows of outputs read as entries of a stack.

        Only where a leaf axis consists of equal parts, of which the window is one.
        """
        view, out = self.weight.view, []
        for dim in self.out:
            dim, taken = views.parted(dim)
            if taken:
                view = view._replace(index=view.index + taken)
            out.append(dim)
        if view is self.weight.view:
            return self
        weight = dataclasses.replace(self.weight, view=view)
        return dataclasses.replace(self, weight=weight, out=tuple(out))

    @property
    def window(self) -> tuple:
        """Hashable: which part of the outputs of the matrix this product has."""
        return tuple((a.start, a.size, a.full) for a in self.by_out)

    def fit(self, layout: Layout) -> "Product | None":
        """This product in terms of `layout` or its transpose; None if impossible."""
        for product in self.readings:
            for wanted in (layout, layout.transposed):
                fitted = product.ordered_as(wanted.inputs)
                if fitted.layout == wanted:
                    return fitted
        return None

    def tokens(self, operand: Any) -> Array:
        """The operand as [*stacked, tokens, i], columns in the order of the matrix.

        Inputs outside the window of the weight are zeros.
        """
        return self.columns_of(self.arrange(operand), math.prod(self.free))

    def columns_of(self, x: Array, count: int) -> Array:
        """`tokens` of what `arrange` makes of `count` of them."""
        stack, inputs = self.of_stack, self.of_inputs
        x = x.reshape([a.size for a in stack] + [count] + [a.size for a in inputs])
        turned = [k for k, a in enumerate(stack) if a.flipped]
        turned += [len(stack) + 1 + k for k, a in enumerate(inputs) if a.flipped]
        x = jnp.flip(x, turned) if turned else x
        margins = [(a.start, a.full - a.start - a.size) for a in inputs]
        if any(low or high for low, high in margins):
            x = jnp.pad(x, [(0, 0)] * (len(stack) + 1) + margins)
        first = len(stack)
        order = [stack.index(a) for a in self.by_stack] + [first]
        order += [first + 1 + inputs.index(a) for a in self.ordered_inputs]
        x = x.transpose(order)
        return x.reshape(*x.shape[: first + 1], math.prod(x.shape[first + 1 :]))

    def kept(self, keep: Array) -> Array:
        """Which tokens of the product count.

        Args:
          keep: booleans broadcastable against the operand.

        Returns:
          bool[*stacked, t]: some input of the token is kept; [t] without a stack, or
          where a convolution has groups, which see the same tokens.
        """
        if self.keep_positions is not None:
            return self.keep_positions(keep).reshape(-1)
        stack = self.of_stack
        x = self.arrange(jnp.broadcast_to(keep, self.operand.shape))
        front = len(self.batch) + len(self.free)
        x = x.any(axis=tuple(range(front, x.ndim)))
        x = x.reshape([a.size for a in stack] + [-1])
        turned = [k for k, a in enumerate(stack) if a.flipped]
        x = jnp.flip(x, turned) if turned else x
        return x.transpose([stack.index(a) for a in self.by_stack] + [len(stack)])

    def summed(
        self,
        statistic: Callable[["Chunk"], Any],
        limit: int | None,
        routes: Array | None = None,
    ) -> Any:
        """The sum of `statistic(chunk)` over all tokens, a chunk at a time.

        Args:
          statistic: tree of sums over the tokens of a chunk, equal in all shapes.
          limit: bytes that the tokens of a chunk may take where they take more than
            the operand; one row of one image is the least. None for any.
          routes: from `routes`; every entry of the routed factor is a chunk of its own,
            and its sums lie along a new first axis.
        """
        if routes is not None and self.route is not None:
            atom, count = self.route[0], math.prod(self.free)

            def entry(k: Any) -> Any:
                return statistic(Chunk(self.tokens, 0, count, routes == k, k))

            if atom.axis < 0:
                return entry(0)
            return lax.map(entry, jnp.arange(atom.full, dtype=routes.dtype))
        if self.parts is None or limit is None or 0 in self.free:
            whole = Chunk(self.tokens, 0, math.prod(self.free))
            return statistic(whole)
        total: Any = None
        for number, chunk in self.parts(self, limit):

            def add(k: Any, total: Any, chunk: Any = chunk) -> Any:
                return jax.tree.map(jnp.add, total, statistic(chunk(k)))

            first = statistic(chunk(0))
            more = lax.fori_loop(1, number, add, first) if number > 1 else first
            total = more if total is None else jax.tree.map(jnp.add, total, more)
        return total

    def restore(self, y: Any) -> Any:
        """[*stacked, tokens, o] as the result of the equation, its window cut out.

        Works on numpy arrays too; a `y` with a single token gives unit token axes.
        """
        stack, out = self.of_stack, self.of_out
        free = self.free if y.shape[len(stack)] != 1 else (1,) * len(self.free)
        by_stack, by_out = self.by_stack, self.by_out
        shape = (
            [a.full for a in by_stack] + [math.prod(free)] + [a.full for a in by_out]
        )
        y = y.reshape(shape)
        keep = tuple(slice(a.start, a.start + a.size) for a in by_out)
        y = y[(slice(None),) * (len(stack) + 1) + keep]
        first = len(stack)
        order = [by_stack.index(a) for a in stack] + [first]
        y = y.transpose(order + [first + 1 + by_out.index(a) for a in out])
        turned = [*stack, None, *out]
        if any(a and a.flipped for a in turned):
            y = y[
                tuple(slice(None, None, -1 if a and a.flipped else 1) for a in turned)
            ]
        y = y.reshape([*views.sizes(self.batch), *free, *views.sizes(self.out)])
        return self.finish(y)

    def moved(self, y: Any, moves: Sequence[Any]) -> Any:
        """`restore(y)` after equations that move the result around.

        Works on numpy arrays too, which casts leave as they are.
        """
        y = self.restore(y)
        for eqn in moves:
            if eqn.primitive.name == "transpose":
                y = y.transpose(eqn.params["permutation"])
            elif eqn.primitive.name in RESHAPES:
                y = y.reshape(eqn.outvars[0].aval.shape)
        return y

    def is_along_outputs(self, leaf: Tracked, moves: Sequence[Any]) -> bool:
        """Whether a leaf is `[*stack, o]` of this product in this very order.

        Args:
          leaf: what is added to its result, or multiplied with it.
          moves: equations that move the result around before that.
        """
        layout = self.layout
        shape = (*layout.stack_shape, layout.matrix_shape[0])
        if math.prod(leaf.shape) != math.prod(shape):
            return False
        index = self.index
        steps = [math.prod(shape[k + 1 :]) for k in range(len(layout.stack))]
        ours = [
            (s, index[f])
            for s, f in zip(steps, layout.stack, strict=True)
            if f in index
        ]
        strides = [math.prod(leaf.shape[d + 1 :]) for d in range(len(leaf.shape))]
        theirs = [(a.stride * strides[a.axis], at) for a, at in leaf.view.index]
        theirs.sort(key=lambda pair: -pair[0])
        if len(ours) != len(theirs):
            return False
        for (step, at), (other, there) in zip(ours, theirs, strict=True):
            same = at == there if isinstance(at, int) else at is there
            if step != other or not same:
                return False
        # Numbers in the place of results, moved as the program moves these, must meet
        # the leaf in its own order: only then the same permutation sorts both.
        at_zero = tuple(0 if f in index else slice(None) for f in layout.stack)
        order = np.arange(math.prod(shape)).reshape(shape)[at_zero]
        result = self.moved(np.expand_dims(order, -2), moves)
        return np.array_equal(result, views.positions(leaf.view, leaf.shape))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some of the tokens of a product.

    Attributes:
      tokens: operand of the product -> [*stacked, t, i].
      first: the first token, an int or traced.
      count: number of tokens, t.
      members: bool[t], those that meet the matrix in question; None for all.
      entry: which one of a routed factor that is, or None.
    """

    tokens: Callable[[Any], Array]
    first: Any
    count: int
    members: Array | None = None
    entry: Any = None

    def rows(self, values: Array, axis: int) -> Array:
        """These tokens of values with all tokens along an axis."""
        if self.count == values.shape[axis]:
            return values
        return lax.dynamic_slice_in_dim(values, self.first, self.count, axis=axis)

    def matrix(self, w: Array) -> Array:
        """The matrix in question of a leaf [*stacked, o, i]."""
        if self.entry is None or w.ndim < 3:
            return w
        return lax.dynamic_index_in_dim(w, self.entry, 0, keepdims=False)


#: Primitives that read the same elements in the same order under another shape.
RESHAPES = frozenset(("reshape", "squeeze"))


def sides(eqn: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
    """A dot_general, seen from its one Tracked operand.

    Returns:
      The weight, its axes that are summed over and its batch axes; the same of the
      other operand; whether the weight is the second operand.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    k = int(isinstance(operands[1], Tracked))
    own, other = ((operands[j], contracted[j], batch[j]) for j in (k, 1 - k))
    return *own, *other, bool(k)


def match_dot(eqn: Any, operands: list) -> Product:
    """The product of a dot_general with one Tracked operand."""
    w, wc, wb, x, xc, xb, right = sides(eqn, operands)
    tokens = [d for d in range(x.ndim) if d not in (*xc, *xb)]
    dims = w.view.dims
    out = tuple(dims[d] for d in range(len(dims)) if d not in (*wc, *wb))
    b, f = len(wb), len(tokens)

    def finish(y: Any) -> Any:
        swapped = [*range(b), *range(b + f, y.ndim), *range(b, b + f)]
        return y if right else y.transpose(swapped)

    return Product(
        weight=w,
        batch=tuple(dims[d] for d in wb),
        out=out,
        inputs=tuple(dims[d] for d in wc),
        operand=x,
        arrange=lambda x: x.transpose([*xb, *tokens, *xc]),
        free=tuple(x.shape[d] for d in tokens),
        finish=finish,
        result=eqn.outvars[0].aval,
        reading=("dot", tuple(xb), tuple(xc)),
    )


def plain(values: Sequence[Any]) -> list[Any]:
    """The values with everything followed made dense."""
    return [v.dense() if isinstance(v, Followed) else v for v in values]
