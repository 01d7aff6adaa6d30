"""Runs traced functions operation by operation in NumPy.

A generated program runs once, on a few tokens, and XLA would spend seconds on compiling
it. Here it is traced as for `jax.jit`, its loops and branches included, and the jaxpr
is read off in NumPy. Operations without a rule run in JAX, which compiles each of them
once per shape for all programs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Literal

from flexhinm_jax import jax_versions


def evaluated(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, traced for the shapes of its arguments and run in NumPy."""

    def run(*args: Any) -> Any:
        jaxpr, out = jax.make_jaxpr(f, return_shape=True)(*args)
        with np.errstate(all="ignore"):
            results = evaluate(jaxpr, jax.tree.leaves(args))
        return jax.tree.structure(out).unflatten(map(jnp.asarray, results))

    return run


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr."""
    body, consts = jax_versions.opened(jaxpr)
    inputs = [*body.constvars, *body.invars]
    env = dict(zip(inputs, map(np.asarray, [*consts, *operands]), strict=True))

    def read(v: Any) -> Any:
        if not isinstance(v, Literal):
            return env[v]
        return np.asarray(v.val, getattr(v.aval, "dtype", None))

    for eqn in body.eqns:
        results = operation(eqn, [read(v) for v in eqn.invars])
        for v, result in zip(eqn.outvars, results, strict=True):
            env[v] = np.asarray(result).astype(v.aval.dtype, copy=False)
            assert env[v].shape == v.aval.shape, f"{eqn}: gave {env[v].shape}"
    return [read(v) for v in body.outvars]


def operation(eqn: Any, operands: list[Any]) -> Sequence[Any]:
    """The results of one equation."""
    name, p = eqn.primitive.name, eqn.params
    if name in CONTROL:
        return CONTROL[name](p, operands)
    if name in CALLS:
        return evaluate(jax_versions.called_jaxpr(p), operands)
    if name in SAME:
        return operands
    if name in ELEMENTWISE:
        return [ELEMENTWISE[name](*operands)]
    if name == "packed_product":
        return evaluate(parts_of(eqn), operands)
    results = RULES[name](eqn, *operands) if name in RULES else None
    if results is None:
        return jax_versions.bind(eqn, operands)
    return results if isinstance(results, list) else [results]


def parts_of(eqn: Any) -> Any:
    """What an equation of the package computes, as a jaxpr."""
    shapes = tuple((v.aval.shape, v.aval.dtype) for v in eqn.invars)
    return _parts_of(eqn.primitive, shapes, tuple(eqn.params.items()))


@functools.cache
def _parts_of(primitive: Any, shapes: tuple, params: tuple) -> Any:
    f = functools.partial(primitive.impl, **dict(params))
    return jax.make_jaxpr(f)(*itertools.starmap(jax.ShapeDtypeStruct, shapes))


CALLS = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call "
    "custom_vjp_call custom_vjp_call_jaxpr".split()
)
SAME = frozenset(
    "stop_gradient copy copy_p name optimization_barrier convert_element_type".split()
)


def cond(p: dict[str, Any], operands: list[Any]) -> list[Any]:
    """The branch that is taken."""
    branches = p["branches"]
    which = min(max(int(operands[0]), 0), len(branches) - 1)
    return evaluate(branches[which], operands[1:])


def while_loop(p: dict[str, Any], operands: list[Any]) -> list[Any]:
    """Turn by turn."""
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    carry = operands[last:]
    while evaluate(p["cond_jaxpr"], [*operands[:first], *carry])[0]:
        carry = evaluate(p["body_jaxpr"], [*operands[first:last], *carry])
    return carry


def scan(p: dict[str, Any], operands: list[Any]) -> list[Any]:
    """Step by step; of no steps, the rows are empty."""
    consts, carry, xs = jax_versions.scan_operands(p, operands)
    shapes = [v.aval for v in jax_versions.opened(p["jaxpr"])[0].outvars[len(carry) :]]
    ys = [np.zeros((p["length"], *v.shape), v.dtype) for v in shapes]
    steps = range(p["length"])
    for k in reversed(steps) if p["reverse"] else steps:
        outs = evaluate(p["jaxpr"], [*consts, *carry, *(x[k] for x in xs)])
        carry = outs[: len(carry)]
        for y, row in zip(ys, outs[len(carry) :], strict=True):
            y[k] = row
    return [*carry, *ys]


CONTROL: dict[str, Callable] = {"cond": cond, "while": while_loop, "scan": scan}


def select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    """The case that `which` names, element by element."""
    out = cases[0]
    for k, case in enumerate(cases[1:], 1):
        out = np.where(which == k, case, out)
    return out


ELEMENTWISE: dict[str, Callable] = {
    **{name: getattr(np, name) for name in "abs exp log sign sqrt tanh square".split()},
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "select_n": select,
    "shift_right_logical": lambda x, n: (x.view(f"u{x.itemsize}") >> n).view(x.dtype),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}


def div(eqn: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """Quotients of real numbers."""
    return x / y if jnp.issubdtype(eqn.outvars[0].aval.dtype, np.floating) else None


def dot(eqn: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A product over any axes."""
    (xc, yc), (xb, yb) = eqn.params["dimension_numbers"]
    own = [d for d in range(x.ndim) if d not in (*xc, *xb)]
    other = [d for d in range(y.ndim) if d not in (*yc, *yb)]
    out = eqn.outvars[0].aval
    wide = np.float32 if jnp.issubdtype(out.dtype, np.floating) else np.int64
    wide = np.promote_types(wide, out.dtype) if out.dtype == np.float64 else wide
    batch = [x.shape[d] for d in xb]
    inner = int(np.prod([x.shape[d] for d in xc], dtype=np.int64))
    rows = int(np.prod([x.shape[d] for d in own], dtype=np.int64))
    columns = int(np.prod([y.shape[d] for d in other], dtype=np.int64))
    x = x.transpose([*xb, *own, *xc]).reshape(*batch, rows, inner)
    y = y.transpose([*yb, *yc, *other]).reshape(*batch, inner, columns)
    return (x.astype(wide) @ y.astype(wide)).reshape(out.shape)


