"""`sparse_dot`: the product with a packed weight, on the best program for the device.

What every backend has in common is here: block-diagonal factors, dtypes, leading axes,
derivatives and batching. A backend sees two axes and a packed matrix, nothing else.

Derivatives are written out, because no kernel has any: with W = left S right,
dL/dx = dL/dy W in plain XLA and the gradient of the values is gathered from
dL/dy^T x at the stored positions. So reverse mode works for every backend and forward
mode for `backend="reference"` alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax import arguments
from flexhinm_jax.kernels import backends, reference, xla
from flexhinm_jax.kernels.backends import Choice
from flexhinm_jax.kernels.packing import block_product
from flexhinm_jax.types import PackedWeight


def sparse_dot(
    x: Array,
    packed: PackedWeight,
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
    backend: str = "auto",
) -> Array:
    """Computes x @ W^T for a packed W `[o, i]`, or x @ W with `transposed`.

    Differentiable in x and in the values, vmappable over x and over a stack of weights.

    Args:
      x: [..., i], or [..., o] with `transposed`; any floating dtype, any leading axes,
        also empty ones.
      packed: one packed matrix.
      transposed: multiply with W instead of its transpose; plain XLA everywhere.
      dtype: dtype of the result; None for what x and the values promote to.
      backend: "auto" takes a GPU kernel where one can serve and plain XLA elsewhere;
        "reference" and "xla" force those; "gpu" or the name of a kernel forces it.

    Returns:
      [..., o], or [..., i] with `transposed`, accumulated in float32. In plain XLA a
      NaN in x makes every output of its row NaN, as in the dense product; a GPU kernel
      passes it on to the outputs that store its column.

    Raises:
      ValueError: an inner dimension that does not fit, a dtype that is not floating,
        a stack of matrices, or derivatives with respect to the values of a prepared
        weight, whose layouts an update would leave behind.
      NotImplementedError: a forced backend that cannot serve, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> w = jnp.array([[4.0, 1, 0, 3], [0, 2, 5, 1]])
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> packed = fh.kernels.pack(method.decide(method.solve(jax.random.key(0), w, None), w))
      >>> fh.sparse_dot(jnp.ones(4), packed).tolist()
      [7.0, 7.0]
    """  # noqa: E501
    _check(x, packed, transposed)
    compute = jnp.result_type(x.dtype, packed.dtype)
    dtype = jnp.dtype(dtype or compute)
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), compute)
    choice = backends.choose(backend, rows, packed, transposed=transposed)
    return sparse_product(x, packed, transposed=transposed, dtype=dtype, choice=choice)


def _check(x: Array, packed: PackedWeight, transposed: bool) -> None:
    if not isinstance(packed, PackedWeight):
        raise ValueError(
            f"sparse_dot: packed is {arguments.shown(packed)}: need the PackedWeight "
            "that pack() returned, after x"
        )
    if not hasattr(x, "dtype"):
        raise ValueError(
            f"sparse_dot: x is {arguments.shown(x)}: need an array; use jnp.asarray"
        )
    if packed.out_order.ndim != 1:
        raise ValueError(
            f"sparse_dot takes one matrix, got a stack {packed.out_order.shape[:-1]}; "
            "vmap over the stack"
        )
    side = packed.shape[0] if transposed else packed.shape[1]
    if x.ndim < 1 or x.shape[-1] != side:
        raise ValueError(
            f"sparse_dot: x has shape {x.shape}, its last axis must be {side} for a "
            f"packed weight [out, in] = {packed.shape}"
            + (" used transposed" if transposed else "")
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"sparse_dot: x has dtype {x.dtype}, it must be floating; cast it first"
        )


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "choice"))
def sparse_product(
    x: Array,
    packed: PackedWeight,
    *,
    transposed: bool,
    dtype: jnp.dtype,
    choice: Choice,
) -> Array:
    """`sparse_dot` without its checks: one named call in every jaxpr."""
    compute = jnp.result_type(x.dtype, packed.dtype)
    first, last = packed.right, packed.left
    if transposed:
        first = packed.left and packed.left.T
        last = packed.right and packed.right.T
    lead, x = x.shape[:-1], x.astype(compute)
    x = block_product(x, first).astype(compute)
    x = jnp.reshape(x, (math.prod(lead), x.shape[-1]))
    given = dtype if last is None else jnp.dtype(jnp.float32)
    core = dataclasses.replace(packed, left=None, right=None, layout=None)
    side = packed.shape[1] if transposed else packed.shape[0]
    if x.shape[0] == 0:
        y = jnp.zeros((0, side), given)
    elif choice.default == "reference":
        y = _run(choice, transposed, given)(x, core)
    else:
        y: Any = _core(choice, transposed, given, *_alike(x, *_split(core)))
    return block_product(y.reshape(*lead, side), last).astype(dtype)


Values = tuple[Array, Array]


def _split(packed: PackedWeight) -> tuple[Values, PackedWeight]:
    """The differentiable values, and the rest of a weight."""
    values = (packed.dense_values, packed.nm_values)
    return values, dataclasses.replace(packed, dense_values=None, nm_values=None)


def _join(values: Values, rest: PackedWeight) -> PackedWeight:
    return dataclasses.replace(rest, dense_values=values[0], nm_values=values[1])


def _alike(x: Array, values: Values, rest: PackedWeight) -> tuple[Any, ...]:
    """The arguments varying over the same manual mesh axes.

    Inside a shard_map the gradient of replicated weights is a sum over the axes that
    shard x: the transpose of the cast, which the derivative rule cannot add itself.
    """
    leaves = jax.tree.leaves((x, values, rest))
    axes = frozenset[str]().union(*map(xla.varying, leaves))
    if not axes:
        return x, values, rest

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(axes - xla.varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, (x, values, rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _core(
    choice: Choice,
    transposed: bool,
    dtype: jnp.dtype,
    x: Array,
    values: Values,
    rest: PackedWeight,
) -> Array:
    """Sparse core on two axes: x [N, i] -> [N, o], or back with `transposed`."""
    return _run(choice, transposed, dtype)(x, _join(values, rest))


def _forward(
    choice: Choice, transposed: bool, dtype: jnp.dtype, x: Any, values: Any, rest: Any
) -> tuple[Array, Any]:
    if jax.tree.leaves(rest.layouts) and any(v.perturbed for v in values):
        raise ValueError(
            "sparse_dot: the values of a prepared weight were differentiated, but an "
            "update would not reach its layouts; differentiate the weight as `pack` "
            "gives it and call `kernels.prepare` after training"
        )
    x, values, rest = jax.tree.map(
        lambda v: v.value,
        (x, values, rest),
        is_leaf=lambda v: hasattr(v, "perturbed"),
    )
    return _core(choice, transposed, dtype, x, values, rest), (x, values, rest)


def _backward(
    choice: Choice, transposed: bool, dtype: jnp.dtype, saved: Any, g: Any
) -> tuple[Any, ...]:
    del choice, dtype
    x, values, rest = saved
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    packed = _join(values, rest)
    g = g.astype(x.dtype)
    dx = xla.multiply(g, packed, x.dtype, transposed=not transposed)
    dvalues = xla.gradient_of_values(*((x, g) if not transposed else (g, x)), packed)
    return dx, dvalues, None


_core.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.cache
def _run(choice: Choice, transposed: bool, dtype: jnp.dtype) -> Callable[..., Array]:
    """A function of (x [N, i], packed) that batches by its own rule."""
    module = reference if choice.default == "reference" else xla

    def plain(x: Array, packed: PackedWeight) -> Array:
        x = lax.optimization_barrier(x)  # the test for NaN must not compute it again
        multiply = module.matmul_transposed if transposed else module.matmul
        return multiply(x, packed, dtype)

    if choice.default == "reference":
        return plain

    def chosen(x: Array, packed: PackedWeight) -> Array:
        if choice.cuda is None:
            return plain(x, packed)
        kernel = backends.registry()[choice.cuda].load().matmul
        fast = lambda x, packed: kernel(x, packed, dtype)  # noqa: E731
        if choice.forced:
            return fast(x, packed)
        return lax.platform_dependent(x, packed, cuda=fast, default=plain)

    run = jax.custom_batching.custom_vmap(chosen)

    @run.def_vmap
    def _(size: int, batched: Any, x: Array, packed: PackedWeight) -> tuple:
        of_x, of_packed = batched[0], jax.tree.leaves(batched[1])
        if not any(of_packed):  # the batch of x becomes rows
            y = run(x.reshape(-1, x.shape[-1]), packed)
            return y.reshape(size, -1, y.shape[-1]), True
        one = lambda flag, leaf: leaf if flag else None  # noqa: E731
        moving = jax.tree.map(one, (of_x, batched[1]), (x, packed))

        def entry(moving: Any) -> Array:
            pick = lambda leaf, here: leaf if here is None else here  # noqa: E731
            return run(
                *jax.tree.map(pick, (x, packed), moving, is_leaf=lambda v: v is None)
            )

        return lax.map(entry, moving), True

    return run
