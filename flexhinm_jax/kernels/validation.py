"""What a packed weight promises, checked on concrete arrays.

Programs gather by the indices of a packed weight without looking at them again, so
whoever makes one from foreign arrays checks it first: reading a file does, `unpack`
does outside of a trace.
"""

import math
from typing import Any

import numpy as np

from flexhinm_jax import checks
from flexhinm_jax.kernels import positions
from flexhinm_jax.ops.words import WORD
from flexhinm_jax.types import BlockDiagonal, PackedWeight, Plan

DENSE = ("dense_index", "dense_values")
GROUPS = ("nm_index", "nm_values", "nm_positions")
"""The arrays of a region: all there, or all None."""


def verify_packed(
    packed: PackedWeight,
    path: str = "weight",
    *,
    dtype: Any = None,
    stack: tuple[int, ...] | None = None,
) -> None:
    """Raises ValueError unless a packed weight keeps the promises of `PackedWeight`.

    Args:
      packed: concrete, one matrix or a stack.
      path: leaf path for the message.
      dtype: that the values must have; None takes it from them.
      stack: leading axes that all arrays must have; None takes them from the rows.

    Raises:
      ValueError: a missing or truncated array or one of another dtype or shape, an
        index out of range or twice in a tile, an output order that is no permutation,
        positions that do not increase inside a group or have no such rank.
    """
    stack = tuple(packed.out_order.shape[:-1]) if stack is None else stack
    _regions(packed, stack, path)
    packed = packed.filled()
    _shapes(packed, stack, packed.values_dtype if dtype is None else dtype, path)
    o, i = packed.shape
    for field in ("dense_index", "nm_index"):
        index = np.asarray(getattr(packed, field))
        if index.size and (index.min() < 0 or index.max() >= i):
            raise ValueError(
                f"{path}: {field} has an index outside 0 .. {i - 1}:"
                f" {index.min()} .. {index.max()}"
            )
    order = np.sort(np.asarray(packed.out_order), -1)
    if (order != np.arange(o, dtype=np.int32)).any():
        raise ValueError(f"{path}: out_order is not a permutation of its {o} rows")
    n, m = packed.n, packed.m
    words, groups = np.asarray(packed.nm_positions), packed.nm_values.shape[-1] // n
    count = positions.subsets(n, m)
    if count is not None and (positions.ranks(words, groups, n, m) >= count).any():
        raise ValueError(f"{path}: nm_positions has a rank outside 0 .. {count - 1}")
    chosen = positions.decode(words, groups, n, m).reshape(-1, n)
    verify_positions(chosen, m, path)
    _distinct(packed, chosen, path)


def verify_positions(chosen: np.ndarray, m: int, path: str = "weight") -> None:
    """Raises ValueError unless positions are strictly increasing in their groups.

    Args:
      chosen: u32[..., n], the positions that every group keeps.
      m: group size.
      path: leaf path for the message.

    Raises:
      ValueError: a position out of range, or not above the one before it.
    """
    if (chosen >= m).any():
        raise ValueError(f"{path}: nm_positions has a position outside 0 .. {m - 1}")
    if (chosen[..., 1:] <= chosen[..., :-1]).any():
        raise ValueError(f"{path}: nm_positions do not increase inside a group")


def _regions(packed: PackedWeight, stack: tuple[int, ...], path: str) -> None:
    """Raises ValueError unless the arrays of a region are all there or all None."""
    absent = 0
    for names in (DENSE, GROUPS):
        missing = [name for name in names if getattr(packed, name) is None]
        absent += len(missing) == len(names)
        if 0 < len(missing) < len(names):
            raise ValueError(
                f"{path}: {missing[0]} is None; give all of {', '.join(names)}, or None"
                " for each"
            )
        index = getattr(packed, names[0])
        if index is not None and index.ndim != len(stack) + 2:
            raise ValueError(
                f"{path}: {names[0]} has shape {list(index.shape)}, expected"
                f" {len(stack) + 2} axes"
            )
    if absent == 2:
        raise ValueError(
            f"{path}: it has neither dense nor N:M columns; keep one column of zeros"
        )