def reshape(eqn: Any, x: np.ndarray) -> Any:
    """The same elements under another shape."""
    moves = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    return None if moves else x.reshape(eqn.outvars[0].aval.shape)


def broadcast(eqn: Any, x: np.ndarray) -> np.ndarray:
    """Axes go where the equation says; new ones repeat."""
    shape, onto = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    places = [1] * len(shape)
    for d, n in zip(onto, x.shape, strict=True):
        places[d] = n
    return np.broadcast_to(x.reshape(places), shape)


def pad(eqn: Any, x: np.ndarray, value: np.ndarray) -> Any:
    """Edges that are not cut."""
    config = eqn.params["padding_config"]
    if any(low < 0 or high < 0 for low, high, _ in config):
        return None
    out = np.full(eqn.outvars[0].aval.shape, value, x.dtype)
    out[
        tuple(
            slice(low, low + (n - 1) * (inner + 1) + 1, inner + 1) if n else slice(0, 0)
            for n, (low, _, inner) in zip(x.shape, config, strict=True)
        )
    ] = x
    return out


def spans(x: np.ndarray, sizes: Sequence[int], starts: Sequence[Any]) -> tuple:
    """A window moved back inside of an array."""
    low = [
        min(max(int(s), 0), n - size)
        for s, n, size in zip(starts, x.shape, sizes, strict=True)
    ]
    return tuple(slice(s, s + size) for s, size in zip(low, sizes, strict=True))


def update(eqn: Any, x: np.ndarray, part: np.ndarray, *starts: Any) -> np.ndarray:
    """An array with a window replaced."""
    out = x.copy()
    out[spans(x, part.shape, starts)] = part
    return out


def sort(eqn: Any, *operands: np.ndarray) -> Any:
    """Operands in the order of the first."""
    axis = eqn.params["dimension"]
    if eqn.params["num_keys"] != 1:
        return None
    order = np.argsort(operands[0], axis=axis, kind="stable")
    return [np.take_along_axis(x, order, axis) for x in operands]


