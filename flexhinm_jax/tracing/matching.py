"""Equations in which a weight takes part, read as products with a matrix."""

import math
from collections.abc import Callable
from typing import Any

from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.contractions import Followed, Product, Tracked, sides
from flexhinm_jax.tracing.convolutions import match_conv
from flexhinm_jax.tracing.experts import lookup, match_ragged, match_routed
from flexhinm_jax.tracing.stops import LOOKUP, Kind, Stop


def match(eqn: Any, operands: list) -> Product | Stop:
    """Reads a contraction with a Tracked operand as a product.

    Returns:
      The product, or the reason why the leaf is not the matrix of one.
    """
    if sum(isinstance(v, Followed) for v in operands) > 1:
        kind = Kind.AUXILIARY if is_vector(eqn, operands) else Kind.PRODUCT
        return Stop("contracted with another parameter", kind)
    weight = next(v for v in operands if isinstance(v, Tracked))
    matcher = MATCHERS[eqn.primitive.name]
    if lookup(weight.view) is not None:
        matcher = match_routed if matcher is match_dot else no_lookup
    product = matcher(eqn, operands)
    if isinstance(product, Stop):
        return product
    parts = product.of_stack, product.of_out, product.of_inputs
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


def no_lookup(eqn: Any, operands: list) -> Stop:
    """Matrices that a lookup has read are followed into a dot_general alone."""
    del eqn, operands
    return LOOKUP


MATCHERS: dict[str, Callable[[Any, list], Product | Stop]] = {
    "dot_general": match_dot,
    "conv_general_dilated": match_conv,
    "ragged_dot_general": match_ragged,
}
