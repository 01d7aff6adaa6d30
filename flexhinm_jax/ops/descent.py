"""Coordinate descent over the supports of groups of columns, on the Gram matrix.

For one group of m columns and all other columns fixed, the error of every row is an
exact quadratic, so the best of all its n:m patterns can be taken, with the weights of
the dense matrix or with the best weights for each pattern. Groups are visited in turn;
the error never rises. Rows are independent except where the mask is transposable.

Inside, matrices are `[i, r]`: a column of r weights is contiguous. The residual of the
normal equations is kept up to date lazily, as in `elimination`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flexhinm_jax.ops import masks
from flexhinm_jax.ops.gram import dot

MAX_PATTERNS = 70  # 4:8; with more patterns per group, single swaps are tried instead
BLOCK = 64  # columns between two updates of the whole residual

#: (weights f[m, r], kept bool[m, r], allowed bool[m, r], dense f[m, r],
#: residual f[m, r], gram f[m, m]) -> new weights and support of a group
Step = Callable[[Array, Array, Array, Array, Array, Array], tuple[Array, Array]]


class Fit(NamedTuple):
    """Rows on their way down, and the quadratic that they go down on.

    Attributes:
      b: f[r, i], weights now.
      keep: bool[r, i], their support.
      within: bool[r, i], what may be kept; contains `keep`.
      dense: f[r, i], the dense matrix.
      h: f[i, i], Gram.
      g: f[r, i], cross Gram.
    """

    b: Array
    keep: Array
    within: Array
    dense: Array
    h: Array
    g: Array


def patterns(n: int, m: int) -> np.ndarray:
    """bool[patterns, m]: every way to keep n of m."""
    table = np.zeros((math.comb(m, n), m), bool)
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        table[row, list(kept)] = True
    return table


def sweep(fit: Fit, live: Array, step: Step, unit: int) -> tuple[Array, Array]:
    """Visits every group of `unit` columns once.

    Args:
      fit: the rows.
      live: bool[i], columns whose group may change; constant inside a group.
      step: what happens to a group.
      unit: columns of a group, divides i.

    Returns:
      The new weights and their support.
    """
    b, keep, within, dense, h, g = fit
    columns = b.shape[1]
    block = unit * max(1, BLOCK // unit)
    pad = -columns % block
    rows = lambda x: jnp.pad(x.T, ((0, pad), (0, 0)))  # noqa: E731
    x, kept, allowed, dense = rows(b), rows(keep), rows(within), rows(dense)
    residual = rows(g - dot(b, h))
    h = jnp.pad(h, ((0, pad), (0, pad))) + jnp.diag(
        (jnp.arange(columns + pad) >= columns).astype(h.dtype)
    )
    live = jnp.pad(live, (0, pad))
    cut = lax.dynamic_slice_in_dim
    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)

    def one_unit(carry, start, offset, h_block):
        x, kept, residual = carry
        at = offset + start
        h_rows = cut(h_block, start, unit)
        old, old_kept = cut(x, at, unit), cut(kept, at, unit)
        new, new_kept = step(
            old,
            old_kept,
            cut(allowed, at, unit),
            cut(dense, at, unit),
            cut(residual, start, unit),
            cut(h_rows, start, unit, axis=1),
        )
        here = cut(live, at, unit)[:, None]
        new, new_kept = jnp.where(here, new, old), jnp.where(here, new_kept, old_kept)
        residual = residual - dot(h_rows.T, new - old)
        return (put(x, new, at), put(kept, new_kept, at), residual), None

    def one_block(carry, offset):
        x, kept, residual = carry
        before = cut(x, offset, block)
        h_rows = cut(h, offset, block)
        h_block = cut(h_rows, offset, block, axis=1)
        (x, kept, _), _ = lax.scan(
            lambda c, s: one_unit(c, s, offset, h_block),
            (x, kept, cut(residual, offset, block)),
            jnp.arange(0, block, unit, dtype=jnp.int32),
        )
        residual = residual - dot(h_rows.T, cut(x, offset, block) - before)
        return (x, kept, residual), None

    starts = jnp.arange(0, columns + pad, block, dtype=jnp.int32)
    (x, kept, _), _ = lax.scan(one_block, (x, kept, residual), starts)
    return x[:columns].T, kept[:columns].T


def best_pattern(n: int, m: int, solve: bool) -> Step:
    """Takes the best of all patterns of a group, exactly, for every row.

    Args:
      n: kept per group.
      m: group size; C(m, n) should be at most MAX_PATTERNS.
      solve: whether the weights of the group become the best for the pattern; else
        they are those of the dense matrix.
    """
    table = jnp.asarray(patterns(n, m))

    def step(b, keep, allowed, dense, residual, h):
        free = residual + dot(h, b)  # of the normal equations with the group at zero
        if solve:
            # H restricted to a pattern, identity elsewhere: inverted for all at once.
            pair = table[:, :, None] & table[:, None]
            eye = jnp.eye(m, dtype=h.dtype)
            inverse = jnp.linalg.inv(jnp.where(pair, h, eye)) * pair
            fresh = dot(inverse, free)
        else:
            fresh = jnp.where(table[..., None], dense, 0)
        image = jnp.moveaxis(dot(h, fresh), 0, 1)
        gain = jnp.sum(fresh * (free - image / 2), axis=1)
        now = jnp.all(table[..., None] == keep, axis=1)
        # A pattern must gain more than rounding to replace the present one.
        scale = jnp.max(jnp.abs(gain), axis=0)
        gain = jnp.where(now, gain + 1e-6 * scale, gain)
        barred = jnp.any(table[..., None] & ~allowed, axis=1)
        best = masks.first_max(jnp.where(barred, -jnp.inf, gain))
        chosen = jnp.arange(len(table), dtype=jnp.int32)[:, None] == best
        new = jnp.sum(jnp.where(chosen[:, None], fresh, 0), axis=0)
        return new, jnp.any(chosen[:, None] & table[..., None], axis=0)

    return step


def _swaps(b, keep, allowed, dense, residual, h, solve):
    """Gain of removing q and adding p, weight that p gets, f[q, p, r]; loss of q."""
    pull = residual[None] + h[..., None] * b[:, None]  # on p after q is gone
    diagonal = jnp.diag(h)[:, None]
    enter = pull / diagonal if solve else jnp.broadcast_to(dense, pull.shape)
    lost = residual * b + diagonal * jnp.square(b) / 2
    gain = enter * pull - diagonal * jnp.square(enter) / 2 - lost[:, None]
    legal = keep[:, None] & (allowed & ~keep)[None]
    return jnp.where(legal, gain, -jnp.inf), enter, lost


def best_swap(solve: bool) -> Step:
    """Swaps the best kept weight of a group for a removed one, in every row."""

    def step(b, keep, allowed, dense, residual, h):
        m, r = b.shape
        gain, enter, lost = _swaps(b, keep, allowed, dense, residual, h, solve)
        # A swap must gain more than rounding.
        entering = jnp.diag(h)[:, None] * jnp.square(enter)
        floor = 1e-6 * (jnp.abs(lost)[:, None] + entering)
        flat = jnp.where(gain > floor, gain, -jnp.inf).reshape(m * m, r)
        best = masks.first_max(flat)
        hit = (jnp.arange(m * m, dtype=jnp.int32)[:, None] == best).reshape(m, m, r)
        hit &= flat.reshape(m, m, r) > 0
        into = jnp.any(hit, axis=0)
        new = jnp.where(jnp.any(hit, axis=1), 0, b)
        new = jnp.where(into, jnp.sum(jnp.where(hit, enter, 0), axis=0), new)
        return new, (keep & ~jnp.any(hit, axis=1)) | into

    return step


def swap_rows(fit: Fit, *, solve: bool) -> tuple[Array, Array]:
    """Swaps every kept weight for the best removed one of its row, in turn.

    The swaps of SparseSwaps (arXiv:2512.10922): with the residual r = g - b h of the
    normal equations, removing q and adding p with weight u lowers || X (W - W') ||^2
    by twice gain(p) - lost(q), where

        lost(q) = r_q b_q + h_qq b_q^2 / 2
        gain(p) = u (r_p + h_pq b_q) - h_pp u^2 / 2

    The paper takes the one best pair of a row and looks at all pairs again; here every
    kept weight takes its best partner when its turn comes, so that one look at all
    pairs makes many swaps. A pass without a swap means the same for both: no pair of
    any row gains.

    Args:
      fit: the rows.
      solve: whether a weight that enters gets its best value; else its dense one.

    Returns:
      The new weights and their support.
    """
    b, keep, within, dense, h, g = fit
    diagonal = jnp.diag(h)[:, None]
    row = jnp.arange(b.shape[0], dtype=jnp.int32)

    def one(carry, q):
        x, kept, residual = carry
        old = x[q]
        pull = residual + h[q][:, None] * old  # on every other column once q is gone
        enter = pull / diagonal if solve else dense.T
        gain = enter * pull - diagonal * jnp.square(enter) / 2
        gain = jnp.where(allowed & ~kept, gain, -jnp.inf)
        p = jnp.argmax(gain, axis=0)
        lost = residual[q] * old + h[q, q] * jnp.square(old) / 2
        fresh = enter[p, row]
        # A swap must gain more than rounding.
        floor = 1e-6 * (jnp.abs(lost) + h[p, p] * jnp.square(fresh))
        moves = kept[q] & (gain[p, row] - lost > floor)
        out = jnp.where(moves, old, 0)
        into = jnp.where(moves, fresh, 0)
        residual = residual + h[q][:, None] * out - h[:, p] * into
        x = x.at[q].add(-out).at[p, row].add(into)
        kept = kept.at[q].set(kept[q] & ~moves).at[p, row].max(moves)
        return (x, kept, residual), None

    allowed = within.T
    start = b.T, keep.T, (g - dot(b, h)).T
    columns = jnp.arange(b.shape[1], dtype=jnp.int32)
    (x, kept, _), _ = lax.scan(one, start, columns)
    return x.T, kept.T


def best_cycle(m: int, solve: bool) -> Step:
    """Exchanges two weights of two rows of every m x m tile, keeping all sums.

    One row trades column q for p, another p for q, whichever pair gains most in sum.
    """

    def step(b, keep, allowed, dense, residual, h):
        r = b.shape[1]
        gain, enter, lost = _swaps(b, keep, allowed, dense, residual, h, solve)
        tiles = gain.reshape(m, m, r // m, m)
        top = jnp.max(tiles, axis=-1)
        both = (top + jnp.swapaxes(top, 0, 1)).reshape(m * m, -1)
        noise = 1e-6 * jnp.max(jnp.abs(lost).reshape(m, r // m, m), axis=(0, 2))
        best = masks.first_max(both)
        pair = jnp.arange(m * m, dtype=jnp.int32)[:, None] == best
        pair = (pair & (both > noise)).reshape(m, m, -1)
        row = jnp.argmax(tiles, axis=-1)[..., None] == jnp.arange(m)
        forth = pair[..., None] & row
        back = jnp.swapaxes(pair, 0, 1)[..., None] & row
        hit = (forth | back).reshape(m, m, r)
        out, into = jnp.any(hit, axis=1), jnp.any(hit, axis=0)
        new = jnp.where(into, jnp.sum(jnp.where(hit, enter, 0), axis=0), b)
        return jnp.where(out, 0, new), (keep & ~out) | into

    return step
