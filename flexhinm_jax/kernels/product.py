"""`sparse_dot`: the product with a packed weight, on the best program for the device.

What every backend has in common is here: block-diagonal factors, dtypes, leading axes,
derivatives and batching. A backend sees two axes and a packed matrix, nothing else.

The sparse core is a primitive, because no kernel has derivatives of its own. It is
linear in x and linear in the values, so its tangents are products with the same weight
on the same backend. Its transposes are written out: with respect to x the product with
the transposed weight in plain XLA, with respect to the values dL/dy^T x gathered at the
stored positions. A batch of x becomes rows, a batch of weights a loop. Lowering for
GPUs has a rule of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from flexhinm_jax import arguments, jax_versions, promotion
from flexhinm_jax.gpu import support
from flexhinm_jax.kernels import cost, dense, dispatch, reference, xla
from flexhinm_jax.kernels.dispatch import Choice
from flexhinm_jax.kernels.packing import accumulator, block_product, scales
from flexhinm_jax.types import PackedWeight


@promotion.usual()
def sparse_dot(
    x: Array,
    packed: PackedWeight,
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
    backend: str = "auto",
) -> Array:
    """Computes x @ W^T for a packed W `[o, i]`, or x @ W with `transposed`.

    Differentiable in x and in the values, in forward and in reverse mode and any number
    of times; vmappable over x and over a stack of weights.

    Args:
      x: [..., i], or [..., o] with `transposed`; any leading axes, also empty ones.
        Integers and booleans are cast to the dtype of the result.
      packed: one packed matrix.
      transposed: multiply with W instead of its transpose; plain XLA everywhere.
      dtype: dtype of the result; None for what x and the weight promote to.
      backend: "auto" takes a GPU kernel where one can serve and plain XLA elsewhere;
        "reference", "xla" and "dense" force those; "gpu" or the name of a kernel forces it.

    Returns:
      [..., o], or [..., i] with `transposed`, accumulated in float32, or in the
      wider dtype of x, the values or the result. In plain XLA a NaN in x makes every output of its row NaN, as in the dense product; a GPU kernel
      passes it on to the outputs that store its column.

    Raises:
      ValueError: an inner dimension that does not fit, a stack of matrices, or derivatives with respect to the values of a prepared
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
    dtype = jnp.dtype(dtype or jnp.result_type(x.dtype, packed.dtype))
    x = x.astype(_compute_dtype(x.dtype, packed.dtype, dtype))
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    choice = dispatch.choose(backend, rows, packed.core, transposed=transposed)
    return sparse_product(x, packed, transposed=transposed, dtype=dtype, choice=choice)


def _compute_dtype(x: DTypeLike, values: DTypeLike, result: DTypeLike) -> jnp.dtype:
    """The dtype that both factors are cast to before they are multiplied."""
    whole = not jnp.issubdtype(x, jnp.inexact) and jnp.issubdtype(result, jnp.inexact)
    if whole or jnp.dtype(result) == jnp.float64:
        x = result
    return jnp.result_type(x, values)


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
    compute = x.dtype
    first, last = packed.right, packed.left
    if transposed:
        first = packed.left and packed.left.T
        last = packed.right and packed.right.T
    lead, scale = x.shape[:-1], None if packed.scale is None else scales(packed)
    x = block_product(x, first)
    if transposed and scale is not None:
        x, scale = x * scale, None
    x = x.astype(compute)
    x = jnp.reshape(x, (math.prod(lead), x.shape[-1]))
    scaled = last is not None or scale is not None
    inner, bare = accumulator(compute) if scaled else dtype, packed.core
    side = packed.shape[1] if transposed else packed.shape[0]
    if x.shape[0] == 0:
        y = jnp.zeros((0, side), inner)
    elif choice.default == "reference":
        multiply = reference.matmul_transposed if transposed else reference.matmul
        y = multiply(x, bare, inner)
    else:
        # Inside a shard_map the gradient of replicated weights is a sum over the axes
        # that shard x: the transpose of a cast, which the rules of the core cannot add.
        x, bare = jax_versions.varying_alike((x, bare))
        how = {"choice": choice, "transposed": transposed, "dtype": inner}
        # An interpreted kernel has effects, which a primitive would hide.
        run = _run_packed if choice.cuda and support.interpreting() else _bind
        y = run(x, bare, **how)
    y = y if scale is None else y * scale
    return block_product(y.reshape(*lead, side), last).astype(dtype)


core = Primitive("packed_product")
"""x [N, i] times the sparse core: [N, o], or x [N, o] to [N, i] with `transposed`.

Operands are x and the leaves of a packed weight; parameters the `structure` of the
weight, the `choice` of a program, `transposed`, and the `dtype` of the result.
"""

VALUES = ("dense_values", "nm_values")
"""What the core is linear in, besides x."""

GPUS = ("cuda", "rocm")
"""Platforms on which loops over row tiles are slower than the dense product."""


def _bind(x: Array, packed: PackedWeight, **how: Any) -> Array:
    leaves, structure = jax.tree.flatten(packed)
    return core.bind(x, *leaves, structure=structure, **how)


def _run_packed(x: Array, packed: PackedWeight, **how: Any) -> Array:
    leaves, structure = jax.tree.flatten(packed)
    return _run(x, *leaves, structure=structure, **how)


