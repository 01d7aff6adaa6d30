"""The prepared product of "xla" on CPUs: a sum of stored values times rows of x^T.

    y[r, :] += values[r, k] * x^T[column[r, k], :]

Nothing is expanded and no zero is multiplied, so the arithmetic is that of the stored
values alone: a quarter of the dense one at 75 %. XLA compiles `BLOCK` such terms into
one loop over the rows of x, whose pointers and factors stay in registers: every vector
instruction is a multiply-add that reads x^T from the cache. The rows of one tile share
their columns, so these are mostly in the first-level cache. Two loads a cycle bound it
at about half of what a dense product reaches per operation, which at 75 % leaves twice
its speed.

Rows are independent, so they are kept in original order and nothing is scattered.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax.kernels.packing import accumulator, stored_columns
from flexhinm_jax.types import PackedWeight, exportable

BLOCK = 8
"""Terms of a row that are stored together; more do not fit the registers."""

CHUNK = 128
"""Rows of x side by side: more leave the cache, fewer repeat the loads of the terms."""

SHORT = 32
"""Below so many of them two blocks at once are faster."""

VECTOR = 8
"""Rows of x are padded to whole vectors, unless there are fewer."""


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """All stored values of a weight, row by row, in blocks.

    Attributes:
      values: [blocks, o, BLOCK], rows in original order; 0 behind the last.
      columns: u16[blocks, o, BLOCK], original input of each value; u32 for more inputs
        than 65536.
    """

    values: Array
    columns: Array


def terms_of(packed: PackedWeight) -> Terms:
    """Lists the stored values of one matrix with their inputs."""
    packed = packed.filled()
    t, v, d = packed.dense_values.shape
    o, i = packed.shape
    kept = packed.nm_values.shape[-1]
    spread = lambda a: jnp.broadcast_to(a[:, None], (t, v, a.shape[-1]))  # noqa: E731
    at = stored_columns(packed)
    inner = jnp.take_along_axis(spread(packed.nm_index), at, axis=2)
    columns = jnp.concatenate([spread(packed.dense_index), inner], axis=2)
    values = jnp.concatenate([packed.dense_values, packed.nm_values], axis=2)

    stored = jnp.argsort(packed.out_order)

    def blocks(a: Array) -> Array:
        a = a.reshape(o, d + kept)[stored]
        a = jnp.pad(a, ((0, 0), (0, -(d + kept) % BLOCK)))
        return jnp.swapaxes(a.reshape(o, -1, BLOCK), 0, 1)

    narrow = jnp.uint16 if i <= 1 << 16 else jnp.uint32
    return Terms(blocks(values), blocks(columns.astype(narrow)))


def matmul(x: Array, terms: Terms, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o], summed in `accumulator`.

    A NaN in x makes every output of its row NaN, as in the dense product.
    """
    rows, half, outputs = x.shape[0], x.dtype, terms.values.shape[1]
    chunk = chunk_of(rows)
    turn = functools.partial(_turned, terms.values[0, 0, 0])
    wide = accumulator(half)
    x = jnp.pad(x.astype(wide), ((0, -rows % chunk), (0, 0)))
    columns = turn(
        x.reshape(-(-rows // chunk), chunk, x.shape[1])
    )  # [chunks, i, chunk]
    # The columns that no row keeps are never read: a dense product would.
    unknown = jnp.isnan(columns).any(axis=1)
    start = jnp.where(unknown, jnp.nan, 0.0).astype(wide)
    y = turn(_sum(columns, start, terms, half))
    return y.reshape(-1, outputs)[:rows].astype(dtype)


def _turned(value: Array, x: Array) -> Array:
    """The last two axes exchanged, in a loop of its own.

    A transposition costs as much as a copy; fused with what makes or reads the array,
    both take several times as long. XLA drops optimisation barriers before it fuses,
    but it does not fuse into a branch that depends on a value, whatever it is; and a
    single axis leaves no layout that would pass the exchange on to the reader.
    """
    turn = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1)  # noqa: E731
    a, b, c = x.shape
    return lax.cond(value == value, turn, turn, x).reshape(a, c, b)


def chunk_of(rows: int) -> int:
    """Rows of x side by side: equal parts in whole vectors; one for a symbolic size."""
    if not isinstance(rows, int):
        return VECTOR
    if rows <= VECTOR:
        return rows
    parts = -(-rows // CHUNK)
    return -(-rows // (parts * VECTOR)) * VECTOR


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


def _sum(columns: Array, start: Array, terms: Terms, half: DTypeLike) -> Array:
    """All chunks: x^T [chunks, i, n] -> f32[chunks, o, n], added to start [chunks, n].

    One loop over all chunks, because XLA divides it among the cores: loops over single
    chunks end before another core has woken up.
    """
    blocks, o, _ = terms.values.shape
    each = 2 if columns.shape[2] < SHORT else 1

    def one(a: Array, block: Array, k: int) -> Array:
        # Sliced for every term: a slice that several terms share would be copied.
        at = (block, jnp.int32(0), jnp.int32(k))
        return lax.dynamic_slice(a, at, (1, o, 1)).reshape(o)

    def add(y: Array, first: Array, count: int) -> Array:
        for block in (first + jnp.int32(b) for b in range(count)):
            for k in range(BLOCK):
                value = one(terms.values, block, k).astype(half).astype(y.dtype)
                column = one(terms.columns, block, k).astype(jnp.uint32)
                y += value[:, None] * rows_of(columns, column)
        return y

    y = jnp.broadcast_to(start[:, None], (start.shape[0], o, start.shape[1]))
    step = lambda s, y: add(y, s * each, each)  # noqa: E731
    y = lax.fori_loop(0, blocks // each, step, y)
    return add(y, jnp.int32(blocks - blocks % each), blocks % each)
