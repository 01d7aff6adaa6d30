"""Input orders of row tiles: which columns share an N:M group, which stay dense or go.

The input phase of Gyro-Permutation (arXiv:2407.20496): every group gives up one sampled
column, and an assignment decides where each of them goes. With the other m - 1 columns
of a group sorted per row, the group keeps `a + max(b, x)` with a new column x, where a
is the sum of their n - 1 best and b their n-th best. Only `sum_r max(b_ri, x_rj)`
depends on the candidate, so the gain matrix is a max-reduction and nothing is sorted
per pair.

Departures. (1) Dense and pruned columns take part: a dense place keeps `sum_r x_rj`, a
pruned place nothing, so the search also corrects which columns the tile keeps, at the
same counts. (2) Places are drawn in random blocks, so wide layers cost O(rows * columns
* block) per sweep. (3) Pairwise exchanges replace the Hungarian algorithm by default.

One tile with all rows is the channel permutation of plain N:M (Zhang et al. 2024, RIA).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops import assignment, draws, masks, regions

UNROLL = 8  # rows per step of the max-reduction: keeps the accumulator in registers
ROUNDS = 2  # of exchanges per gain matrix; more is lost on the next sample


def max_reduction(b: Array, x: Array) -> Array:
    """sum_r max(b_ri, x_rj) without an array of that product's size.

    Args:
      b: f32[v, g].
      x: f32[v, g].

    Returns:
      f32[g, g]; rows are added in order, so the result does not depend on batching.
    """
    v, g = b.shape
    unroll = next(u for u in (UNROLL, 8, 4, 2, 1) if v % u == 0)
    b, x = b.reshape(-1, unroll, g), x.reshape(-1, unroll, g)

    def step(r, total):
        for j in range(unroll):
            total += jnp.maximum(b[r, j, :, None], x[r, j, None, :])
        return total

    return lax.fori_loop(0, v // unroll, step, jnp.zeros((g, g), jnp.float32))


@functools.partial(jax.jit, static_argnames=("sweeps", "block", "solver", "trace"))
def search(
    key: Array,
    tiles: Array,
    columns: regions.Columns,
    *,
    sweeps: int,
    block: int = 64,
    solver: Literal["swaps", "hungarian"] = "swaps",
    trace: bool = False,
) -> regions.Columns:
    """Improves the input order of every tile; never lowers what a tile keeps.

    Args:
      key: consumed: a block partition and one sampled slot per group and sweep.
      tiles: scores f32[t, v, i], non-negative, in original column order.
      columns: the start; m divides i.
      sweeps: proposals per group.
      block: groups that exchange columns in one proposal; bounds memory and time.
      solver: "swaps" or "hungarian", see `ops.assignment`.
      trace: return what is kept after every sweep as well.

    Returns:
      The columns in an improved order, or (columns, f32[sweeps]) with `trace`.
    """
    dense, h, n, m = columns.dense, columns.h, columns.n, columns.m
    t, v, i = tiles.shape
    units = i // m
    block = min(block, units)
    by_column = jnp.swapaxes(tiles, 1, 2).astype(jnp.float32).reshape(t * i, v)
    first = i * jnp.arange(t, dtype=jnp.int32)
    slot = jnp.arange(m, dtype=jnp.int32)

    def exchange(units_of, table, shift):
        """One proposal between the units of a block."""
        sub = table[:, units_of]  # [t, g, m], the sampled column first
        # Slot by slot, so that rows are contiguous until there are only two arrays.
        # In the columns of all tiles, which takes half as long as in those of each.
        at = (sub + first[:, None, None]).reshape(-1, m)
        value = [
            by_column.at[at[:, j]].get(mode="promise_in_bounds").reshape(t, -1, v)
            for j in range(m)
        ]  # [t, g, v]
        x = jnp.swapaxes(value[0], 1, 2)
        b = jnp.swapaxes(masks.n_largest(value[1:], n)[-1], 1, 2)
        grouped = units_of < h
        place = units_of * m + shift[:, units_of] - m * h  # [t, g], of what is no group
        b = jnp.where(grouped, b, 0)
        gain = jax.vmap(max_reduction)(b, x)
        gain = jnp.where((grouped | (place < dense))[..., None], gain, 0)
        if solver == "swaps":
            choice = assignment.swaps(gain, ROUNDS)
        else:
            choice = accept_better(gain, assignment.hungarian(gain))
        moved = masks.take(sub[..., 0], choice, axis=1)
        return table.at[:, units_of, 0].set(moved)

    def sweep(table, key):
        bits = draws.bits(key, (t + 1, units))
        drawn = jnp.argsort(bits[0], stable=True).astype(jnp.int32)
        shift = (bits[1:] % m).astype(jnp.int32)
        turn = (slot + shift[..., None]) % m
        table = masks.take(table, turn, axis=2)

        def one(g, table):
            at = lax.dynamic_slice_in_dim(drawn, g * block, block)
            return exchange(at, table, shift)

        table = lax.fori_loop(0, units // block, one, table)
        back = (slot - shift[..., None]) % m
        table = masks.take(table, back, axis=2)
        return table, regions.value(tiles, ordered(table)) if trace else None

    def ordered(table):
        order = unit_layout(table.reshape(t, i), dense, h, m, inverse=True)
        return dataclasses.replace(columns, order=order)

    table = unit_layout(columns.order, dense, h, m).reshape(t, units, m)
    table, curve = lax.scan(sweep, table, jax.random.split(key, sweeps))
    better = ordered(table)
    return (better, curve) if trace else better  # pyright: ignore[reportReturnType]


def accept_better(gain: Array, choice: Array) -> Array:
    """`choice` where it gains more than the identity, else the identity, per tile."""
    before = jnp.sum(jnp.diagonal(gain, axis1=-2, axis2=-1), axis=-1)
    after = masks.take(gain, choice[..., None], axis=-1)[..., 0]
    better = jnp.sum(after, axis=-1) > before * (1 + assignment.TOLERANCE)
    same = jnp.arange(choice.shape[-1], dtype=jnp.int32)
    return jnp.where(better[..., None], choice, same)


def unit_layout(
    order: Array, dense: Array, h: Array, m: int, *, inverse: bool = False
) -> Array:
    """Moves the groups in front of the dense columns, or back with `inverse`.

    With the groups first every group is m consecutive positions from a multiple of m,
    whatever the number of dense columns.
    """
    p = jnp.arange(order.shape[-1], dtype=jnp.int32)
    first, second = (dense, m * h) if inverse else (m * h, dense)
    q = jnp.where(p < first, p + second, p - first)
    return order[:, jnp.where(p < first + second, q, p)]


def serpentine(scores: Array, m: int) -> Array:
    """One input order for all rows: columns dealt to groups back and forth by strength.

    Args:
      scores: [o, i], non-negative.
      m: group size; divides i.

    Returns:
      i32[1, i], original column at each position; groups are m consecutive positions.

    Source: heuristic allocation of Zhang et al. 2024 (RIA, ICLR "Plug-and-Play").
    """
    rank = regions.ranked(masks.vectors(scores, scores.shape[0]))
    h = jnp.asarray(scores.shape[1] // m, jnp.int32)
    return regions.column_order(rank, jnp.zeros((), jnp.int32), h, m)
