"""Folds the output order of a packed weight into the gathers of its readers.

A packed weight computes its rows in storage order and scatters them back. Where only
elementwise operations lie between it and packed readers, the scatter is superfluous:
the readers gather their inputs by index anyway, so their indices take over the order
(index absorption, FlexHiNM-GP). Per-channel parameters in between, such as the bias,
move along: `bias[order]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.types import PackedWeight


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
                f"out={first.shape[0]} of the producer"
            )
        if reader.right is not None:
            raise ValueError(
                "fold: a reader has a block-diagonal factor on its inputs, which acts "
                "in the original order; leave this pair unfolded"
            )
        if reader.out_order.shape[:-1] != first.out_order.shape[:-1]:
            raise ValueError(
                f"fold: stacks of {reader.out_order.shape[:-1]} and "
                f"{first.out_order.shape[:-1]} matrices do not chain"
            )
    order = first.out_order
    inverse = jnp.argsort(order, axis=-1).astype(jnp.int32)
    identity = jnp.broadcast_to(
        jnp.arange(order.shape[-1], dtype=jnp.int32), order.shape
    )
    take = lambda inverse, index: inverse[index]  # noqa: E731
    for _ in range(order.ndim - 1):
        take = jax.vmap(take)
    moved = tuple(
        dataclasses.replace(
            reader,
            dense_index=take(inverse, reader.dense_index),
            nm_index=take(inverse, reader.nm_index),
        )
        for reader in readers
    )
    return dataclasses.replace(first, out_order=identity), moved, order


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
