"""The packed form of a plan: gathered columns, values and positions per row tile.

Every region becomes its own block: dense columns with all their values, N:M columns
with n values of every m and their positions, in the codes of `positions`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax import arguments, checks, promotion
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.kernels import positions
from flexhinm_jax.kernels.quantised import quantise
from flexhinm_jax.kernels.validation import (
    DENSE,
    GROUPS,
    verify_packed,
    verify_plan,
)
from flexhinm_jax.ops import masks
from flexhinm_jax.paths import over_stack
from flexhinm_jax.types import BlockDiagonal, Layout, PackedWeight, Plan, Regions


def sizes(regions: Regions) -> tuple[int, int]:
    """(dense columns, N:M columns) per tile, the largest over tiles and stack.

    Args:
      regions: concrete regions, with any leading stack axes.

    Returns:
      D and H of `PackedWeight`, Python integers: they are its static shape.
    """
    dense, nm = np.asarray(regions.dense_end), np.asarray(regions.nm_end)
    return int(dense.max()), int((nm - dense).max())


def levelled(regions: Regions) -> Regions:
    """Boundaries with which tiles of unequal regions take the least space.

    Every tile has the places of the one with most dense columns. Where another has
    fewer, its first groups of N:M columns take them, with their zeros: no tile then
    needs places for N:M columns beside dense ones that are empty.

    Args:
      regions: concrete regions, with any leading stack axes.

    Returns:
      The same orders; equal regions as they are.

    Raises:
      ValueError: under jit, where the counts are not known.
    """
    if not checks.is_concrete(regions.dense_end):
        raise ValueError(
            "pack needs concrete region boundaries: call it outside jit, or use "
            "pack_to(plan, dense, nm) with static sizes"
        )
    dense, nm = np.asarray(regions.dense_end), np.asarray(regions.nm_end)
    groups = np.minimum(dense.max() - dense, nm - dense) // regions.m
    if not groups.any():
        return regions
    moved = jnp.asarray(dense + groups * regions.m, jnp.int32)
    return dataclasses.replace(regions, dense_end=moved)


@promotion.usual()
def pack(
    plan: Plan, layout: Layout | None = None, values: DTypeLike | None = None
) -> PackedWeight:
    """Packs the plan of one matrix, or of a stack with leading axes on every array.

    Args:
      plan: concrete plan with regions.
      layout: how the matrix goes back into its leaf, kept for `sparsify`.
      values: "int8", "float8_e4m3fn" or "float8_e5m2" stores values rounded to that,
        with one scale per row; None as they are.

    Returns:
      The packed weight, with the dtype of the plan's weight.

    Raises:
      ValueError: an unstructured support, which has nothing to pack, or regions that
        are no permutations or do not fit the weight; `values` of another kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> w = jnp.array([[4.0, 1, 0, 3], [0, 2, 5, 1]])
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> plan = method.decide(method.solve(jax.random.key(0), w, None), w)
      >>> fh.kernels.pack(plan).nm_values[0].tolist()
      [[4.0, 3.0], [2.0, 5.0]]
    """
    if not isinstance(plan, Plan):
        raise ValueError(
            f"kernels.pack got {arguments.shown(plan)}: need the Plan of one weight, "
            "as decide(...)[path]; pack(plans, params, uses) packs a tree"
        )
    regions = plan.support.regions
    if regions is None:
        raise ValueError(
            "an unstructured support has no regions to pack; keep the weight dense, or "
            "choose a pattern such as NM or FlexHiNM"
        )
    regions = levelled(regions)
    verify_plan(plan)
    plan = dataclasses.replace(
        plan, support=dataclasses.replace(plan.support, regions=regions)
    )
    dense, nm = sizes(regions)
    axes = plan.weight.ndim - 2
    known = checks.are_concrete(plan)  # not the weight inside of a gradient
    devices = jnp.asarray(plan.weight).devices() if known else ()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        columns = regions.in_order.shape[-1]
        whole = columns // regions.m * regions.m
        gather = functools.partial(_gathered, dense=columns, nm=whole)
        packed = _assembled(_cut(over_stack(gather, axes)(plan), dense, nm), plan)
    else:
        one = functools.partial(pack_to, dense=dense, nm=nm)
        packed = over_stack(one, axes)(plan)
    packed = dataclasses.replace(packed, layout=layout)
    return packed if values is None else quantise(packed, values)


@functools.partial(jax.jit, static_argnames=("dense", "nm", "layout"))
@promotion.usual()
def pack_to(
    plan: Plan, dense: int, nm: int, layout: Layout | None = None
) -> PackedWeight:
    """Packs one matrix into given sizes; pure, so it can be jitted and vmapped.

    Args:
      plan: plan of one matrix `[o, i]` with regions.
      dense: dense columns per tile, at least the largest of the plan.
      nm: N:M columns per tile, a multiple of m, at least the largest of the plan.
      layout: how the matrix goes back into its leaf.

    Returns:
      The packed weight; a tile with fewer columns has index 0 and value 0. With
      `dense` or `nm` 0 it has None in their place.
    """
    packed = _assembled(_gathered(plan, dense, nm), plan)
    return dataclasses.replace(packed, layout=layout)


class _Blocks(NamedTuple):
    """Both blocks of every tile; any more columns than are needed are padding."""

    dense_index: Any  # i32[*stack, t, D]
    dense_values: Any  # [*stack, t, v, D]
    nm_index: Any  # i32[*stack, t, H]
    nm_values: Any  # [*stack, t, v, H / m, n]
    nm_position: Any  # u32[*stack, t, v, H / m, n]


@functools.partial(jax.jit, static_argnames=("dense", "nm"))
def _gathered(plan: Plan, dense: int, nm: int) -> _Blocks:
    """The blocks of one matrix, with the sizes of `pack_to`."""
    r = plan.support.regions
    assert r is not None
    o, i = plan.weight.shape
    t = r.in_order.shape[0]
    tiles = lambda x: x[r.out_order].reshape(t, o // t, i)  # noqa: E731
    weight, keep = tiles(plan.weight), tiles(plan.support.keep)

    def gather(start, end, size):
        p = start[:, None] + jnp.arange(size, dtype=jnp.int32)
        live = p < end[:, None]
        column = masks.take(r.in_order, jnp.minimum(p, i - 1), axis=1)
        column = jnp.where(live, column, 0)
        take = lambda x: masks.take(x, column[:, None], axis=2)  # noqa: E731
        kept = take(keep) & live[:, None]
        return column, jnp.where(kept, take(weight), jnp.zeros((), weight.dtype)), kept

    dense_index, dense_values, _ = gather(
        jnp.zeros_like(r.dense_end), r.dense_end, dense
    )
    nm_index, nm_weight, nm_keep = gather(r.dense_end, r.nm_end, nm)
    groups = nm_keep.reshape(t, o // t, -1, r.m)
    # Kept positions first, both halves in ascending order: strictly increasing.
    position = jnp.argsort(~groups, axis=-1, stable=True)[..., : r.n]
    position = position.astype(jnp.uint32)
    values = masks.take(nm_weight.reshape(groups.shape), position, axis=-1)
    return _Blocks(dense_index, dense_values, nm_index, values, position)


def _cut(blocks: _Blocks, dense: int, nm: int) -> _Blocks:
    """The first columns of blocks with all of them, on the host.

    Every weight has its own sizes, and to compile the gathers for each takes half a
    second; this way they are compiled for the shape of the matrix alone. Not for
    arrays of a mesh, whose packed arrays stay on it.
    """
    whole = _Blocks(*map(np.asarray, blocks))
    columns, groups = whole.nm_index.shape[-1], whole.nm_values.shape[-2]
    groups = nm // (columns // groups) if groups else 0
    return _Blocks(
        whole.dense_index[..., :dense],
        whole.dense_values[..., :dense],
        whole.nm_index[..., :nm],
        whole.nm_values[..., :groups, :],
        whole.nm_position[..., :groups, :],
    )


def _assembled(blocks: _Blocks, plan: Plan) -> PackedWeight:
    """The packed weight of its blocks: JAX arrays, or those of `_cut`."""
    r = plan.support.regions
    assert r is not None
    flat = lambda x: x.reshape(*x.shape[:-2], -1)  # noqa: E731
    code = positions.encode(flat(blocks.nm_position), r.n, r.m)
    packed = PackedWeight(
        dense_index=on_device(blocks.dense_index),
        dense_values=on_device(blocks.dense_values),
        nm_index=on_device(blocks.nm_index),
        nm_values=on_device(flat(blocks.nm_values)),
        nm_positions=on_device(code),
        out_order=r.out_order,
        left=plan.left,
        right=plan.right,
        shape=plan.weight.shape[-2:],
        n=r.n,
        m=r.m,
    )
    return canonical(packed)


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
        shape = (*packed.dense_values.shape[:-1], 1)
        values = jnp.zeros(shape, packed.values_dtype)
        packed = dataclasses.replace(packed, dense_index=index, dense_values=values)
        empty = [GROUPS]
    none = {name: None for names in empty for name in names}
    return dataclasses.replace(packed, **none)


def block_columns(packed: PackedWeight) -> Array:
    """The N:M block of every tile with its zeros.

    Args:
      packed: one packed matrix.

    Returns:
      [t, v, H] in the dtype of the stored values, columns in packed order.
    """
    packed = packed.filled()
    groups = packed.nm_values.shape[-1] // packed.n
    shape = (*packed.nm_values.shape[:-1], groups, packed.n, 1)
    slot = jnp.arange(packed.m, dtype=jnp.uint32)
    here = _positions(packed).reshape(shape) == slot
    zero = jnp.zeros((), packed.values_dtype)
    spread = jnp.where(here, packed.nm_values.reshape(shape), zero)
    columns = jnp.sum(spread, axis=-2, dtype=packed.values_dtype)
    return columns.reshape(*packed.nm_values.shape[:-1], packed.nm_index.shape[-1])


def stored_columns(packed: PackedWeight) -> Array:
    """i32[t, v, kept]: the N:M column, in packed order, of every stored value."""
    packed = packed.filled()
    value = jnp.arange(packed.nm_values.shape[-1], dtype=jnp.int32)
    return value // packed.n * packed.m + _positions(packed).astype(jnp.int32)


def _positions(packed: PackedWeight) -> Array:
    """u32[t, v, kept]: the position of every stored value in its group."""
    groups = packed.nm_values.shape[-1] // packed.n
    return positions.decode(packed.nm_positions, groups, packed.n, packed.m)


def spread_nan(x: Array, y: Array) -> Array:
    """The product y, NaN in all rows where x has one, as in a dense product.

    Columns that no tile keeps are never read, so the NaN would be lost.
    """
    unknown = jnp.isnan(x).any(axis=1, keepdims=True)
    return jnp.where(unknown, jnp.full((), jnp.nan, y.dtype), y)


def scales(packed: PackedWeight) -> Array:
    """The scale of every output of one scaled matrix, [o] in the accumulator."""
    assert packed.scale is not None
    stored = packed.scale.reshape(-1)[jnp.argsort(packed.out_order)]
    return stored.astype(accumulator(packed.dtype))


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of sums of products: float32, or that of the factors if wider."""
    return jnp.result_type(jnp.float32, dtype)


