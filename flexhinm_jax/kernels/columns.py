"""Dense and N:M columns that a packed weight has none of: None at rest, empty inside.

Many formats cannot hold an empty array, so trees have None in its place. What computes
with a weight fills the places first and has one form to think of.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flexhinm_jax.types import PackedWeight

DENSE = ("dense_index", "dense_values")
GROUPS = ("nm_index", "nm_values", "nm_positions")


def canonical(packed: PackedWeight) -> PackedWeight:
    """The same weight without an empty array, which many formats cannot hold.

    Args:
      packed: one matrix or a stack, every array there, of any size.

    Returns:
      None in the place of empty arrays; a column of padding where nothing is left.
    """
    empty = [names for names in (DENSE, GROUPS) if not getattr(packed, names[0]).size]
    if len(empty) == 2:
        *stack, t, _ = packed.dense_index.shape
        index = jnp.zeros((*stack, t, 1), jnp.int32)
        values = jnp.zeros((*packed.dense_values.shape[:-1], 1), packed.dtype)
        packed = dataclasses.replace(packed, dense_index=index, dense_values=values)
        empty = [GROUPS]
    none = {name: None for names in empty for name in names}
    return dataclasses.replace(packed, **none)


def filled(packed: PackedWeight) -> PackedWeight:
    """The inverse of `canonical`: an empty array in the place of None.

    What computes with a weight starts from here, so it has one form to think of.
    """
    any_index: Any = packed.dense_index if packed.nm_index is None else packed.nm_index
    *stack, t, _ = any_index.shape
    rows = (*stack, t, packed.shape[0] // max(t, 1))

    def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return np.zeros((*shape, 0), dtype)

    arrays: dict[str, Any] = {}
    if packed.dense_index is None:
        arrays["dense_index"] = empty((*stack, t), np.int32)
        arrays["dense_values"] = empty(rows, packed.dtype)
    if packed.nm_index is None:
        arrays["nm_index"] = empty((*stack, t), np.int32)
        arrays["nm_values"] = empty(rows, packed.dtype)
        arrays["nm_positions"] = empty(rows, np.uint32)
    return dataclasses.replace(packed, **arrays) if arrays else packed
