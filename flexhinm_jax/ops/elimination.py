"""One sweep of optimal brain surgery over the columns of a matrix.

Columns are fixed from left to right; the error of a removed weight is compensated by
the columns to its right, exactly, through the factor U of the inverse Gram. This is the
core of SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774) on arrays.

Inside, matrices are `[i, r]`: a column of r weights is contiguous. Updates are lazy in
two levels, so that nearly all work is in matrix products.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops.gram import dot
from flexhinm_jax.types import Regions

PRUNED, DENSE, CHOSEN = 0, 1, 2

#: (scores f[r, c], first column i32[]) -> bool[r, c]
Choose = Callable[[Array, Array], Array]


def column_order(regions: Regions) -> tuple[Array, Array]:
    """The order in which the columns of every tile are eliminated, and their kinds.

    Pruned columns first: everything can make up for them. Dense columns last. Some
    dense columns go between so that groups start at multiples of m.

    Args:
      regions: regions of a support; m divides the number of columns.

    Returns:
      order: i32[t, i], original column at each position.
      kind: i32[t, i], PRUNED, DENSE or CHOSEN (in a group) at each position.
    """
    columns = regions.in_order.shape[1]
    p = jnp.arange(columns, dtype=jnp.int32)
    dense = regions.dense_end[:, None]
    end = regions.nm_end[:, None]
    pruned = columns - end
    fill = -pruned % regions.m
    start = pruned + fill
    after = start + end - dense
    source = jnp.where(
        p < pruned,
        end + p,
        jnp.where(
            p < start,
            p - pruned,
            jnp.where(p < after, dense + p - start, p - after + fill),
        ),
    )
    kind = jnp.where(
        p < pruned, PRUNED, jnp.where((p >= start) & (p < after), CHOSEN, DENSE)
    )
    order = jnp.take_along_axis(regions.in_order, source, axis=1)
    return order, kind.astype(jnp.int32)


def sweep(
    w: Array, u: Array, choose: Choose, *, unit: int, block: int
) -> tuple[Array, Array, Array]:
    """Eliminates what `choose` removes, unit by unit, and compensates.

    Args:
      w: f[r, i], columns in the order of elimination.
      u: f[i, i], upper, H^-1 = U^T U in the same order.
      choose: sees the scores w^2 / U_jj^2 of the next `unit` columns after all
        compensation so far; columns beyond i have score inf.
      unit: columns chosen at once.
      block: columns between two updates of everything to the right, a multiple of
        `unit`.

    Returns:
      The new weight; bool[r, i], what stays; f[r], the squared error of every row.
    """
    r, columns = w.shape
    pad = -columns % block
    x = jnp.pad(w.T, ((0, pad), (0, 0)))
    u = jnp.pad(u, ((0, pad), (0, pad)))
    p = jnp.arange(columns + pad, dtype=jnp.int32)
    u = u + jnp.diag((p >= columns).astype(u.dtype))
    real = p < columns

    def one_unit(carry, start, u_block, offset):
        x, keep, e = carry
        part = lax.dynamic_slice_in_dim(x, start, unit)
        u_rows = lax.dynamic_slice_in_dim(u_block, start, unit)
        u_unit = lax.dynamic_slice_in_dim(u_rows, start, unit, axis=1)
        live = lax.dynamic_slice_in_dim(real, offset + start, unit)[:, None]
        scores = jnp.square(part / jnp.diag(u_unit)[:, None])
        scores = jnp.where(live, scores, jnp.inf)
        chosen = choose(scores.T, offset + start).T
        part, error = eliminate(part, u_unit, chosen)
        x = x - dot(u_rows.T, error)
        update = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
        x = update(x, part, start_index=start)
        return (
            x,
            update(keep, chosen, start_index=start),
            update(e, error, start_index=start),
        ), None

    def one_block(carry, start):
        x, loss = carry
        part = lax.dynamic_slice_in_dim(x, start, block)
        u_rows = lax.dynamic_slice_in_dim(u, start, block)
        u_block = lax.dynamic_slice_in_dim(u_rows, start, block, axis=1)
        state = (part, jnp.zeros(part.shape, bool), jnp.zeros_like(part))
        (part, keep, e), _ = lax.scan(
            lambda c, s: one_unit(c, s, u_block, start),
            state,
            jnp.arange(0, block, unit, dtype=jnp.int32),
        )
        x = x - dot(u_rows.T, e)
        x = lax.dynamic_update_slice_in_dim(x, part, start, axis=0)
        return (x, loss + jnp.sum(jnp.square(e), axis=0)), keep

    starts = jnp.arange(0, columns + pad, block, dtype=jnp.int32)
    (x, loss), keep = lax.scan(one_block, (x, jnp.zeros((r,), w.dtype)), starts)
    keep = keep.reshape(-1, r)[:columns].T
    return jnp.where(keep, x[:columns].T, 0), keep, loss


def eliminate(x: Array, u: Array, keep: Array) -> tuple[Array, Array]:
    """Fixes c columns in turn for a given support.

    Args:
      x: f[c, r].
      u: f[c, c], upper.
      keep: bool[c, r].

    Returns:
      x with the removed weights zero and the error pushed to later columns, and the
      scaled errors f[c, r] that the columns after these still have to take.
    """

    def one(j, carry):
        x, errors = carry
        here = functools.partial(lax.dynamic_index_in_dim, index=j, keepdims=False)
        row = here(u)
        error = jnp.where(here(keep), 0, here(x) / row[j])
        # Row j of u is zero before j, and takes a removed weight to zero at j.
        x = x - row[:, None] * error
        return x, lax.dynamic_update_index_in_dim(errors, error, j, 0)

    # A loop of outer products: written out, XLA computes every column again from the
    # first one on.
    x, errors = lax.fori_loop(0, x.shape[0], one, (x, jnp.zeros_like(x)))
    return jnp.where(keep, x, 0), errors