def places(
    ids: np.ndarray,
    sizes: Sequence[int],
    shape: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
) -> tuple | None:
    """Positions in an array of windows at ids [*batch, k]; None where one leaves it.

    Args:
      ids: where they begin, along the axes `index_map`.
      sizes: of a window, per axis of the array.
      shape: of the array.
      index_map: axis of the array per id.
      batching: (axis of the array, axis of ids) that go together.
    """
    batch = ids.shape[:-1]
    starts: list[Any] = [np.zeros(batch, np.int64) for _ in shape]
    for k, d in enumerate(index_map):
        starts[d] = ids[..., k].astype(np.int64)
    for d, axis in batching:
        along = [n if a == axis else 1 for a, n in enumerate(batch)]
        starts[d] = np.broadcast_to(np.arange(shape[d]).reshape(along), batch)
    out = []
    for d, (start, size, n) in enumerate(zip(starts, sizes, shape, strict=True)):
        if start.size and (start.min() < 0 or start.max() > n - size):
            return None
        steps = [size if a == d else 1 for a in range(len(shape))]
        start = start.reshape(*batch, *(1 for _ in shape))
        out.append(start + np.arange(size).reshape(steps))
    return tuple(out)


def gather(eqn: Any, x: np.ndarray, ids: np.ndarray) -> Any:
    """Windows at the ids."""
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    pairs = [
        *zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    ]
    at = places(ids, sizes, x.shape, numbers.start_index_map, pairs)
    if at is None:
        return None
    first = ids.ndim - 1
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    out = x[at].squeeze(tuple(first + d for d in gone))
    return np.moveaxis(out, range(first, out.ndim), numbers.offset_dims)


def scatter(eqn: Any, x: np.ndarray, ids: np.ndarray, updates: np.ndarray) -> Any:
    """An array with windows at the ids added or replaced."""
    numbers = eqn.params["dimension_numbers"]
    window = numbers.update_window_dims
    updates = np.moveaxis(
        updates, window, range(updates.ndim - len(window), updates.ndim)
    )
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    updates = np.expand_dims(updates, tuple(ids.ndim - 1 + d for d in sorted(gone)))
    pairs = [
        *zip(
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
            strict=True,
        )
    ]
    sizes = updates.shape[ids.ndim - 1 :]
    at = places(ids, sizes, x.shape, numbers.scatter_dims_to_operand_dims, pairs)
    if at is None:
        return None
    out = x.copy()
    if eqn.primitive.name == "scatter":
        out[at] = updates
    else:
        np.add.at(out, at, updates)
    return out


def iota(eqn: Any) -> np.ndarray:
    """Positions along an axis."""
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    places = [n if d == axis else 1 for d, n in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[axis]).reshape(places), shape)


def reduced(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The rule of a reduction over axes."""
    return lambda eqn, x: f(x, axis=tuple(eqn.params["axes"]))


RULES: dict[str, Callable] = {
    "broadcast_in_dim": broadcast,
    "concatenate": lambda e, *xs: np.concatenate(xs, e.params["dimension"]),
    "div": div,
    "gather": gather,
    "scatter": scatter,
    "scatter-add": scatter,
    "dot_general": dot,
    "dynamic_slice": lambda e, x, *at: x[spans(x, e.params["slice_sizes"], at)],
    "dynamic_update_slice": update,
    "integer_pow": lambda e, x: x ** e.params["y"],
    "iota": iota,
    "pad": pad,
    "reduce_and": reduced(np.all),
    "reduce_max": reduced(np.max),
    "reduce_min": reduced(np.min),
    "reduce_or": reduced(np.any),
    "reduce_sum": reduced(np.sum),
    "reshape": reshape,
    "rev": lambda e, x: np.flip(x, e.params["dimensions"]),
    "slice": lambda e, x: x[
        tuple(
            map(
                slice,
                e.params["start_indices"],
                e.params["limit_indices"],
                e.params["strides"] or [1] * x.ndim,
            )
        )
    ],
    "sort": sort,
    "split": lambda e, x: np.split(
        x, np.cumsum(e.params["sizes"])[:-1], e.params["axis"]
    ),
    "squeeze": reshape,
    "transpose": lambda e, x: x.transpose(e.params["permutation"]),
}
