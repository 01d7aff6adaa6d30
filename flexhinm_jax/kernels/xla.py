"""The product in plain XLA, in the forms that were fastest on CPUs.

A prepared weight runs as `terms`, at any number of rows of x but one that threads share
(`cost.reads_canonical`). Without `prepare` the canonical arrays are read, in forms that
need little reordering per call.

Two things decide their speed. Weights must expand by elementwise operations on long
contiguous rows, which a loop vectorises: so the groups are read slot-major, all first
columns of the groups of a tile, then all second ones, and slot j is
`where(position == j, values, 0)`, without a scatter or a shuffle. The order of columns
is free, because x is gathered anyway. And both factors of a dot must stay in cache: so
a loop runs over the tiles, expands one, gathers its rows of x^T and multiplies, at most
`CHUNK` rows of x at a time. One gather for all tiles and one batched dot was 2 to 4
times slower from 64 rows on.

The form follows from the number of rows of x and the size of the weight (`form_of`;
`bench/kernels.py` measures):

    prepared terms    each stored value times a row of x^T, or times one of the inputs
                      of its group; nothing is expanded
    1, 2     select   each stored value times the input that its position selects;
                      nothing is expanded, each value is read once; up to 4 rows where
                      the stored values stay in cache
    64 ..    terms    their inputs listed anew in every product; fewer rows too where
                      an expanded tile leaves the cache (2:4 is one tile), and any
                      number where groups have too many selections and the values stay
                      in cache
    else     tiles    the expanded tile is joined and multiplied with chunks of rows
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax import jax_versions
from flexhinm_jax.kernels import cost, positions, terms
from flexhinm_jax.kernels.packing import (
    accumulator,
    block_columns,
    rows_of,
    spread_nan,
    stored_columns,
)
from flexhinm_jax.ops.words import position_bits
from flexhinm_jax.types import PackedWeight

NAME = "xla"
FEW, FEW_CACHED = 2, 4
MANY = 64
CACHED_VALUES, CACHED_TILE = 1 << 19, 1 << 21
CHUNK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The columns of every tile in the order dense, then slot by slot.

    Attributes:
      values: n times [t, v, G], the k-th kept value of every group; or once
        [t, v, D + m * G], all columns with their zeros, for more than
        `cost.MOST` selections per group.
      positions: u8[t, v, G], all positions of a group in one byte where they fit, as
        the nibble of a 2:4 group does; n times that otherwise; () when expanded.
      index: u32[t, D + m * G], original input of each column.
      inverse: u32[o], storage row of each original row.
    """

    values: tuple[Array, ...]
    positions: tuple[Array, ...]
    index: Array
    inverse: Array


def prepare(packed: PackedWeight) -> terms.Terms:
    """Lists the terms of one matrix once instead of in every product."""
    return terms.terms_of(packed)


