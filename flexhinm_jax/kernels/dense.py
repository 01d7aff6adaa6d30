"""The product with the matrix itself, held by a weight beside its packed form.

Few rows of x and a matrix that fits the cache leave a packed form nothing to win on
CPUs, and many rows little on GPUs. A weight prepared for "dense" runs one dense
product, in value and in gradients, for the memory of the dense matrix.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.kernels.packing import accumulator, unpack
from flexhinm_jax.types import PackedWeight

NAME = "dense"


def prepare(packed: PackedWeight) -> Array:
    """The matrix of a weight without factors, [i, o]."""
    return unpack(packed).T


def multiply(
    x: Array, packed: PackedWeight, dtype: DTypeLike, *, transposed: bool
) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o], or x [N, o] @ S with `transposed`."""
    held = packed.layouts.get(NAME)
    matrix = prepare(packed) if held is None else held
    matrix = (matrix.T if transposed else matrix).astype(x.dtype)
    y = jnp.matmul(x, matrix, preferred_element_type=accumulator(x.dtype))
    return y.astype(dtype)


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o]."""
    return multiply(x, packed, dtype, transposed=False)
