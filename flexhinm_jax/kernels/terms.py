"""The prepared product of "xla" on CPUs: a sum of stored values times inputs.

    y[r, :] += values[k, r] * x^T[column[k, r], :]          many rows of x
    y[:, r] += values[k, r] * select(position[k, r], x of the group of k)     few

Nothing is expanded and no zero is multiplied, so the arithmetic is that of the stored
values alone: a quarter of the dense one at 75 %. The k-th values of all rows of the
weight are neighbours, so one copy of the values serves both loops.

Many rows of x: XLA compiles `BLOCK` terms into one loop over the rows of x, whose
pointers and factors stay in registers: every vector instruction is a multiply-add that
reads x^T from the cache. The rows of one tile share their columns, so these are mostly
in the first-level cache. Two loads a cycle bound it at about half of what a dense
product reaches per operation, which at 75 % leaves twice its speed.

Few rows of x: the loop runs over the rows of the weight instead. A gather of single
numbers would cost more than the product; the m inputs of a group are the same for a
whole tile, so they are scalars of the loop and a position selects among them without a
gather. What is read is half of a dense 2:4 weight and a sixteenth for the positions.

Rows are in storage order; they are put back into original order at the end.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax import jax_versions
from flexhinm_jax.kernels import cost, positions
from flexhinm_jax.kernels.packing import (
    accumulator,
    rows_of,
    spread_nan,
    stored_columns,
)
from flexhinm_jax.ops import words
from flexhinm_jax.types import PackedWeight, exportable, static

BLOCK = 8
"""Terms of one loop; more do not fit the registers."""

CHUNK = 128
"""Rows of x side by side: more leave the cache, fewer repeat the loads of the terms."""

SHORT = 16
"""Below so many of them two blocks at once are faster."""

VECTOR, LEAST = 8, 16
"""Rows of x are padded to whole vectors, and to two, unless there are `cost.FEW`: one
takes no less time in the cache, and twice as much where the rows of x^T leave it."""


Term = Callable[[Array | int, int], tuple[Array, Array]]
"""(first term of a step, number in it) -> its values [o] and original inputs [o]."""


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """All stored values of a weight, those of one column beside each other.

    Attributes:
      values: [terms, o], rows in storage order, dense columns first; 0 behind the last,
        up to a multiple of `BLOCK`.
      columns: u16[terms, o], original input of each value; u32 for more inputs than
        65536.
      positions: u32[words, o], the position of every kept value in its group, by
        `words.to_words`; none where a group has too many choices to select.
      inverse: u32[o], storage row of each original row.
      place: where it was prepared to run: whether the tree that it was prepared in
        fits the cache (`cost.CACHE`), and the threads.
    """

    values: Array
    columns: Array
    positions: Array
    inverse: Array
    place: cost.Place = static(default=cost.Place())


def terms_of(packed: PackedWeight) -> Terms:
    """Lists the stored values of one matrix with their inputs."""
    packed = packed.filled()
    t, v, d = packed.dense_values.shape
    o, kept = packed.shape[0], packed.nm_values.shape[-1]
    dense = packed.dense_index.astype(_narrow(packed))
    dense = jnp.broadcast_to(dense[:, None], (t, v, d))
    inner = jnp.stack(inputs_of(packed), axis=-1).reshape(t, v, kept)
    stored = jnp.stack(positions_of(packed), axis=-1).reshape(t, v, kept)

    if not cost.selects(packed):
        stored = stored[..., :0]

    def lines(*parts: Array) -> Array:
        a = jnp.concatenate(parts, axis=2).reshape(o, d + kept)
        return jnp.pad(a, ((0, 0), (0, -(d + kept) % BLOCK))).T

    return Terms(
        lines(packed.dense_values, packed.nm_values),
        lines(dense, inner),
        words.to_words(stored, words.position_bits(packed.m)).reshape(o, -1).T,
        inverse_order(packed),
    )


def matmul(x: Array, packed: PackedWeight, terms: Terms, dtype: DTypeLike) -> Array:
    """Sparse core: x [N, i] @ S^T -> [N, o], summed in `accumulator`.

    A NaN in x makes every output of its row NaN, as in the dense product.
    """
    rows = x.shape[0]
    if isinstance(rows, int) and rows <= cost.FEW and cost.selects(packed):
        return spread_nan(x, select(x, packed.filled(), terms).astype(dtype))
    return gather(x, terms, dtype)


def gather(x: Array, terms: Terms, dtype: DTypeLike) -> Array:
    """The product of many rows of x, [N, o]: every term reads its row of x^T."""

    def term(first: Array | int, k: int) -> tuple[Array, Array]:
        # Sliced for every term: a slice that several terms share would be copied.
        at = lambda a: lax.dynamic_index_in_dim(a, first + k, keepdims=False)  # noqa: E731
        return at(terms.values), at(terms.columns)

    def add(y: Array, columns: Array) -> Array:
        return add_terms(y, columns, x.dtype, len(terms.values), BLOCK, term)

    return turned(x, terms.values, terms.inverse, add, dtype)


def gather_canonical(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """The same of a weight that is not prepared: its values are read where they are.

    Only the inputs of the kept values are listed, by elementwise operations.
    """
    packed = packed.filled()
    t, v, d = packed.dense_values.shape
    o, n = packed.shape[0], packed.n
    listed = inputs_of(packed)

    def at(a: Array, k: Array | int) -> Array:
        return lax.dynamic_index_in_dim(a, k, axis=2, keepdims=False).reshape(o)

    def dense(first: Array | int, k: int) -> tuple[Array, Array]:
        index = lax.dynamic_index_in_dim(packed.dense_index, first + k, axis=1)
        column = jnp.broadcast_to(index, (t, v)).reshape(o)
        return at(packed.dense_values, first + k), column

    def grouped(first: Array | int, k: int) -> tuple[Array, Array]:
        column = at(listed[k % n], first // n + k // n)
        return at(packed.nm_values, first + k), column

    def add(y: Array, columns: Array) -> Array:
        y = add_terms(y, columns, x.dtype, d, BLOCK, dense)
        kept, step = packed.nm_values.shape[-1], n * max(1, BLOCK // n)
        return add_terms(y, columns, x.dtype, kept, step, grouped)

    values = packed.nm_values if packed.nm_values.size else packed.dense_values
    return turned(x, values, inverse_order(packed), add, dtype)


def turned(
    x: Array, values: Array, inverse: Array, add: Any, dtype: DTypeLike
) -> Array:
    """The sums of `add` for the columns of x, put in order: [N, o].

    Args:
      x: [N, i].
      values: of the weight, any that is there.
      inverse: u32[o], storage row of each original row.
      add: adds its terms to [chunks, o, n] for columns [chunks, i, n].
      dtype: of the result.
    """
    rows, outputs, wide = x.shape[0], inverse.shape[0], accumulator(x.dtype)
    chunk = chunk_of(rows)
    turn = functools.partial(_turned, values[(0,) * values.ndim])
    x = jnp.pad(x.astype(wide), ((0, -rows % chunk), (0, 0)))
    columns = turn(
        x.reshape(-(-rows // chunk), chunk, x.shape[1])
    )  # [chunks, i, chunk]
    # The columns that no row keeps are never read: a dense product would.
    unknown = jnp.isnan(columns).any(axis=1)
    start = jnp.where(unknown, jnp.nan, 0.0).astype(wide)
    y = jnp.broadcast_to(start[:, None], (start.shape[0], outputs, start.shape[1]))
    y = turn(add(y, columns), inverse)
    return y.reshape(-1, outputs)[:rows].astype(dtype)


def inputs_of(packed: PackedWeight) -> tuple[Array, ...]:
    """Original input of the k-th kept value of every group, n times [t, v, G].

    u16 for at most 65536 inputs, else u32.
    """
    t, v, kept = packed.nm_values.shape
    n, m, groups = packed.n, packed.m, kept // packed.n
    if not cost.selects(packed):
        spread = jnp.broadcast_to(packed.nm_index[:, None], (t, v, groups * m))
        inner = jnp.take_along_axis(spread, stored_columns(packed), axis=2)
        inner = inner.astype(_narrow(packed))
        return tuple(inner[..., k::n] for k in range(n))
    index = packed.nm_index.astype(_narrow(packed)).reshape(t, 1, groups, m)
    slots = lax.optimization_barrier(jnp.moveaxis(index, -1, 0))
    position = positions_of(packed)
    listed = [chosen(position[k], slots, k, n) for k in range(n)]
    # Listed once: fused with the sums, it would be done for every row of x.
    return lax.optimization_barrier(tuple(listed))


def positions_of(packed: PackedWeight) -> list[Array]:
    """Position of the k-th kept value of every group: n times u32[t, v, G]."""
    n, m, groups = packed.n, packed.m, packed.nm_values.shape[-1] // packed.n
    bits = words.position_bits(m)
    if n * bits > words.WORD or math.comb(m, n) > positions.MAX_TABLE:
        each = positions.decode(packed.nm_positions, groups, n, m)
        return [each[..., k::n] for k in range(n)]
    # A number for all positions of a group: long rows without a stride.
    joint = positions.decode_joint(packed.nm_positions, groups, n, m)
    return [(joint >> jnp.uint32(k * bits)) & _mask(bits) for k in range(n)]


def chosen(position: Array, slots: Sequence[Array] | Array, k: int, n: int) -> Array:
    """What stands in the slot of the k-th of n kept values of a group.

    Positions increase inside a group, so it is one of the slots k .. m - n + k.
    """
    first, last = k, len(slots) - n + k
    y = slots[last]
    for j in reversed(range(first, last)):
        y = jnp.where(position == j, slots[j], y)
    return y


def _mask(bits: int) -> Array:
    return jnp.uint32((1 << bits) - 1)


def inverse_order(packed: PackedWeight) -> Array:
    """u32[o], storage row of each original row."""
    stored = jnp.arange(packed.shape[0], dtype=jnp.uint32)
    return jnp.zeros_like(stored).at[packed.out_order].set(stored)


def _narrow(packed: PackedWeight) -> jnp.dtype:
    return jnp.dtype(jnp.uint16 if packed.shape[1] <= 1 << 16 else jnp.uint32)


def select(x: Array, packed: PackedWeight, terms: Terms) -> Array:
    """The product of few rows of x, [N, o]: every term selects among its group.

    Args:
      x: [N, i].
      packed: the filled weight; its values and positions are not read.
      terms: what they are read from.
    """
    t, v, d = packed.dense_values.shape
    n, m, rows, half = packed.n, packed.m, x.shape[0], x.dtype
    wide, bits = accumulator(half), words.position_bits(m)
    groups = packed.nm_index.shape[-1] // m
    columns = x.T.astype(wide)
    # [c, N, t, 1]: inputs of the dense columns, and [m * c, N, t, 1] of the groups.
    dense, slots = (
        jnp.transpose(columns[index], (1, 2, 0))[..., None]
        for index in (packed.dense_index, packed.nm_index)
    )

    def at(a: Array, k: Array | int) -> Array:
        return lax.dynamic_index_in_dim(a, k, keepdims=False)

    def value(k: Array | int) -> Array:
        row = at(terms.values, k).astype(half).astype(wide)
        return row.reshape(t, v)

    def add_dense(y: Array, first: Array | int, count: int) -> Array:
        for k in range(count):
            y += value(first + k) * at(dense, first + k)
        return y

    def add_groups(y: Array, first: Array | int, count: int) -> Array:
        for g in range(count):
            slot = [at(slots, (first + g) * m + j) for j in range(m)]
            for k in range(n):
                bit = (g * n + k) * bits  # from the first word of the step
                word = first * n * bits // words.WORD + bit // words.WORD
                position = at(terms.positions, word) >> jnp.uint32(bit % words.WORD)
                position = position.reshape(t, v) & _mask(bits)
                y += value(d + (first + g) * n + k) * chosen(position, slot, k, n)
        return y

    # Inside a shard_map the sums differ from device to device as x does.
    y = jnp.zeros((rows, t, v), wide)
    y = jax_versions.varying(y, sorted(jax_versions.varying_axes(x)))
    y = repeated(y, add_dense, d, BLOCK)
    # A step begins where a word does.
    step = words.WORD // math.gcd(words.WORD, n * bits)
    y = repeated(y, add_groups, groups, step)
    return y.reshape(rows, t * v)[:, terms.inverse]


def _turned(value: Array, x: Array, order: Array | None = None) -> Array:
    """The last two axes exchanged, in a loop of its own; before, rows in an order.

    A transposition costs as much as a copy; fused with what makes or reads the array,
    both take several times as long. XLA drops optimisation barriers before it fuses,
    but it does not fuse into a branch that depends on a value, whatever it is; and a
    single axis leaves no layout that would pass the exchange on to the reader.
    """

    def turn(x: Array) -> Array:
        x = x if order is None else rows_of(x, order)
        return jnp.swapaxes(x, 1, 2).reshape(-1)

    a, b, c = x.shape
    return lax.cond(value == value, turn, turn, x).reshape(a, c, b)


def chunk_of(rows: int) -> int:
    """Rows of x side by side: equal parts in whole vectors; one for a symbolic size."""
    if not isinstance(rows, int):
        return VECTOR
    if rows <= cost.FEW:
        return rows
    parts = -(-rows // CHUNK)
    return max(LEAST, -(-rows // (parts * VECTOR)) * VECTOR)


def add_terms(
    y: Array, columns: Array, half: DTypeLike, total: int, step: int, term: Term
) -> Array:
    """Adds `total` terms to y f32[chunks, o, n] for x^T [chunks, i, n].

    One loop over all chunks, because XLA divides it among the cores: loops over single
    chunks end before another core has woken up.
    """
    step *= 2 if columns.shape[2] < SHORT else 1

    def add(y: Array, first: Array | int, count: int) -> Array:
        for k in range(count):
            value, column = term(first, k)
            value = value.astype(half).astype(y.dtype)
            y += value[:, None] * rows_of(columns, column.astype(jnp.uint32))
        return y

    return repeated(y, add, total, step)


def repeated(y: Array, add: Any, total: int, step: int) -> Array:
    """Adds `total` things to y by add(y, first, count), `step` of them at a time."""
    whole = total // step
    if whole:
        y = lax.fori_loop(0, whole, lambda s, y: add(y, s * step, step), y)
    return add(y, whole * step, total % step)
