"""Dot products and convolutions in which a weight takes part, read as matrix products.

A `Product` says that x `[batch, free, in]` is contracted with a weight whose axes are
known in terms of its leaf. It puts x into the column order of the matrix `[*stack, o,
i]` of the leaf and takes the result back, so that whoever handles a product sees plain
matrices and never the axes of the program.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.stops import Kind, Stop
from flexhinm_jax.tracing.views import Atom, Dims, View
from flexhinm_jax.types import AxisFactor, Layout, PackedWeight


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
    """

    path: str
    shape: tuple[int, ...]
    view: View
    dense: Callable[[], Any]
    packed: PackedWeight | None = None
    left: tuple[AxisFactor, ...] = ()

    @property
    def tracked(self) -> "tuple[Tracked, ...]":
        """The leaf."""
        return (self,)


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

    @property
    def index(self) -> dict[AxisFactor, Any]:
        """Position per stack factor that the program indexed away."""
        return {atom.factor: at for atom, at in self.weight.view.index}

    @property
    def layout(self) -> Layout:
        """The matrix view of the leaf in this product."""
        stack = views.flat(self.batch) + [atom for atom, _ in self.weight.view.index]
        return Layout(
            self.weight.shape,
            views.factors(stack, merge=False),
            views.factors(views.flat(self.out)),
            views.factors(views.flat(self.inputs)),
        )

    @property
    def stacked(self) -> tuple[AxisFactor, ...]:
        """The stack factors that are batch axes here, in the order of the layout."""
        return views.factors(views.flat(self.batch), merge=False)

    @property
    def columns(self) -> tuple:
        """Hashable: which columns of which x the inputs of the matrix are."""
        atoms = views.flat(self.inputs)
        order = tuple(sorted(range(len(atoms)), key=lambda k: atoms[k][:2]))
        spans = tuple((a.start, a.size, a.full) for a in atoms)
        stack = views.flat(self.batch)
        return self.reading, order, spans, tuple(stack.index(a) for a in ordered(stack))

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

    def readings(self) -> "tuple[Product, ...]":
        """Ways to see the product as one with a matrix, the program's own first."""
        return self, self.absorbed(), self.split()

    def split(self) -> "Product":
        """The same product with windows of outputs read as entries of a stack.

        Only where a leaf axis consists of equal parts, of which the window is one.
        """
        view, out = self.weight.view, []
        for dim in self.out:
            dim, taken = views.parted(dim)
            view = view._replace(index=view.index + taken)
            out.append(dim)
        weight = dataclasses.replace(self.weight, view=view)
        return dataclasses.replace(self, weight=weight, out=tuple(out))

    @property
    def window(self) -> tuple:
        """Hashable: which part of the outputs of the matrix this product has."""
        return tuple((a.start, a.size, a.full) for a in ordered(views.flat(self.out)))

    def fit(self, layout: Layout) -> "Product | None":
        """This product in terms of `layout` or its transpose; None if impossible."""
        for product in self.readings():
            own = product.layout
            if own == layout or own == transposed(layout):
                return product
        return None

    def tokens(self, operand: Any) -> Array:
        """The operand as [*stacked, tokens, i], columns in the order of the matrix.

        Inputs outside the window of the weight are zeros.
        """
        stack, inputs = views.flat(self.batch), views.flat(self.inputs)
        x = self.arrange(operand)
        count = math.prod(self.free)
        x = x.reshape([a.size for a in stack] + [count] + [a.size for a in inputs])
        margins = [(a.start, a.full - a.start - a.size) for a in inputs]
        if any(low or high for low, high in margins):
            x = jnp.pad(x, [(0, 0)] * (len(stack) + 1) + margins)
        first = len(stack)
        order = [stack.index(a) for a in ordered(stack)] + [first]
        order += [first + 1 + inputs.index(a) for a in ordered(inputs)]
        x = x.transpose(order)
        return x.reshape(*x.shape[: first + 1], -1)

    def restore(self, y: Any) -> Any:
        """[*stacked, tokens, o] as the result of the equation, its window cut out.

        Works on numpy arrays too; a `y` with a single token gives unit token axes.
        """
        stack, out = views.flat(self.batch), views.flat(self.out)
        free = self.free if y.shape[len(stack)] != 1 else (1,) * len(self.free)
        by_stack, by_out = ordered(stack), ordered(out)
        shape = (
            [a.full for a in by_stack] + [math.prod(free)] + [a.full for a in by_out]
        )
        y = y.reshape(shape)
        keep = tuple(slice(a.start, a.start + a.size) for a in by_out)
        y = y[(slice(None),) * (len(stack) + 1) + keep]
        first = len(stack)
        order = [by_stack.index(a) for a in stack] + [first]
        y = y.transpose(order + [first + 1 + by_out.index(a) for a in out])
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


#: Primitives that read the same elements in the same order under another shape.
RESHAPES = frozenset(("reshape", "squeeze"))


def plain(values: Sequence[Any]) -> list[Any]:
    """The values with everything followed made dense."""
    return [v.dense() if isinstance(v, Followed) else v for v in values]


def ordered(atoms: list[Atom]) -> list[Atom]:
    """Atoms in leaf order."""
    return sorted(atoms, key=views.leaf_order)