def rows_of(table: Array, index: Array) -> Array:
    """Rows `index` of tables [..., i, n], [..., *index.shape, n]; unsigned, in range.

    Indexing would add a test of every element for negative and large indices.
    """
    lead = table.ndim - 2
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(*range(lead), lead + index.ndim),
        collapsed_slice_dims=(lead,),
        start_index_map=(lead,),
    )
    return lax.gather(
        table,
        index[..., None],
        numbers,
        (*table.shape[:lead], 1, table.shape[-1]),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def block_product(x: Array, factor: BlockDiagonal | None, axis: int = -1) -> Array:
    """Block-diagonal matrix times x along `axis`; x itself when there is no factor.

    Args:
      x: any array.
      factor: one factor of the size of that axis; its order costs two gathers.
      axis: the axis to multiply.

    Returns:
      The shape of x, in the dtype of the accumulator.
    """
    if factor is None:
        return x
    k, b, _ = factor.blocks.shape
    x = jnp.moveaxis(x, axis, -1)
    if factor.order is not None:
        x = x[..., factor.order]
    y = jnp.einsum(
        "kab,...kb->...ka",
        factor.blocks,
        x.reshape(*x.shape[:-1], k, b),
        preferred_element_type=accumulator(jnp.result_type(x, factor.blocks)),
    )
    y = y.reshape(x.shape)
    if factor.order is not None:
        y = y[..., jnp.argsort(factor.order)]
    return jnp.moveaxis(y, -1, axis)


@promotion.usual()
def unpack(packed: PackedWeight) -> Array:
    """The dense matrix of a packed weight.

    Args:
      packed: one matrix or a stack.

    Returns:
      [*stack, o, i] in the dtype of the weight, scales and block wrappers multiplied
      in.

    Raises:
      ValueError: outside of a trace, arrays that break a promise of `PackedWeight`.
    """
    if not isinstance(packed, PackedWeight):
        raise ValueError(
            f"kernels.unpack got {arguments.shown(packed)}: need one PackedWeight, a "
            "leaf of what pack() returned"
        )
    if checks.are_concrete(packed):
        verify_packed(packed)
    return _unpack(dataclasses.replace(packed, layouts={}))


def with_weight(packed: PackedWeight, weight: Array) -> PackedWeight:
    """A packed weight with the values of another matrix that has the same zeros.

    Args:
      packed: one matrix or a stack, without scales and block wrappers.
      weight: [*stack, o, i], such as the matrix after further training.

    Returns:
      The packed weight: same positions, new values in the dtype that they had.

    Raises:
      ValueError: values with scales or wrappers, or a matrix that is not zero where the
        packed one is.
    """
    if not (packed.scale is None and packed.left is None and packed.right is None):
        raise ValueError(
            "this packed weight has values of eight bits, or block-diagonal wrappers, "
            "so it does not hold the weights themselves; pack the trained weights anew"
        )
    names = [n for n in ("dense_values", "nm_values") if getattr(packed, n) is not None]
    values = [getattr(packed, name) for name in names]

    def holding(*values: Array) -> PackedWeight:
        changed: Any = dict(zip(names, values, strict=True))
        return dataclasses.replace(packed, layouts={}, **changed)

    def matrix(*values: Array) -> Array:
        return _unpack(holding(*values))

    # Unpacking puts every value in one place; its transpose takes it from there.
    taken = jax.vjp(matrix, *values)[1](jnp.asarray(weight, packed.dtype))
    pairs = zip(values, taken, strict=True)
    trained = holding(*(jnp.where(old != 0, new, 0) for old, new in pairs))
    if not bool(jnp.all(_unpack(trained) == weight)):
        raise ValueError(
            "the matrix is not zero where the packed weight is; give weights that were "
            "trained under its zeros"
        )
    return trained


@jax.jit
def _unpack(packed: PackedWeight) -> Array:
    if packed.out_order.ndim > 1:
        return jax.vmap(_unpack)(packed)
    packed, (o, i) = packed.filled(), packed.shape
    t = packed.dense_index.shape[0]
    tiles = jnp.zeros((t, i, o // t), packed.values_dtype)
    tile = jnp.arange(t, dtype=jnp.int32)[:, None]
    tiles = tiles.at[tile, packed.nm_index].add(
        jnp.swapaxes(block_columns(packed), 1, 2)
    )
    tiles = tiles.at[tile, packed.dense_index].add(
        jnp.swapaxes(packed.dense_values, 1, 2)
    )
    rows = jnp.swapaxes(tiles, 1, 2).reshape(o, i)
    weight = jnp.zeros((o, i), rows.dtype).at[packed.out_order].set(rows)
    if packed.scale is None and packed.left is None and packed.right is None:
        return weight
    # S @ right = (right^T @ S^T)^T
    right = None if packed.right is None else packed.right.T
    weight = weight.astype(accumulator(packed.dtype))
    if packed.scale is not None:
        weight = weight * scales(packed)[:, None]
    weight = block_product(weight, right, axis=1)
    return block_product(weight, packed.left, axis=0).astype(packed.dtype)