def slots_of(packed: PackedWeight) -> Slots:
    """The slot-major form, derived in the traced program."""
    packed = packed.filled()
    t, v, _ = packed.nm_values.shape
    n, m = packed.n, packed.m
    groups = packed.nm_index.shape[-1] // m
    by_slot = jnp.swapaxes(packed.nm_index.reshape(t, groups, m), 1, 2)
    index = jnp.concatenate([packed.dense_index, by_slot.reshape(t, -1)], axis=1)
    index = index.astype(jnp.uint32)
    inverse = terms.inverse_order(packed)
    if not cost.selects(packed):
        slots = block_columns(packed).reshape(t, v, groups, m)
        slots = jnp.swapaxes(slots, -1, -2).reshape(t, v, -1)
        whole = jnp.concatenate([packed.dense_values, slots], axis=-1)
        return Slots((whole,), (), index, inverse)
    values = packed.nm_values.reshape(t, v, groups, n)
    # At most `cost.MOST` selections: one byte often holds all positions of a group.
    joint = n * position_bits(m) <= 8
    read = positions.decode_joint if joint else positions.decode
    chosen = read(packed.nm_positions, groups, n, m)
    chosen = chosen.reshape(t, v, groups, 1 if joint else n).astype(jnp.uint8)
    apart = lambda a: tuple(a[..., k] for k in range(a.shape[-1]))  # noqa: E731
    return Slots(apart(values), apart(chosen), index, inverse)


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o], summed in `accumulator`."""
    # Otherwise what makes x and what reads y would be fused with the gathers and
    # computed once for every time that they read an element.
    x = lax.optimization_barrier(x)
    rows, ready = x.shape[0], packed.layouts.get(NAME)
    if ready is not None and not cost.reads_canonical(
        rows, cost.selects(packed), ready.place.threads
    ):
        return terms.matmul(x, packed, ready, dtype)
    packed = packed.filled()
    y = FORMS[form_of(rows, packed)](x, packed)
    return lax.optimization_barrier(spread_nan(x, y.astype(dtype)))


def form_of(rows: int, packed: PackedWeight) -> str:
    """Name of the form that was fastest for so many rows of x without `prepare`.

    A number that is not known before a program runs (`jax.export`) takes a form that
    serves every number well.
    """
    if not isinstance(rows, int):
        return "tiles"
    whole = packed.filled()
    cached = whole.dense_values.size + whole.nm_values.size <= CACHED_VALUES
    if not cost.selects(packed):
        return "terms" if cached else "tiles"
    if rows <= (FEW_CACHED if cached else FEW):
        return "select"
    expanded = whole.dense_values.shape[1] * packed.shape[1]
    return "terms" if rows >= MANY or expanded > CACHED_TILE else "tiles"


def _terms(x: Array, packed: PackedWeight) -> Array:
    """Stored values times rows of x^T, whose numbers are listed for this product."""
    return terms.gather_canonical(x, packed, accumulator(x.dtype))


def _tiles(x: Array, packed: PackedWeight) -> Array:
    """One dot per tile and chunk of rows, over a loop of tiles."""
    slots = slots_of(packed)
    v, rows = packed.dense_values.shape[1], x.shape[0]
    chunk = min(CHUNK, rows) if isinstance(rows, int) else rows
    x = jnp.pad(x, ((0, -rows % chunk), (0, 0)))
    columns = jnp.swapaxes(
        x.reshape(-(-rows // chunk), chunk, x.shape[1]), 1, 2
    )  # [chunks, i, chunk]

    def step(_: None, tile: tuple) -> tuple[None, Array]:
        whole = _joined(packed, *tile[1:]).astype(x.dtype)
        return None, lax.map(lambda c: _dot(whole, rows_of(c, tile[0])), columns)

    y = lax.scan(step, None, _stored(packed, slots))[1]  # [t, chunks, v, chunk]

    # A loop of its own: fused with what reads y, the reordering would be done again
    # for every read.
    def place(k: Array) -> Array:
        part = lax.dynamic_index_in_dim(y, k, 1, keepdims=False)
        return rows_of(part.reshape(-1, chunk), slots.inverse).T

    chunks = jnp.arange(columns.shape[0], dtype=jnp.int32)
    return lax.map(place, chunks).reshape(-1, y.shape[0] * v)[:rows]


def _joined(
    packed: PackedWeight, dense: Array, values: tuple, positions: tuple
) -> Array:
    """All columns of one tile with their zeros, [v, D + m * G]."""
    if not positions:
        return values[0]
    parts = [dense, *expand(values, positions, packed.n, packed.m)]
    # Without the barrier the joining is repeated inside the loop of the dot.
    return lax.optimization_barrier(jnp.concatenate(parts, axis=-1))


def _stored(packed: PackedWeight, slots: Slots) -> tuple[Any, ...]:
    return slots.index, packed.dense_values, slots.values, slots.positions


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=accumulator(b.dtype))


def expand(values: tuple, positions: tuple, n: int, m: int) -> list[Array]:
    """The m slots of every group, each [..., v, G], from values and positions."""
    each = position_of(positions, n, m)
    slots = []
    for j in range(m):
        slot = jnp.zeros((), values[0].dtype)
        for k in range(n):
            slot = jnp.where(each[k] == j, values[k], slot)
        slots.append(slot)
    return slots


def position_of(positions: tuple, n: int, m: int) -> tuple[Array, ...]:
    """Position of the k-th kept value of every group: n times [..., v, G]."""
    if len(positions) == n > 1:
        return positions
    bits, (joint,) = position_bits(m), positions
    mask = joint.dtype.type((1 << bits) - 1)
    return tuple((joint >> (k * bits)) & mask for k in range(n))


def _select(x: Array, packed: PackedWeight) -> Array:
    """Every stored value times the input that its position selects."""
    slots = slots_of(packed)
    t, v, d = packed.dense_values.shape
    n, m, groups = packed.n, packed.m, slots.values[0].shape[-1]
    # In words, not in the bytes of `slots`: twice as fast, and nothing is written.
    each = terms.positions_of(packed)
    wide = accumulator(x.dtype)
    ones = jnp.ones((groups, 1), wide)

    def row(x: Array) -> Array:
        gathered = x[slots.index]  # [t, D + m * G]
        slot = gathered[:, d:].reshape(t, m, 1, groups)
        slot = jnp.moveaxis(slot, 1, 0)
        total = jnp.zeros((), wide)
        for k in range(n):
            value = slots.values[k].astype(x.dtype).astype(wide)
            total += value * terms.chosen(each[k], slot, k, n).astype(wide)
        # A dot with ones adds vectorised; a reduction inside a fusion does not.
        total = lax.optimization_barrier(total).reshape(t * v, groups)
        y = (total @ ones).reshape(t, v)
        if d:
            y += jnp.einsum(
                "tvc,tc->tv",
                packed.dense_values.astype(x.dtype),
                gathered[:, :d],
                preferred_element_type=wide,
            )
        return y.reshape(t * v)[slots.inverse]

    return jnp.stack([row(x[k]) for k in range(x.shape[0])])


FORMS = {"select": _select, "terms": _terms, "tiles": _tiles}


def multiply(
    x: Array, packed: PackedWeight, dtype: DTypeLike, *, transposed: bool
) -> Array:
    """The sparse core or its transpose."""
    if not transposed:
        return matmul(x, packed, dtype)
    return matmul_transposed(x, packed, dtype)


def matmul_transposed(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, o] @ S -> [N, i], summed in `accumulator`."""
    packed = packed.filled()
    t, v, _ = packed.dense_values.shape
    slots, wide = slots_of(packed), accumulator(x.dtype)
    rows = x.T[packed.out_order].reshape(t, v, x.shape[0])

    def step(y: Array, tile: tuple) -> tuple[Array, None]:
        index, dense, values, positions, rows = tile
        whole = _joined(packed, dense, values, positions).astype(x.dtype)
        part = jnp.einsum("vc,vn->cn", whole, rows, preferred_element_type=wide)
        return y.at[index].add(part), None

    stored = (*_stored(packed, slots), rows)
    start = jnp.zeros((packed.shape[1], x.shape[0]), wide)
    # Inside a shard_map the sums differ from device to device as x does.
    start = jax_versions.varying(start, sorted(jax_versions.varying_axes(x)))
    y = lax.scan(step, start, stored)[0].T.astype(dtype)
    return spread_nan(x, y)


def gradient_of_values(x: Array, g: Array, packed: PackedWeight) -> tuple[Array, Array]:
    """The cotangents of (dense_values, nm_values) of y = x @ S^T.

    Args:
      x: [N, i].
      g: [N, o], the cotangent of y.
      packed: the weight; its values are not read, only their shapes and dtype.

    Returns:
      Arrays like `dense_values` and `nm_values`, empty where these are None.
    """
    packed = packed.filled()
    t, v, d = packed.dense_values.shape
    columns, rows = x.T, g.T[packed.out_order].reshape(t, v, g.shape[0])

    def tile(part: tuple) -> tuple[Array, Array]:
        dense_index, nm_index, at, rows = part
        gathered = columns[jnp.concatenate([dense_index, nm_index])]
        full = jnp.einsum(
            "vn,cn->vc",
            rows,
            gathered,
            preferred_element_type=accumulator(x.dtype),
        )
        return full[:, :d], jnp.take_along_axis(full[:, d:], at, axis=1)

    listed = packed.dense_index, packed.nm_index, stored_columns(packed), rows
    dense, nm = lax.map(tile, listed)
    return dense.astype(packed.dense_values.dtype), nm.astype(packed.nm_values.dtype)