def transposed(layout: Layout) -> Layout:
    """The layout with inputs and outputs exchanged."""
    return dataclasses.replace(layout, out=layout.inputs, inputs=layout.out)


def match(eqn: Any, operands: list) -> Product | Stop:
    """Reads a dot_general or convolution with a Tracked operand as a product.

    Returns:
      The product, or the reason why the leaf is not the matrix of one.
    """
    if sum(isinstance(v, Followed) for v in operands) > 1:
        kind = Kind.AUXILIARY if is_vector(eqn, operands) else Kind.PRODUCT
        return Stop("contracted with another parameter", kind)
    product = MATCHERS[eqn.primitive.name](eqn, operands)
    if isinstance(product, Stop):
        return product
    parts = [views.flat(dims) for dims in (product.batch, product.out, product.inputs)]
    if any(a.axis == views.REPEAT for part in parts for a in part):
        return Stop("broadcast before it is contracted", Kind.PRODUCT)
    if not parts[2]:
        return Stop("scales its input by one value per output", Kind.PRODUCT)
    if not parts[1]:
        return Stop("contracted as a vector", Kind.PRODUCT)
    if not all(a.whole for a in parts[0]):
        return Stop("contracted over a part of a batch axis", Kind.PRODUCT)
    return product


def is_vector(eqn: Any, operands: list) -> bool:
    """Whether an operand of a product of two leaves is one vector or a row of one."""
    if eqn.primitive.name != "dot_general":
        return False
    if not all(isinstance(v, Tracked) for v in operands):
        return False
    contracted = eqn.params["dimension_numbers"][0]
    for v, axes in zip(operands, contracted, strict=True):
        sizes = views.sizes(v.view.dims)
        if math.prod(sizes) == math.prod(sizes[d] for d in axes):
            return True
    return False


def match_dot(eqn: Any, operands: list) -> Product:
    """The product of a dot_general with one Tracked operand."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    right = isinstance(operands[1], Tracked)
    if right:
        w, x, wc, wb, xc, xb = operands[1], operands[0], rc, rb, lc, lb
    else:
        w, x, wc, wb, xc, xb = operands[0], operands[1], lc, lb, rc, rb
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


def match_conv(eqn: Any, operands: list) -> Product | Stop:
    """The product of a convolution: a dot with patches, one stack entry per group."""
    p, shape = eqn.params, eqn.invars[1].aval.shape
    if isinstance(operands[0], Tracked):
        return Stop("convolved as the image, not as the kernel", Kind.PRODUCT)
    if p["batch_group_count"] != 1:
        return Stop("a convolution with batch groups", Kind.PRODUCT)
    lhs, rhs, out_spec = p["dimension_numbers"]
    w, groups = operands[1], p["feature_group_count"]
    split = (groups, shape[rhs[0]] // groups)
    out = views.regroup((w.view.dims[rhs[0]],), split)
    if out is None or not all(a.whole for a in out[0]):
        text = "feature groups of a convolution cut an axis of the leaf"
        return Stop(text, Kind.PRODUCT)
    if groups > 1 and split[1] == 1:
        return Stop("a depthwise convolution: one output per group", Kind.PRODUCT)
    images = tuple(operands[0].shape[d] for d in lhs)
    space = tuple(eqn.outvars[0].aval.shape[d] for d in out_spec[2:])
    kernel = tuple(shape[d] for d in rhs[2:])

    def finish(y: Any) -> Any:
        y = y.transpose([*range(1, y.ndim - 1), 0, y.ndim - 1])  # [n, *space, g, o / g]
        y = y.reshape(*y.shape[:-2], -1)
        y = y.transpose([0, y.ndim - 1, *range(1, y.ndim - 1)])  # [n, o, *space]
        return y.transpose([int(d) for d in np.argsort(out_spec)])

    return Product(
        weight=w,
        batch=out[:1],
        out=out[1:],
        inputs=tuple(w.view.dims[d] for d in rhs[1:]),
        operand=operands[0],
        arrange=lambda x: patches(x.transpose(lhs), kernel, groups, p),
        free=(images[0], *space),
        finish=finish,
        result=eqn.outvars[0].aval,
        reading=("conv", kernel, groups, *map(str, window_params(p).items()), str(lhs)),
    )


MATCHERS: dict[str, Callable[[Any, list], Product | Stop]] = {
    "dot_general": match_dot,
    "conv_general_dilated": match_conv,
}


def window_params(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a convolution that choose the patches."""
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return {name: params[name] for name in names}


def patches(x: Array, kernel: tuple[int, ...], groups: int, params: dict) -> Array:
    """im2col.

    Args:
      x: [n, features, *space].
      kernel: spatial shape of the kernel.
      groups: number of feature groups.
      params: parameters of the convolution.

    Returns:
      [groups, n, *space, features / groups * prod(kernel)], features major.
    """
    out = lax.conv_general_dilated_patches(
        x,
        filter_shape=kernel,
        precision=lax.Precision.HIGHEST,
        **window_params(params),
    )
    n, space = out.shape[0], out.shape[2:]
    out = out.reshape(n, groups, -1, *space)
    return jnp.moveaxis(out, (1, 2), (0, -1))
