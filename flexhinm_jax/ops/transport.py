"""Transposable N:M masks: n of every m along both axes of m x m tiles.

For every tile A of non-negative scores the best such mask solves a transportation
problem with capacities, max <S, A> with row and column sums n and 0 <= S <= 1. TSENOR
solves its entropic relaxation by Dykstra projections and rounds the plan. Three
departures, each measured in `bench/oneshot.py`:

- the potentials start from thresholds instead of zero and the temperature may be
  annealed, so that tens of sweeps suffice on every input we know;
- rounding always ends with exact sums (the paper's last swaps need a gain and may leave
  a row short), and exchanges along 4-cycles then remove most of the remaining loss;
- m <= 4 is solved exactly by enumeration.

Inside, tiles are `[m, m, B]`: the tile index last, so that every step is elementwise
over a batch that fills the vector units. Scores are divided by the mean of their tile;
U, V and the certificate are in those units, and the result does not depend on scale.

Source: TSENOR (Meng et al. 2025, arXiv:2505.23949); dual form and safeguards are ours.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flexhinm_jax.ops import masks

ENUMERATED = 4  # up to this m every mask is tried
RENEW = 10  # sweeps before the scaling vectors are absorbed into the potentials
CLIP = 60.0  # exponents stay in [-CLIP, CLIP]: products of three fit float32
UNROLLED = 16  # up to this m sums along an axis are written out

Stages = tuple[tuple[float, int], ...]
#: (k, sweeps): temperature mean(A) / k.
ACCURATE: Stages = ((10.0, 20), (20.0, 30), (40.0, 50))


class Solution(NamedTuple):
    """Masks of a batch of tiles, with a proof of how good they are.

    Attributes:
      keep: bool[B, m, m], exactly n True in every row and column.
      bound: f32[B], an upper bound on the score of any such mask, in units of the
        given scores; None unless it was asked for.
    """

    keep: Array
    bound: Array | None


def tiles(scores: Array, m: int) -> Array:
    """Cuts `[o, i]` into true m x m tiles, `[o / m * i / m, m, m]`, row-major."""
    o, i = scores.shape
    blocks = scores.reshape(o // m, m, i // m, m)
    return blocks.transpose(0, 2, 1, 3).reshape(-1, m, m)


def untile(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Puts the tiles of `tiles` back into a matrix of the given shape."""
    o, i = shape
    m = blocks.shape[-1]
    grid = blocks.reshape(o // m, i // m, m, m)
    return grid.transpose(0, 2, 1, 3).reshape(o, i)


def solve(
    a: Array,
    *,
    n: int,
    stages: Stages = ACCURATE,
    exchanges: int = 8,
    certify: bool = False,
    chunk: int | None = None,
) -> Solution:
    """The best masks with n True in every row and column of every tile.

    Args:
      a: [B, m, m] scores, non-negative and finite.
      n: kept per row and column, 1 <= n < m.
      stages: (k, sweeps) of the entropic solver; the temperature is mean(a) / k.
      exchanges: steps of the local search after rounding; each tile stops by itself
        when no exchange gains.
      certify: also return the dual bound.
      chunk: tiles solved at once; the default keeps about 128 KiB per array on a CPU
        and 16 MiB elsewhere.

    Returns:
      The solution; equal scores are decided by position, lowest index first.
    """
    count, m, _ = a.shape
    if chunk is None:
        entries = 1 << (15 if jax.default_backend() == "cpu" else 22)
        chunk = max(1, min(entries // (m * m), 1 << 20))
    chunk = min(chunk, count)
    pad = -count % chunk
    lanes = jnp.pad(a.astype(jnp.float32), ((0, pad), (0, 0), (0, 0)))
    lanes = lanes.reshape(-1, chunk, m, m)

    def one(part):
        keep, bound = _solve_lanes(
            jnp.moveaxis(part, 0, -1), n, stages, exchanges, certify
        )
        return jnp.moveaxis(keep, -1, 0), bound

    keep, bound = lax.map(one, lanes)
    keep = keep.reshape(-1, m, m)[:count]
    return Solution(keep, bound.reshape(-1)[:count] if certify else None)


def _solve_lanes(
    a: Array, n: int, stages: Stages, exchanges: int, certify: bool
) -> tuple[Array, Array]:
    """`solve` for one chunk `[m, m, B]`."""
    m = a.shape[0]
    mean = jnp.mean(a, axis=(0, 1))
    unit = jnp.where(mean > 0, mean, 1.0)
    a = a / unit
    if m > ENUMERATED or certify:
        u, v = potentials(a, n, stages)
        bound = upper_bound(a, u, v, n) * unit
    else:
        bound = jnp.zeros_like(unit)
    if m <= ENUMERATED:
        return enumerate_masks(a, n), bound
    keep = greedy(a - u[:, None] - v[None], n)
    keep = repair(a, keep, n)
    return exchange(a, keep, exchanges), bound


@functools.cache
def mask_table(n: int, m: int) -> np.ndarray:
    """bool[masks, m, m]: every mask with row and column sums n; 90 for 2:4."""
    rows = [r for r in itertools.product((False, True), repeat=m) if sum(r) == n]
    grids = np.array(list(itertools.product(rows, repeat=m)))
    return grids[(grids.sum(1) == n).all(-1)]


def enumerate_masks(a: Array, n: int) -> Array:
    """The exact optimum of small tiles by trying every mask.

    Args:
      a: [m, m, B], m small.
      n: kept per row and column.

    Returns:
      bool[m, m, B]; of equally good masks the first of `mask_table`.
    """
    m = a.shape[0]
    table = jnp.asarray(mask_table(n, m))
    flat = table.reshape(-1, m * m)
    sums = jnp.dot(
        flat.astype(jnp.float32), a.reshape(m * m, -1), precision=lax.Precision.HIGHEST
    )
    best = masks.first_max(sums)
    return jnp.moveaxis(table[best], 0, -1)


def _total(parts: list[Array]) -> Array:
    """Sum of a list of slices, small lists written out."""
    if len(parts) <= UNROLLED:
        return functools.reduce(jnp.add, parts)
    return jnp.sum(jnp.stack(parts), axis=0)


def _each(m: int, body: Callable[[Any, Array], Array], start: Array) -> Array:
    """body(j, carry) for j in range(m), written out for small m."""
    if m > UNROLLED:
        return lax.fori_loop(0, m, body, start)
    return functools.reduce(lambda carry, j: body(j, carry), range(m), start)


def thresholds(a: Array, n: int) -> tuple[Array, Array]:
    """Potentials U f32[m, B] of rows and V f32[m, B] of columns to start from.

    V_j lies between the n-th and the next largest entry of column j, U_i between those
    of row i of A - V: every row starts with n entries worth keeping.
    """

    def middle(x, axis):
        rank = _ahead(x, axis)  # a sort of short lines is ten times slower on a CPU
        high = jnp.max(jnp.where(rank == n - 1, x, -jnp.inf), axis=axis)
        low = jnp.max(jnp.where(rank == n, x, -jnp.inf), axis=axis)
        return (high + low) / 2

    v = middle(a, 0)
    return middle(a - v[None], 1), v


def potentials(a: Array, n: int, stages: Stages) -> tuple[Array, Array]:
    """Dual potentials of the entropic problem by Dykstra's projections.

    One sweep scales the rows of S = min(exp(k (A - U - V)), 1) to n, then the columns.
    The only state are the potentials. Exponentials are taken once in RENEW sweeps: in
    between, the sweep runs on scaling vectors, three multiplications per entry.

    Args:
      a: [m, m, B], scaled to mean 1.
      n: kept per row and column.
      stages: (k, sweeps), in this order.

    Returns:
      U f32[m, B] of rows and V f32[m, B] of columns.
    """
    m, _, lanes = a.shape

    def sweep(_, scale, kernel):
        row, column = scale
        s = jnp.minimum(kernel * row[:, None] * column[None], 1.0)
        to_n = n / _total([s[:, j] for j in range(m)])
        sums = _total([s[i] * to_n[i] for i in range(m)])
        return row * to_n, column * (n / sums)

    def renew(duals, plan):
        (u, v), (k, count) = duals, plan
        logs = k * (a - u[:, None] - v[None])
        kernel = jnp.exp(jnp.clip(logs, -CLIP, CLIP))
        one = jnp.ones((m, lanes), jnp.float32)
        row, column = lax.fori_loop(
            jnp.zeros((), jnp.int32),
            count,
            functools.partial(sweep, kernel=kernel),
            (one, one),
        )
        return (u - jnp.log(row) / k, v - jnp.log(column) / k), None

    plan = [
        (k, min(RENEW, count - done))
        for k, count in stages
        for done in range(0, count, RENEW)
    ]
    ks = jnp.array([k for k, _ in plan], jnp.float32)
    counts = jnp.array([c for _, c in plan], jnp.int32)
    return lax.scan(renew, thresholds(a, n), (ks, counts))[0]


def upper_bound(a: Array, u: Array, v: Array, n: int) -> Array:
    """f32[B]: no mask scores more, whatever U and V are (weak duality).

    N (sum U + sum V) + sum max(0, A - U - V), for a [m, m, B].
    """
    slack = jnp.maximum(a - u[:, None] - v[None], 0)
    return n * (jnp.sum(u, 0) + jnp.sum(v, 0)) + jnp.sum(slack, (0, 1))


def soft(a: Array, *, n: int, k: float | Array = 20.0, sweeps: int = 50) -> Array:
    """The entropic plan itself: a relaxed mask, differentiable in the scores.

    The plain log-domain form, whose derivatives are finite at every temperature.

    Args:
      a: [B, m, m] scores, non-negative.
      n: row and column sum.
      k: mean(a) / temperature; larger is harder.
      sweeps: Dykstra sweeps, unrolled by differentiation.

    Returns:
      f32[B, m, m] in [0, 1]; the column sums are n up to the cap, the row sums in the
      limit of many sweeps.
    """
    a = jnp.moveaxis(a.astype(jnp.float32), 0, -1)
    mean = lax.stop_gradient(jnp.mean(a, axis=(0, 1)))
    a = a / jnp.where(mean > 0, mean, 1.0)
    start = jax.tree.map(lambda x: k * x, lax.stop_gradient(thresholds(a, n)))

    def sweep(duals, _):
        u, v = duals
        logs = jnp.minimum(k * a - u[:, None] - v[None], 0)
        r = jax.nn.logsumexp(logs, axis=1) - jnp.log(jnp.float32(n))
        c = jax.nn.logsumexp(logs - r[:, None], axis=0) - jnp.log(jnp.float32(n))
        return (u + r, v + c), None

    (u, v), _ = lax.scan(sweep, start, length=sweeps)
    plan = jnp.exp(jnp.minimum(k * a - u[:, None] - v[None], 0))
    return jnp.moveaxis(plan, -1, 0)


def _ahead(p: Array, axis: int) -> Array:
    """i32[m, m, B]: entries of the same line that come before, ties by index."""
    m = p.shape[axis]
    shape = [1, 1, 1]
    shape[axis] = m
    index = jnp.arange(m, dtype=jnp.int32).reshape(shape)

    def add(other, count):
        q = lax.dynamic_slice_in_dim(p, other, 1, axis=axis)
        return count + ((q > p) | ((q == p) & (other < index))).astype(jnp.int32)

    return _each(m, add, jnp.zeros(p.shape, jnp.int32))


def greedy(p: Array, n: int) -> Array:
    """Takes entries in descending order while their row and column have room.

    Runs in rounds without a sort: an entry among the first r candidates of a row with
    room for r, and likewise in its column, is taken by the sequential rule whatever
    happens elsewhere. The largest candidate always is, so rounds end.

    Args:
      p: [m, m, B] priorities, finite.
      n: capacity of every row and column.

    Returns:
      bool[m, m, B], at most n True per row and column, and no entry can be added.
    """

    def room(keep):
        row = n - jnp.sum(keep, axis=1, dtype=jnp.int32)
        column = n - jnp.sum(keep, axis=0, dtype=jnp.int32)
        free = ~keep & (row > 0)[:, None] & (column > 0)[None]
        return row, column, free

    def step(carry):
        keep, row, column, free = carry
        q = jnp.where(free, p, -jnp.inf)
        sure = (_ahead(q, 1) < row[:, None]) & (_ahead(q, 0) < column[None])
        keep |= free & sure
        return keep, *room(keep)

    keep = jnp.zeros(p.shape, bool)
    return lax.while_loop(lambda c: jnp.any(c[3]), step, (keep, *room(keep)))[0]


def _pick(mask: Array) -> Array:
    """Only the first True along axis 0 of mask [c, B]."""
    index = jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None]
    first = jnp.min(jnp.where(mask, index, mask.shape[0]), axis=0)
    return index == first


def _line(x: Array, at: Array, axis: int) -> Array:
    """f32[m, B]: the row (axis 0) or column (axis 1) of x marked in at [m, B]."""
    return jnp.sum(jnp.where(jnp.expand_dims(at, 1 - axis), x, 0), axis=axis)


def _best(gain: Array) -> tuple[Array, Array]:
    """(value f32[B], bool[m, m, B]) of the first largest entry of gain [m, m, B]."""
    flat = gain.reshape(-1, gain.shape[-1])
    top = jnp.max(flat, axis=0)
    return top, _pick(flat == top).reshape(gain.shape)


def repair(a: Array, keep: Array, n: int) -> Array:
    """Fills rows and columns that are short until all sums are n.

    One step adds a weight to a short row i and a short column j: directly when (i, j)
    is free, else (i, j') and (i', j) replace (i', j'), at the best score. A legal pair
    always exists after a maximal start.

    Args:
      a: [m, m, B] scores.
      keep: bool[m, m, B], sums at most n.
      n: row and column sum to reach.

    Returns:
      bool[m, m, B] with all sums n.
    """

    def short(keep):
        row = jnp.sum(keep, axis=1, dtype=jnp.int32) < n
        return row, jnp.sum(keep, axis=0, dtype=jnp.int32) < n

    def step(carry):
        keep, row, column, count = carry
        i, j = _pick(row), _pick(column)
        here = i[:, None] & j[None]
        direct = jnp.any(here & ~keep, axis=(0, 1))
        a_i, keep_i = _line(a, i, 0), jnp.any(keep & i[:, None], axis=0)
        a_j, keep_j = _line(a, j, 1), jnp.any(keep & j[None], axis=1)
        legal = keep & ~keep_i[None] & ~keep_j[:, None] & jnp.any(row, axis=0)
        gain = jnp.where(legal, a_i[None] + a_j[:, None] - a, -jnp.inf)
        _, out = _best(gain)
        out &= legal & ~direct
        into = (i[:, None] & jnp.any(out, 0)[None]) | (
            jnp.any(out, 1)[:, None] & j[None]
        )
        keep = (keep & ~out) | into | (here & direct)
        return keep, *short(keep), count + 1

    def unfinished(carry):
        return jnp.any(carry[1]) & (carry[3] < 2 * a.shape[0] * n)

    start = (keep, *short(keep), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, step, start)[0]


def exchange(a: Array, keep: Array, steps: int) -> Array:
    """Best 4-cycle exchanges: two rows swap a kept and a removed column each.

    Every step takes the best pair of rows of every tile; sums never change and the
    score never falls.

    Args:
      a: [m, m, B] scores with mean 1.
      keep: bool[m, m, B] with equal row and column sums.
      steps: at most so many exchanges per tile.

    Returns:
      bool[m, m, B].
    """
    m = a.shape[0]

    def best_pair(keep):
        # D[i, h] = max_j A[h, j] - A[i, j] over j kept in row i and free in row h.
        lose = jnp.where(keep, a, jnp.inf)
        win = jnp.where(keep, -jnp.inf, a)

        def through(j, d):
            here = lambda x: lax.dynamic_index_in_dim(x, j, 1, False)  # noqa: E731
            return jnp.maximum(d, here(win)[None] - here(lose)[:, None])

        d = _each(m, through, jnp.full(a.shape, -jnp.inf, jnp.float32))
        return lose, win, *_best(d + jnp.swapaxes(d, 0, 1))

    def step(carry):
        keep, lose, win, gain, pair, count = carry
        i, h = jnp.any(pair, axis=1), jnp.any(pair, axis=0)
        live = gain > 1e-6  # of the mean score: above the rounding of three terms
        lines = {
            name: (_row(lose, at), _row(win, at)) for name, at in (("i", i), ("h", h))
        }
        _, j = _best((lines["h"][1] - lines["i"][0])[None])
        _, k = _best((lines["i"][1] - lines["h"][0])[None])
        j, k = j[0] & live, k[0] & live
        out = (i[:, None] & j[None]) | (h[:, None] & k[None])
        into = (h[:, None] & j[None]) | (i[:, None] & k[None])
        keep = (keep & ~out) | into
        return keep, *best_pair(keep), count + 1

    def unfinished(carry):
        return jnp.any(carry[3] > 1e-6) & (carry[5] < steps)

    start = (keep, *best_pair(keep), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, step, start)[0]


def _row(x: Array, at: Array) -> Array:
    """[m, B]: the row of x marked in at [m, B]; x may hold infinities."""
    return jnp.max(jnp.where(at[:, None], x, -jnp.inf), axis=0)
