"""Products in which every token has a matrix of its own: experts of a mixture.

`lax.ragged_dot(x, w, sizes)` multiplies runs of tokens with the matrices of a stack,
and `x[t] @ w[expert[t]]` reads the matrix of each token by a gather. Both are a product
with the whole stack and a number per token that says which matrix it meets.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jax import lax
from jax import numpy as jnp

from flexhinm_jax import jax_versions
from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.contractions import (
    LOOKUP,
    Kind,
    Product,
    Stop,
    Tracked,
    sides,
)
from flexhinm_jax.tracing.views import Atom, Dims, Lookup, View


def looked_up(eqn: Any, weight: Any, rest: list) -> list[Tracked] | None:
    """The result of a gather that reads whole matrices of a stack; None for others.

    Args:
      eqn: a gather.
      weight: its operand.
      rest: its indices.
    """
    if not isinstance(weight, Tracked) or weight.lookup is not None:
        return None
    numbers, slices = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    dims, shape = weight.view.dims, views.sizes(weight.view.dims)
    part = [d for d, n in enumerate(shape) if slices[d] != n]
    if len(part) != 1 or slices[part[0]] != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = part
    is_factor = len(dims[axis]) == 1 and dims[axis][0].whole
    others = [dim for d, dim in enumerate(dims) if d != axis and dim]
    if not is_factor or dims[axis][0].flipped or len(others) < 2:
        return None  # fewer axes are rows of a table
    column = numbers.start_index_map.index(axis)
    ids = rest[0][..., column]
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        ids = jnp.clip(ids, 0, shape[axis] - 1)
    at = Lookup(ids.reshape(-1), rest[0], (column, str(eqn.params["mode"])))
    view = View(
        gathered_dims(numbers, weight.view.dims, axis, ids.shape),
        (*weight.view.index, (dims[axis][0], at)),
        weight.view.changes,
    )

    def dense() -> Any:
        return jax_versions.bind(eqn, [weight.dense(), *rest])[0]

    return [dataclasses.replace(weight, view=view, dense=dense)]


def gathered_dims(numbers: Any, dims: Dims, axis: int, tokens: tuple[int, ...]) -> Dims:
    """The axes of a gather's result: those of the ids among those of the leaf."""
    kept = [d for d in range(len(dims)) if d not in numbers.collapsed_slice_dims]
    own = iter([() if d == axis else dims[d] for d in kept])
    strides = [math.prod(tokens[k + 1 :]) for k in range(len(tokens))]
    of_ids = iter(
        (Atom(views.ROUTED, s, n, 0, n),) if n > 1 else ()
        for s, n in zip(strides, tokens, strict=True)
    )
    count = len(kept) + len(tokens)
    return tuple(
        next(own) if d in numbers.offset_dims else next(of_ids) for d in range(count)
    )


def is_routed(dim: tuple[Atom, ...]) -> bool:
    """Whether an axis belongs to the ids of a lookup."""
    return any(atom.axis == views.ROUTED for atom in dim)


def match_routed(eqn: Any, operands: list) -> Product | Stop:
    """The product of a dot_general with matrices that a lookup has read."""
    w, wc, wb, x, xc, xb, right = sides(eqn, operands)
    dims, shape = w.view.dims, views.sizes(w.view.dims)
    own = [d for d in range(len(dims)) if d not in (*wc, *wb)]
    routed = [d for d in own if is_routed(dims[d])]
    out = [d for d in own if d not in routed]
    tokens = [d for d in range(x.ndim) if d not in (*xc, *xb)]
    if any(is_routed(dims[d]) for d in wc):
        return LOOKUP
    if not all(is_routed(dims[d]) or not dims[d] for d in wb):
        return Stop("looked up by token inside a stack", Kind.PRODUCT)
    free = (
        *(shape[d] for d in wb),
        *(x.shape[d] for d in tokens),
        *(shape[d] for d in routed),
    )
    inner = len(wb) + len(tokens)

    def arrange(x: Any) -> Any:
        x = x.transpose([*xb, *tokens, *xc])
        ends = x.shape[inner:]
        x = x.reshape(*x.shape[:inner], *(1 for _ in routed), *ends)
        return jnp.broadcast_to(x, (*free, *ends))

    def finish(y: Any) -> Any:
        place = {d: inner + k for k, d in enumerate(routed)}
        place |= {d: len(free) + k for k, d in enumerate(out)}
        of_w, of_x = [place[d] for d in own], [*range(len(wb), inner)]
        order = [*range(len(wb)), *(of_x + of_w if right else of_w + of_x)]
        return y.transpose(order)

    parts = [dims[d] for d in wb] + [()] * len(tokens) + [dims[d] for d in routed]
    return Product(
        weight=w,
        batch=(),
        out=tuple(dims[d] for d in out),
        inputs=tuple(dims[d] for d in wc),
        operand=x,
        arrange=arrange,
        free=free,
        finish=finish,
        result=eqn.outvars[0].aval,
        reading=("routed", tuple(xb), tuple(xc), free, tuple(parts)),
        routed=places(parts, free),
    )


