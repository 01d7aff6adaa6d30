"""Folds orders of packed weights into their neighbours, so that no gather is left.

A packed weight computes its rows in storage order and scatters them back. Where only
elementwise operations lie between it and packed readers, the scatter is superfluous:
the readers gather their inputs by index anyway, so their indices take over the order
(index absorption, FlexHiNM-GP). Per-channel parameters in between, such as the bias,
move along: `bias[order]`.

The other way round, an input order that all readers share moves into the rows of the
producer (`fold_inputs`), or out of them into one gather (`gather_once`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.paths import over_stack
from flexhinm_jax.types import BlockDiagonal, PackedWeight


def fold(
    first: PackedWeight, *readers: PackedWeight
) -> tuple[PackedWeight, tuple[PackedWeight, ...], Array]:
    """Leaves the outputs of `first` in storage order and lets the readers know.

    Between `first` and the readers there may only be operations that treat every
    channel alike (activations, dropout) or per-channel parameters, which the caller
    permutes. A residual sum, a norm over groups of channels or attention heads do not
    allow it.

    Args:
      first: producer; its output channel at position r is afterwards the original
        channel order[r].
      *readers: all packed weights that contract this output.

    Returns:
      first: with the identity as its output order.
      readers: with input indices in the new order.
      order: i32[o], original channel at each position: new_bias = bias[order].

    Raises:
      ValueError: sizes that do not chain, or a block-diagonal factor in between, which
        mixes channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> from flexhinm_jax.kernels import folding
      >>> method, key = fh.Magnitude(fh.NM(2, 4)), jax.random.key(0)
      >>> w = jax.random.normal(key, (8, 8))
      >>> packed = fh.kernels.pack(method.decide(method.solve(key, w, None), w))
      >>> first, (second,), order = folding.fold(packed, packed)
      >>> order.tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if first.left is not None:
        raise ValueError(
            "fold: the producer has a block-diagonal factor on its outputs, which acts "
            "in the original order; leave this pair unfolded"
        )
    for reader in readers:
        if reader.shape[1] != first.shape[0]:
            raise ValueError(
                f"fold: a reader with in={reader.shape[1]} does not contract the "
                f"out={first.shape[0]} of the producer; give the weights that read it"
            )
        if reader.right is not None:
            raise ValueError(
                "fold: a reader has a block-diagonal factor on its inputs, which acts "
                "in the original order; leave this pair unfolded"
            )
        if reader.out_order.shape[:-1] != first.out_order.shape[:-1]:
            raise ValueError(
                f"fold: stacks of {reader.out_order.shape[:-1]} and "
                f"{first.out_order.shape[:-1]} matrices do not chain; fold one by one"
            )
    order = first.out_order
    inverse = jnp.argsort(order, axis=-1).astype(jnp.int32)
    identity = jnp.broadcast_to(
        jnp.arange(order.shape[-1], dtype=jnp.int32), order.shape
    )
    take = over_stack(lambda inverse, index: inverse[index], order.ndim - 1)

    def renamed(index: Array | None) -> Array | None:
        return None if index is None else take(inverse, index)

    moved = tuple(
        dataclasses.replace(
            reader,
            dense_index=renamed(reader.dense_index),
            nm_index=renamed(reader.nm_index),
            layouts={},
        )
        for reader in readers
    )
    first = dataclasses.replace(first, out_order=identity, layouts={})
    return first, moved, order


def gather_once(*readers: PackedWeight) -> tuple[Array, tuple[PackedWeight, ...]]:
    """Takes the input order that packed weights share out of them.

    Args:
      *readers: packed N:M weights in one order of all inputs, as `share_orders` makes
        them for weights that read the same input.

    Returns:
      order: i32[*stack, i], original input at each position: the readers now take
        x[..., order], gathered once for all of them.
      readers: with their inputs in natural order.

    Raises:
      ValueError: readers with several tiles, dense columns, or different orders.
    """
    order = _shared_order(readers)
    return order, tuple(_renamed(reader, order) for reader in readers)


