"""The product with the matrix itself, held by a weight or expanded for one product.

Few rows of x and a matrix that fits the cache leave a packed form nothing to win on
CPUs, and many rows little on GPUs. A weight prepared for "dense" runs one dense
product, in value and in gradients, for the memory of the dense matrix. On GPUs a packed
weight that holds none, and has no faster kernel, is written out as its matrix in every
product: a few programs of elementwise operations and one dense product, no loop.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.kernels.packing import (
    accumulator,
    block_columns,
    spread_nan,
    stored_columns,
    unpack,
)
from flexhinm_jax.ops.products import matmul_transposed
from flexhinm_jax.types import PackedWeight

NAME = "dense"

WIDE = 1024
"""A matrix with more inputs is held as [o, i], which a CPU multiplies up to twice as
fast with few rows of x, and up to half as fast where it has fewer inputs."""


def prepare(packed: PackedWeight) -> Array:
    """The matrix of a weight without factors, [o, i] or [i, o], see `WIDE`."""
    matrix = unpack(packed)
    return matrix if packed.shape[1] > WIDE else matrix.T


def multiply(
    x: Array, packed: PackedWeight, dtype: DTypeLike, *, transposed: bool
) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o], or x [N, o] @ S with `transposed`."""
    held = packed.layouts.get(NAME)
    matrix = prepare(packed) if held is None else held
    by_rows = packed.shape[1] > WIDE
    if by_rows and not transposed:
        wide = accumulator(x.dtype)
        return matmul_transposed(x, matrix.astype(x.dtype), wide).astype(dtype)
    return _dot(x, matrix if transposed == by_rows else matrix.T).astype(dtype)


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o]."""
    return multiply(x, packed, dtype, transposed=False)


def multiply_expanded(
    x: Array, packed: PackedWeight, dtype: DTypeLike, *, transposed: bool
) -> Array:
    """The sparse core or its transpose on a GPU, the matrix written out on the way."""
    packed = packed.filled()
    if transposed:
        return _dot(x[:, packed.out_order], expand(packed).T).astype(dtype)
    stored = jnp.argsort(packed.out_order)
    if packed.tiles > 1:
        return _dot(x, expand(packed))[:, stored].astype(dtype)
    # The columns of x in the order of the weight: less to move than the weight.
    index, columns = _columns(packed)
    y = _dot(x[:, index[0]], columns[0, stored].T)
    return spread_nan(x, y.astype(dtype))


def expand(packed: PackedWeight) -> Array:
    """The matrix [i, o], rows of the weight in storage order.

    Every tile finds its row of an input by a list, so nothing is added up in place.
    """
    index, columns = _columns(packed)
    t, v, c = columns.shape
    # Padding repeats an input with zeros: what is zero everywhere is not looked for.
    place = jnp.where((columns != 0).any(axis=1), jnp.arange(c, dtype=jnp.int32), c)
    tile = jnp.arange(t, dtype=jnp.int32)
    source = jnp.full((t, packed.shape[1]), c, jnp.int32)
    source = source.at[tile[:, None], index].min(place)
    rows = jnp.pad(jnp.swapaxes(columns, 1, 2), ((0, 0), (0, 1), (0, 0)))
    matrix = rows.at[tile, source.T].get(mode="promise_in_bounds")  # [i, t, v]
    return matrix.reshape(-1, t * v)


def _columns(packed: PackedWeight) -> tuple[Array, Array]:
    """Inputs [t, c] and values [t, v, c] of all columns of a filled weight."""
    index = jnp.concatenate([packed.dense_index, packed.nm_index], axis=-1)
    parts = [packed.dense_values, block_columns(packed)]
    return index, jnp.concatenate(parts, axis=-1)


def _dot(x: Array, matrix: Array) -> Array:
    wide = accumulator(x.dtype)
    return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=wide)


def gradient_of_values(x: Array, g: Array, packed: PackedWeight) -> tuple[Array, Array]:
    """What `xla.gradient_of_values` gives, on a GPU: one product, then gathers."""
    packed = packed.filled()
    t, v, _ = packed.dense_values.shape
    matrix = _dot(x.T, g[:, packed.out_order]).reshape(-1, t, v)
    tile, row = jnp.arange(t, dtype=jnp.int32), jnp.arange(v, dtype=jnp.int32)
    dense = matrix[packed.dense_index, tile[:, None]]  # [t, d, v]
    listed = jnp.asarray(packed.nm_index, jnp.int32)
    column = listed[tile[:, None, None], stored_columns(packed)]  # [t, v, kept]
    nm = matrix[column, tile[:, None, None], row[:, None]]
    dense = jnp.swapaxes(dense, 1, 2).astype(packed.dense_values.dtype)
    return dense, nm.astype(packed.nm_values.dtype)
