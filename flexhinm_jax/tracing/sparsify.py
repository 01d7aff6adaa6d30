"""Runs a function on packed weights: every product with one becomes a `sparse_dot`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax import jax_versions
from flexhinm_jax.kernels import sparse_dot
from flexhinm_jax.paths import over_stack
from flexhinm_jax.tracing import scales
from flexhinm_jax.tracing.contractions import Product
from flexhinm_jax.tracing.program import layout_of, run, trace
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.views import Change, Reach, Where
from flexhinm_jax.tracing.walker import Visitor
from flexhinm_jax.types import BlockDiagonal, Layout, PackedWeight


def sparsify(apply_fn: Callable) -> Callable:
    """The same function for a tree in which some leaves are `PackedWeight`s.

    Works under jit, grad (with respect to inputs, packed values and dense leaves) and
    vmap over the inputs. The function is traced on every call: put `jax.jit` around the
    result. A packed leaf is unpacked where its dense value is needed: an embedding
    lookup, a function with its own derivative rule, a product in another layout, or one
    in which every token has an expert of its own (`lax.ragged_dot`, `w[expert]`).

    Args:
      apply_fn: pure function, called as apply_fn(params, *args, **kwargs).

    Returns:
      A function of (params, *args, **kwargs) that returns what `apply_fn` returns for
      the unpacked parameters.
    """

    @functools.wraps(apply_fn)
    def sparse_apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = Leaves.of(params)
        program = trace(apply_fn, leaves, args, kwargs)
        outs, _ = run(program, leaves, RunSparse(leaves), ())
        return program.out.unflatten(outs)

    return sparse_apply


class RunSparse(Visitor):
    """Replaces the products with packed leaves."""

    def __init__(self, leaves: Leaves):
        """Takes the leaves, among which are the scales of those in eight bits."""
        self.leaves = leaves

    def product(self, where: Where, product: Product, state: Any) -> tuple[Any, Any]:
        """Runs one product sparse if the layout of the packed leaf allows it."""
        del where
        if product.weight.packed is None or product.route is not None:
            return None, state
        changes = product.weight.view.changes
        factors = product.weight.packed.left, product.weight.packed.right
        if factors != (None, None) and Reach.PRODUCT_ONLY in {s.reach for s in changes}:
            return None, state
        layout = layout_of(product.weight.packed)
        fitted = product.fit(layout)
        if fitted is None:
            return None, state
        turned = fitted.layout != layout
        index = fitted.index
        left = fitted.weight.left
        positions = [index.get(f) for f in left]

        def multiply(x: Array, packed: PackedWeight, positions: list) -> Array:
            for k in reversed(range(len(positions))):
                if positions[k] is not None:
                    packed = at_position(packed, positions[k], k)
            dtype = product.result.dtype
            f = functools.partial(sparse_dot, transposed=turned, dtype=dtype)
            f = over_stack(f, len(fitted.stacked))
            packed = changed(packed, changes)
            return fitted.restore(f(fitted.tokens(x), packed))

        packed = product.weight.packed
        if product.weight.on_grid:
            rows = scales.rows(self.leaves, changes, layout)
            whole = not jnp.issubdtype(product.operand.dtype, jnp.inexact)
            if rows is None or whole:  # sums of whole numbers are exact in the program
                return None, state
            packed = with_rows(packed, rows, fitted, layout)
        sharding = getattr(product.result, "sharding", None)
        y = jax_versions.automatic(
            multiply, sharding, product.operand, packed, positions
        )
        return y, state


def with_rows(
    packed: PackedWeight, rows: Array, product: Product, layout: Layout
) -> PackedWeight:
    """Packed steps with the scale of every output.

    Args:
      packed: of the leaf, without a scale; a loop has taken entries of its stack.
      rows: f32[*stack, o], of the whole stack.
      product: what the weight takes part in.
      layout: of the leaf.
    """
    for k, f in reversed(list(enumerate(layout.stack))):
        if f not in product.weight.left:
            at = jnp.clip(product.index[f], 0, f.size - 1)
            rows = lax.dynamic_index_in_dim(rows, at, k, keepdims=False)
    stored = jnp.take_along_axis(rows, packed.out_order, axis=-1)
    scale = stored.reshape(*rows.shape[:-1], packed.tiles, -1)
    return dataclasses.replace(packed, scale=scale)


def at_position(packed: PackedWeight, k: Any, axis: int) -> PackedWeight:
    """Entry `k` of stack axis `axis`, or the nearest there is."""

    def entry(x: Array) -> Array:
        at = jnp.clip(k, 0, x.shape[axis] - 1)
        return lax.dynamic_index_in_dim(x, at, axis, keepdims=False)

    return jax.tree.map(entry, packed)


def changed(packed: PackedWeight, changes: tuple[Change, ...]) -> PackedWeight:
    """The packed weight after what the program does to every element of the leaf."""

    def whole(x: Any) -> Any:
        return functools.reduce(lambda x, step: step.apply(x), changes, x)

    def outer(x: Any) -> Any:
        steps = [step for step in changes if step.reach is Reach.EVERY_FACTOR]
        return functools.reduce(lambda x, step: step.apply(x), steps, x)

    def factor(block: BlockDiagonal | None) -> BlockDiagonal | None:
        return block and dataclasses.replace(block, blocks=outer(block.blocks))

    factors = {"left": factor(packed.left), "right": factor(packed.right)}
    if packed.scale is not None:
        # All changes are linear or roundings: the scale takes them over.
        return dataclasses.replace(packed, scale=whole(packed.scale), **factors)
    return dataclasses.replace(
        packed,
        dense_values=jax.tree.map(whole, packed.dense_values),
        nm_values=jax.tree.map(whole, packed.nm_values),
        **factors,
        layouts=jax.tree.map(
            lambda x: whole(x) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            packed.layouts,
        ),
    )
