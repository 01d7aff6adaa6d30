"""`sparse_dot`: the product with a packed weight, in plain XLA.

This is the meaning that every faster kernel has to match: gather the activation columns
of a tile, multiply with its dense and its expanded N:M block, put the rows back.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.kernels.packing import block_columns, block_product
from flexhinm_jax.types import BlockDiagonal, PackedWeight


def sparse_dot(
    x: Array,
    packed: PackedWeight,
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
) -> Array:
    """Computes x @ W^T for a packed W `[o, i]`, or x @ W with `transposed`.

    Differentiable in x and in the values, vmappable over x and over a stack of weights.

    Args:
      x: [..., i], or [..., o] with `transposed`; any floating dtype.
      packed: one packed matrix.
      transposed: multiply with W instead of its transpose.
      dtype: dtype of the result; None for what x and the values promote to.

    Returns:
      [..., o], or [..., i] with `transposed`, accumulated in float32.

    Raises:
      ValueError: an inner dimension that does not fit, or a stack of matrices.
    """
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
    dtype = jnp.dtype(dtype or jnp.result_type(x.dtype, packed.dtype))
    return sparse_product(x, packed, transposed=transposed, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def sparse_product(
    x: Array, packed: PackedWeight, *, transposed: bool, dtype: jnp.dtype
) -> Array:
    """`sparse_dot` without its checks: one named call in every jaxpr."""
    compute = jnp.result_type(x.dtype, packed.dtype)
    x = x.astype(compute)
    first, last = (packed.right, packed.left)
    if transposed:
        first, last = _transpose(packed.left), _transpose(packed.right)
    x = block_product(x, first).astype(compute)
    y = (_columns if transposed else _rows)(x, packed)
    return block_product(y, last).astype(dtype)


def _transpose(factor: BlockDiagonal | None) -> BlockDiagonal | None:
    return factor and BlockDiagonal(jnp.swapaxes(factor.blocks, 1, 2))


def _rows(x: Array, packed: PackedWeight) -> Array:
    """Sparse core: x [..., i] @ S^T -> [..., o] in float32."""
    parts = (
        (packed.dense_index, packed.dense_values),
        (packed.nm_index, block_columns(packed)),
    )
    y = sum(
        jnp.einsum(
            "...tc,tvc->...tv",
            x[..., index],
            values.astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        for index, values in parts
    )
    y = jnp.asarray(y).reshape(*x.shape[:-1], packed.shape[0])
    return y[..., jnp.argsort(packed.out_order)]


def _columns(x: Array, packed: PackedWeight) -> Array:
    """Sparse core: x [..., o] @ S -> [..., i] in float32."""
    t = packed.dense_index.shape[0]
    x = x[..., packed.out_order].reshape(*x.shape[:-1], t, -1)
    y = jnp.zeros((*x.shape[:-2], packed.shape[1]), jnp.float32)
    parts = (
        (packed.dense_index, packed.dense_values),
        (packed.nm_index, block_columns(packed)),
    )
    for index, values in parts:
        part = jnp.einsum(
            "...tv,tvc->...tc",
            x,
            values.astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        y = y.at[..., index].add(part)
    return y
