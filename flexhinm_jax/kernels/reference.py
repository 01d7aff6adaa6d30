"""The reference product: the meaning that every faster program has to match.

Gather the activation columns of every tile, multiply with its dense and its expanded
N:M block, put the rows back. Plain jax.numpy: differentiable in both modes, vmappable,
on every platform. It holds the gathered columns of all tiles at once, t times the
kept fraction of x, so it is for tests and small batches.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.kernels.packing import accumulator, block_columns, spread_nan
from flexhinm_jax.types import PackedWeight


def prepare(packed: PackedWeight) -> dict[str, Array]:
    """Nothing to derive."""
    del packed
    return {}


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o], summed in `accumulator`."""
    y = sum(
        jnp.einsum(
            "ntc,tvc->ntv",
            x[:, index],
            values.astype(x.dtype),
            preferred_element_type=accumulator(x.dtype),
        )
        for index, values in parts(packed)
    )
    y = jnp.asarray(y).reshape(x.shape[0], packed.shape[0])
    return spread_nan(x, y[:, jnp.argsort(packed.out_order)].astype(dtype))


def matmul_transposed(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, o] @ S -> [N, i], summed in `accumulator`."""
    t = parts(packed)[0][0].shape[0]
    stored = x[:, packed.out_order].reshape(x.shape[0], t, -1)
    y = jnp.zeros((x.shape[0], packed.shape[1]), accumulator(x.dtype))
    for index, values in parts(packed):
        part = jnp.einsum(
            "ntv,tvc->ntc",
            stored,
            values.astype(x.dtype),
            preferred_element_type=accumulator(x.dtype),
        )
        y = y.at[:, index].add(part)
    return spread_nan(x, y.astype(dtype))


def parts(packed: PackedWeight) -> tuple[tuple[Array, Array], ...]:
    """(column index [t, c], values [t, v, c]) of the dense and the N:M block."""
    packed = packed.filled()
    return (
        (packed.dense_index, packed.dense_values),
        (packed.nm_index, block_columns(packed)),
    )