@promotion.usual()
def _run(
    x: Array,
    *leaves: Array,
    structure: Any,
    choice: Choice,
    transposed: bool,
    dtype: jnp.dtype,
    gpu: bool = False,
) -> Array:
    packed = jax.tree.unflatten(structure, leaves)
    if choice.cuda is not None and (gpu or choice.forced):
        return dispatch.known()[choice.cuda].run(x, packed, dtype)
    if choice.default == dense.NAME or _runs_dense(x, packed, choice, transposed, gpu):
        return dense.multiply(x, packed, dtype, transposed=transposed)
    x = lax.optimization_barrier(x)  # the test for NaN must not compute it again
    multiply = dense.multiply_expanded if gpu else xla.multiply
    return multiply(x, packed, dtype, transposed=transposed)


def _runs_dense(
    x: Array, packed: PackedWeight, choice: Choice, transposed: bool, gpu: bool
) -> bool:
    """Whether the matrix that a weight holds serves a product.

    Always where it is all that the weight holds, on GPUs and in transposed products.
    Beside terms it serves the numbers of rows for which these are slower, and a number
    that is not known before a program runs.
    """
    if dense.NAME not in packed.layouts:
        return False
    ready, rows = packed.layouts.get(xla.NAME), x.shape[0]
    if ready is None or transposed or gpu or not isinstance(rows, int):
        return True
    return not choice.forced and cost.holds(rows, packed, ready.place)


def _shape(
    x: Any, *leaves: Any, structure: Any, transposed: bool, dtype: jnp.dtype, **_: Any
) -> Any:
    o, i = jax.tree.unflatten(structure, leaves).shape
    return x.update((x.shape[0], i if transposed else o), dtype, weak_type=False)


@promotion.usual()
def _jvp(primals: Any, tangents: Any, *, structure: Any, **how: Any) -> Any:
    """d(x @ S^T) = dx @ S^T + x @ dS^T."""
    (x, *leaves), (dx, *moves) = primals, tangents
    packed = jax.tree.unflatten(structure, leaves)
    y, terms = _bind(x, packed, **how), []
    if not isinstance(dx, ad.Zero):
        terms.append(_bind(dx, packed, **how))
    if not all(isinstance(move, ad.Zero) for move in moves):
        if jax.tree.leaves(packed.layouts):
            raise ValueError(
                "sparse_dot: the values of a prepared weight were differentiated, but "
                "an update would not reach its layouts; differentiate the weight as "
                "`pack` gives it and call `kernels.prepare` after training"
            )
        moved = jax.tree.unflatten(structure, moves)
        turned = {name: getattr(moved, name) for name in VALUES}
        turned = {
            k: v if v is None else ad.instantiate_zeros(v) for k, v in turned.items()
        }
        terms.append(_bind(x, dataclasses.replace(packed, **turned), **how))
    return y, functools.reduce(jnp.add, terms)


@promotion.usual()
def _transpose(
    g: Any,
    x: Any,
    *leaves: Any,
    structure: Any,
    choice: Choice,
    transposed: bool,
    dtype: jnp.dtype,
) -> list[Any]:
    """The cotangent of x, or of those values that are linear operands."""
    del choice, dtype
    linear = [ad.is_undefined_primal(leaf) for leaf in leaves]
    cotangents: list[Any] = [None] * (1 + len(leaves))
    if isinstance(g, ad.Zero):
        return cotangents
    if ad.is_undefined_primal(x):
        half = x.aval.dtype
        packed = jax.tree.unflatten(structure, leaves)
        how = {"choice": Choice("xla"), "transposed": not transposed, "dtype": half}
        cotangents[0] = _bind(g.astype(half), packed, **how)
        return cotangents
    known = [
        leaf.aval if free else leaf for leaf, free in zip(leaves, linear, strict=True)
    ]
    packed = jax.tree.unflatten(structure, known)
    places = jax.tree.unflatten(structure, range(len(leaves)))
    g = g.astype(x.dtype)
    pair = (g, x) if transposed else (x, g)
    loop, whole = (
        lambda x, g, room=room: room.gradient_of_values(x, g, packed)
        for room in (xla, dense)
    )
    values = lax.platform_dependent(*pair, default=loop, **dict.fromkeys(GPUS, whole))
    for name, value in zip(VALUES, values, strict=True):
        place = getattr(places, name)
        if place is not None and linear[place]:
            cotangents[1 + place] = value
    return cotangents


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], **how: Any
) -> tuple[Array, int]:
    """A batch of x becomes rows, one with several weights a loop."""
    batched = [axis is not None for axis in axes]
    first = [
        operand if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]
    if not any(batched[1:]):
        x, *leaves = first
        size, rows, side = x.shape
        y = core.bind(x.reshape(size * rows, side), *leaves, **how)
        return y.reshape(size, rows, y.shape[-1]), 0

    def entry(moving: Sequence[Array]) -> Array:
        rest = iter(moving)
        return core.bind(
            *(next(rest) if b else a for a, b in zip(first, batched, strict=True)),
            **how,
        )

    return lax.map(entry, [a for a, b in zip(first, batched, strict=True) if b]), 0


core.def_impl(_run)
core.def_abstract_eval(_shape)
mlir.register_lowering(core, mlir.lower_fun(_run, multiple_results=False))
for platform in GPUS:
    on_gpu = functools.partial(_run, gpu=True)
    rule = mlir.lower_fun(on_gpu, multiple_results=False)
    mlir.register_lowering(core, rule, platform=platform)
ad.primitive_jvps[core] = _jvp
ad.primitive_transposes[core] = _transpose
batching.primitive_batchers[core] = _batch