def fold_inputs(
    producer: Any, *readers: PackedWeight, within: int | None = None
) -> tuple[Any, tuple[PackedWeight, ...], Array]:
    """Moves the input order that readers share into the rows of their producer.

    No gather is left between them. Rows move freely, so every pattern of the producer
    keeps; what may lie between, and what to do with a bias, is as for `fold`. Between
    values and the output projection of attention an order has to stay inside the heads:
    search it with share_orders(within={...: head size}).

    Args:
      producer: the weight whose outputs the readers contract, packed or dense
        [..., o, i]. All that reads its outputs must be among the readers.
      *readers: packed N:M weights in one shared order.
      within: size of the blocks of channels that the order must not leave, or None.

    Returns:
      producer: its output at position r is the original channel order[r]. With one tile
        its rows are stored so, with several its output order says so.
      readers: with their inputs in natural order.
      order: i32[*stack, o], for per-channel parameters in between: bias[order].

    Raises:
      ValueError: sizes or stacks that do not chain, readers without a shared order, an
        order that leaves the blocks.
    """
    order = _shared_order(readers)
    if isinstance(producer, PackedWeight):
        outputs, stack = producer.shape[0], producer.out_order.shape[:-1]
    else:
        outputs, stack = producer.shape[-2], producer.shape[:-2]
    if order.shape != (*stack, outputs):
        raise ValueError(
            f"fold_inputs: the readers take {order.shape} inputs, the producer gives "
            f"{(*stack, outputs)}; they do not chain"
        )
    if within is not None:
        block = np.arange(outputs) // within
        if outputs % within or (np.asarray(order) // within != block).any():
            raise ValueError(
                f"fold_inputs: the order leaves the blocks of {within} channels; "
                "search it inside them, with share_orders(within=...)"
            )
    moved = tuple(_renamed(reader, order) for reader in readers)
    if not isinstance(producer, PackedWeight):
        return jnp.take_along_axis(producer, order[..., None], axis=-2), moved, order
    inverse = jnp.argsort(order, axis=-1).astype(jnp.int32)
    out_order = jnp.take_along_axis(inverse, producer.out_order, axis=-1)
    left = _factor_renamed(producer.left, inverse)
    first = dataclasses.replace(producer, out_order=out_order, left=left, layouts={})
    return _rows_in_order(first), moved, order


def _shared_order(readers: tuple[PackedWeight, ...]) -> Array:
    if not readers:
        raise ValueError("fold: give at least one reader")
    for reader in readers:
        tiles, columns = reader.filled().nm_index.shape[-2:]
        if (tiles, columns) != (1, reader.shape[1]):
            raise ValueError(
                f"fold: a reader has {tiles} tiles with {columns} of "
                f"{reader.shape[1]} inputs in groups; "
                "only an N:M weight has one order of all inputs"
            )
        if not np.array_equal(reader.nm_index, readers[0].nm_index):
            raise ValueError(
                "fold: the readers have different input orders; solve them with "
                "share_orders"
            )
    return readers[0].nm_index[..., 0, :]


def _renamed(reader: PackedWeight, order: Array) -> PackedWeight:
    """The reader of inputs in the order `order`, which is its own."""
    inverse = jnp.argsort(order, axis=-1).astype(jnp.int32)
    identity = jnp.arange(order.shape[-1], dtype=jnp.int32)
    return dataclasses.replace(
        reader,
        nm_index=jnp.broadcast_to(identity, reader.nm_index.shape),
        right=_factor_renamed(reader.right, inverse),
        layouts={},
    )


def _factor_renamed(
    factor: BlockDiagonal | None, inverse: Array
) -> BlockDiagonal | None:
    """The same block-diagonal map of channels that have new positions."""
    if factor is None:
        return None
    at = factor.order
    order = inverse if at is None else jnp.take_along_axis(inverse, at, axis=-1)
    return BlockDiagonal(factor.blocks, order)


def _rows_in_order(packed: PackedWeight) -> PackedWeight:
    """The rows of a single tile stored in output order; several tiles as they are."""
    if packed.filled().nm_values.shape[-3] != 1:
        return packed
    at = jnp.argsort(packed.out_order, axis=-1)
    identity = jnp.arange(at.shape[-1], dtype=jnp.int32)

    def rows(x: Array) -> Array:
        return jnp.take_along_axis(x, at[..., None, :, None], axis=-2)

    def take(x: Array | None) -> Array | None:
        return None if x is None else rows(x)

    return dataclasses.replace(
        packed,
        dense_values=take(packed.dense_values),
        nm_values=take(packed.nm_values),
        nm_positions=take(packed.nm_positions),
        scale=None if packed.scale is None else rows(packed.scale[..., None])[..., 0],
        out_order=jnp.broadcast_to(identity, packed.out_order.shape),
        layouts={},
    )


def check_equal(
    before: Callable[..., Any], after: Callable[..., Any], *inputs: Any
) -> None:
    """Raises ValueError unless two functions return the same on concrete inputs.

    The check after folding: the same products are added in the same order, so the
    results agree to the last bit where both run the same program.

    Args:
      before: the function with scattered outputs.
      after: the function with folded orders.
      *inputs: arguments for both.

    Raises:
      ValueError: different trees or shapes, or values that differ by more than 1e-5 of
        the largest.
    """
    one, other = before(*inputs), after(*inputs)
    if jax.tree.structure(one) != jax.tree.structure(other):
        raise ValueError("fold: the outputs before and after have different structures")
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.shape != b.shape:
            raise ValueError(f"fold: output of shape {a.shape} became {b.shape}")
        worst = np.max(np.abs(a - b), initial=0.0)
        if not worst <= 1e-5 * np.max(np.abs(a), initial=0.0):
            raise ValueError(
                f"fold: outputs differ by up to {worst:g}; is there an operation "
                "between the weights that mixes channels, or a parameter that was not "
                "permuted?"
            )