def verify_layout(packed: PackedWeight, path: str = "weight") -> None:
    """Raises ValueError unless the layout fits the arrays and takes its leaf apart.

    Args:
      packed: as the leaf is stored, with its whole stack.
      path: leaf path for the message.

    Raises:
      ValueError: other sizes than those of the arrays, or axes of the leaf that are
        missing, left over or there twice.
    """
    layout = packed.layout
    if layout is None:
        return
    stack = tuple(packed.out_order.shape[:-1])
    sizes = (*layout.stack_shape, *layout.matrix_shape)
    if sizes != (*stack, *packed.shape):
        raise ValueError(
            f"{path}: its layout is one of {list(sizes)}, the arrays hold"
            f" {[*stack, *packed.shape]}; give the leaf the layout that it has"
        )
    factors = [*layout.stack, *layout.out, *layout.inputs]
    left = list(layout.shape)
    # Along an axis, the stride of a factor is the size of all finer ones together.
    reached = [1] * len(left)
    for f in sorted(factors, key=lambda f: (f.stride, f.size)):
        fits = 0 <= f.axis < len(left) and f.size > 0
        if not fits or (f.size > 1 and f.stride != reached[f.axis]):
            raise ValueError(
                f"{path}: its layout takes {f}, which does not divide the leaf"
                f" {list(layout.shape)} into axes that are there once"
            )
        reached[f.axis] *= f.size
    if reached != left:
        raise ValueError(
            f"{path}: its layout covers {reached} of a leaf of shape {left}"
        )


