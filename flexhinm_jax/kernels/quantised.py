"""Packed weights whose values are stored in eight bits, with one scale per row.

The scale of a row is its largest magnitude over the largest of the dtype, so values lie
on a symmetric grid and zero stays zero. With int8 no weight moves by more than half a
step of its row. Products multiply the stored values, which every wider dtype holds
exactly, and scale their outputs: nothing is written out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax import promotion
from flexhinm_jax.paths import is_packed
from flexhinm_jax.types import PackedWeight

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
"""What values may be stored in."""


@promotion.usual()
def quantise(tree: Any, dtype: DTypeLike) -> Any:
    """The tree with packed values in another dtype and a scale for every row.

    Args:
      tree: a `PackedWeight` or any tree with some; stacks keep their leading axes.
        Weights whose values have eight bits already stay as they are.
      dtype: "int8", "float8_e4m3fn" or "float8_e5m2".

    Returns:
      The same tree, without layouts. The weights keep their dtype, which is now that of
      their scales.

    Raises:
      ValueError: another dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> w = jnp.array([[127.0, 1.2, 0, 3], [0, 2, 254, 1]])
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> plan = method.decide(method.solve(jax.random.key(0), w, None), w)
      >>> packed = fh.kernels.pack(plan, values="int8")
      >>> packed.nm_values.tolist(), packed.scale.tolist()
      ([[[127, 3], [1, 127]]], [[1.0, 2.0]])
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"values={name!r}: choose one of {', '.join(DTYPES)}, or None")

    def one(leaf: Any) -> Any:
        wide = is_packed(leaf) and leaf.values_dtype.name not in DTYPES
        return _quantised(leaf, jnp.dtype(dtype)) if wide else leaf

    return jax.tree.map(one, tree, is_leaf=is_packed)


def _quantised(packed: PackedWeight, dtype: jnp.dtype) -> PackedWeight:
    largest = _largest(dtype)
    whole = packed.filled()
    top = jnp.zeros(whole.nm_values.shape[:-1], jnp.float32)
    for values in (whole.dense_values, whole.nm_values):
        high = jnp.max(jnp.abs(values).astype(jnp.float32), axis=-1, initial=0.0)
        top = jnp.maximum(top, high)
    scale = jnp.where(top > 0, top / largest, 1.0).astype(packed.dtype)
    # Rounded down, the scale of tiny float16 rows would leave the largest outside.
    above = jnp.nextafter(scale, jnp.full_like(scale, jnp.inf))
    reach = scale.astype(jnp.float32) * (largest + 0.5)
    scale = jnp.where(reach < top, above, scale)

    def rounded(values: Array | None) -> Array | None:
        if values is None:
            return None
        return to_grid(values.astype(jnp.float32), scale[..., None], dtype)

    return dataclasses.replace(
        packed,
        dense_values=rounded(packed.dense_values),
        nm_values=rounded(packed.nm_values),
        scale=scale,
        layouts={},
    )


def to_grid(x: Array, scale: Array, dtype: DTypeLike) -> Array:
    """The nearest stored values: x / scale in the dtype, within its symmetric range."""
    steps = x / scale.astype(jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        steps = jnp.round(steps)
    largest = _largest(dtype)
    return jnp.clip(steps, -largest, largest).astype(dtype)


def _largest(dtype: DTypeLike) -> float:
    """The largest magnitude of both signs: 127 for int8."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    return float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