def places(parts: list[tuple[Atom, ...]], free: tuple[int, ...]) -> np.ndarray:
    """Per token, which of the ids of a lookup is its own, i64[tokens]."""
    out = np.zeros((), np.int64)
    for dim, size in zip(parts, free, strict=True):
        along = np.zeros((), np.int64)
        for a in dim:
            steps = np.arange(a.size)[:: -1 if a.flipped else 1]
            along = along[..., None] + a.stride * (a.start + steps)
        out = out[..., None] + np.broadcast_to(along.reshape(-1), size)
    return out.reshape(-1)


def match_ragged(eqn: Any, operands: list) -> Product | Stop:
    """The product of a ragged dot whose groups of tokens meet a stack of matrices."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, _) = numbers.dot_dimension_numbers
    x, w, sizes = operands[:3]
    if not isinstance(w, Tracked):
        return Stop("grouped as the tokens of a ragged dot", Kind.PRODUCT)
    groups, (ragged,) = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    if len(groups) != 1 or lb or ragged in lc or np.ndim(sizes) != 1:
        return Stop("a ragged dot over a contracted or batch axis", Kind.PRODUCT)
    dims = w.view.dims
    (group,) = groups
    atoms = dims[group]
    if len(atoms) > 1 or any(not a.whole or a.flipped for a in atoms):
        return Stop("a ragged dot over a part of an axis", Kind.PRODUCT)
    tokens = [d for d in range(x.ndim) if d not in lc]
    free = tuple(x.shape[d] for d in tokens)
    # Tokens after the last group get a number past the factor, which no entry has.
    ends = jnp.cumsum(jnp.asarray(sizes, jnp.int32), dtype=jnp.int32)
    ids = jnp.searchsorted(ends, jnp.arange(x.shape[ragged], dtype=jnp.int32), "right")
    at = Lookup(ids.astype(jnp.int32), sizes, ("sizes", x.shape[ragged]))
    atom = atoms[0] if atoms else Atom(views.ROUTED, 1, 1, 0, 1)
    view = w.view._replace(index=(*w.view.index, (atom, at)))
    parts: list[tuple[Atom, ...]] = [() for _ in tokens]
    count = x.shape[ragged]
    parts[tokens.index(ragged)] = (Atom(views.ROUTED, 1, count, 0, count),)
    own = [d for d in range(len(dims)) if d not in (*rc, group)]
    return Product(
        weight=dataclasses.replace(w, view=view),
        batch=(),
        out=tuple(dims[d] for d in own),
        inputs=tuple(dims[d] for d in rc),
        operand=x,
        arrange=lambda x: x.transpose([*tokens, *lc]),
        free=free,
        finish=lambda y: y,
        result=eqn.outvars[0].aval,
        reading=("ragged", ragged, tuple(lc)),
        routed=places(parts, free),
    )


def counted_from(product: Product, first: int) -> Product:
    """A routed product whose leaf holds the matrices from number `first` on."""
    *index, (atom, at) = product.weight.view.index
    at = at._replace(ids=at.ids - first, key=(*at.key, first))
    view = product.weight.view._replace(index=(*index, (atom, at)))
    weight = dataclasses.replace(product.weight, view=view)
    return dataclasses.replace(product, weight=weight)