def _distinct(packed: PackedWeight, chosen: np.ndarray, path: str) -> None:
    """Raises ValueError when two columns of a tile that are not zero read one input."""
    dense, nm = np.asarray(packed.dense_index), np.asarray(packed.nm_index)
    index = np.concatenate([dense, nm], -1)
    index = index.reshape(math.prod(index.shape[:-1]), index.shape[-1])
    ordered = np.sort(index, -1)
    suspects = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(-1))
    if not suspects.size:
        return
    # Padding columns repeat an input, with value zero.
    tiles, rows, kept = len(index), packed.nm_values.shape[-2], nm.shape[-1]
    where = chosen.reshape(tiles, rows, kept // packed.m, packed.n)
    values = np.asarray(packed.nm_values).reshape(where.shape) != 0
    columns = np.asarray(packed.dense_values).reshape(tiles, rows, dense.shape[-1]) != 0
    for tile in suspects:
        live = np.zeros((kept // packed.m, packed.m), bool)
        row, group, kth = np.nonzero(values[tile])
        live[group, where[tile][row, group, kth]] = True
        real = index[tile][np.concatenate([columns[tile].any(0), live.reshape(-1)])]
        inputs, counts = np.unique(real, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{path}: input {inputs[counts > 1][0]} is there twice in tile"
                f" {tile % packed.dense_index.shape[-2]}"
            )


def _shapes(
    packed: PackedWeight, stack: tuple[int, ...], values: Any, path: str
) -> None:
    o, i = packed.shape
    tiles, dense = packed.dense_index.shape[-2:]
    columns = packed.nm_index.shape[-1]
    rows = o // max(tiles, 1)
    kept = columns // packed.m * packed.n
    bits = positions.group_bits(packed.n, packed.m)
    words = -(-kept // packed.n * bits // WORD)
    if tiles * rows != o or columns % packed.m:
        raise ValueError(
            f"{path}: {tiles} tiles of {columns} N:M columns do not fit shape {(o, i)}"
            f" with m={packed.m}"
        )
    wanted = {
        "dense_index": (np.int32, (tiles, dense)),
        "dense_values": (values, (tiles, rows, dense)),
        "nm_index": (np.int32, (tiles, columns)),
        "nm_values": (values, (tiles, rows, kept)),
        "nm_positions": (np.uint32, (tiles, rows, words)),
        "out_order": (np.int32, (o,)),
    }
    if packed.scale is not None:
        wanted["scale"] = (_floating(packed.scale.dtype, path), (tiles, rows))
        if not np.isfinite(np.asarray(packed.scale, np.float32)).all():
            raise ValueError(f"{path}: scale has NaN or infinity")
    for field, (dtype, shape) in wanted.items():
        array = getattr(packed, field)
        if array.shape != (*stack, *shape) or array.dtype != np.dtype(dtype):
            raise ValueError(
                f"{path}: {field} is {array.dtype}{list(array.shape)}, expected"
                f" {np.dtype(dtype)}{[*stack, *shape]}"
            )
    for field, side in (("left", o), ("right", i)):
        _blocks(getattr(packed, field), stack, side, f"{path}: {field}")


def _floating(dtype: Any, path: str) -> Any:
    if not np.issubdtype(dtype, np.floating) and np.dtype(dtype).name != "bfloat16":
        raise ValueError(f"{path}: scale is {dtype}; need a floating dtype")
    return dtype


def _blocks(
    factor: BlockDiagonal | None, stack: tuple[int, ...], side: int, what: str
) -> None:
    if factor is None:
        return
    shape: Any = tuple(factor.blocks.shape)
    side_of = (shape[-3] * shape[-2], shape[-1]) if len(shape) > 2 else ()
    if shape[:-3] != stack or side_of != (side, shape[-2]):
        raise ValueError(
            f"{what} has blocks {list(shape)}, which do not tile {side} channels"
        )
    if factor.order is None:
        return
    order = np.asarray(factor.order)
    if (
        order.dtype != np.int32
        or order.shape != (*stack, side)
        or (np.sort(order, -1) != np.arange(side, dtype=np.int32)).any()
    ):
        raise ValueError(f"{what}_order is not a permutation of {side} channels")


def verify_plan(plan: Plan, path: str = "weight") -> None:
    """Raises ValueError unless the regions of a concrete plan can be packed.

    A cheap part of `checks.verify`: what would make packing read another column than
    the plan means. Whether the weight is zero outside its support is not looked at.

    Args:
      plan: one matrix or a stack, with regions.
      path: leaf path for the message.

    Raises:
      ValueError: tiles that do not divide the rows, boundaries out of order, groups cut
        in two, orders that are no permutations.
    """
    r = plan.support.regions
    if r is None or not checks.is_concrete(r.in_order):
        return
    o, i = plan.weight.shape[-2:]
    t = r.in_order.shape[-2]
    if plan.support.keep.shape != plan.weight.shape or o % max(t, 1) or t == 0:
        raise ValueError(
            f"{path}: a weight of shape {plan.weight.shape} does not fit its support"
            f" {plan.support.keep.shape} in {t} tiles"
        )
    if r.in_order.shape[-1] != i or r.out_order.shape[-1] != o:
        raise ValueError(
            f"{path}: orders of {r.out_order.shape[-1]} rows and {r.in_order.shape[-1]}"
            f" columns for a weight [out, in] = {(o, i)}"
        )
    dense, nm = np.asarray(r.dense_end), np.asarray(r.nm_end)
    if (dense < 0).any() or (nm < dense).any() or (nm > i).any():
        raise ValueError(
            f"{path}: boundaries must satisfy 0 <= dense_end <= nm_end <= {i}, got"
            f" dense_end {dense.tolist()} and nm_end {nm.tolist()}"
        )
    if ((nm - dense) % r.m).any():
        raise ValueError(
            f"{path}: {r.m} must divide the N:M columns of every tile, got"
            f" {(nm - dense).tolist()}"
        )
    for name, order, size in (("out", r.out_order, o), ("in", r.in_order, i)):
        if (np.sort(np.asarray(order), -1) != np.arange(size, dtype=np.int32)).any():
            raise ValueError(f"{path}: {name}_order is not a permutation")
