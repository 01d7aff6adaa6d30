"""Dense, N:M and pruned column regions of row tiles: counts, boundaries, orders.

A tile keeps a budget of k column-equivalents: D dense columns and h groups of m columns
of which n stay, with D + n * h = k exactly. The boundaries come from an exact scan over
every legal h instead of the early-stopping search of FlexHiNM-GP (ICLR 2026, openreview
YaZraqRsbB, section 3.2), because the retained saliency is not always unimodal in h.

Scores arrive as tiles `[t, v, i]`: t row tiles of v rows in storage order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops import masks
from flexhinm_jax.types import Regions, Support

FULL_SCAN = 128  # up to this many numbers of groups every one is evaluated
# The constants that FlexHiNM-GP does not state, see `walk_groups`.
WALK_ALPHA, WALK_BETA, WALK_GAMMA = 0.05, 0.01, 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of every tile are dense, in a group or pruned.

    Attributes:
      order: i32[t, i], original column at each position: first the dense ones, then the
        groups, then the pruned ones.
      dense: i32[], dense columns of every tile.
      h: i32[], groups of every tile.
      n: kept per group.
      m: group size.
    """

    order: Array
    dense: Array
    h: Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})

    def regions(self, out_order: Array) -> Regions:
        """The regions of a support with these columns, for rows in storage order."""
        dense_end = jnp.full(self.order.shape[:1], self.dense, jnp.int32)
        nm_end = dense_end + self.m * self.h
        return Regions(out_order, self.order, dense_end, nm_end, self.n, self.m)


class Steps(NamedTuple):
    """What counts of columns are legal.

    Attributes:
      groups: multiples of this number of groups.
      dense: multiples of this number of dense columns.
      regroup: whether dense columns may become groups.
      pruned: whether columns may be pruned.
    """

    groups: int = 1
    dense: int = 1
    regroup: bool = True
    pruned: bool = True


def budget(columns: int, sparsity: Array | float) -> Array:
    """Column-equivalents that stay: round(columns * (1 - sparsity)), as i32[]."""
    kept = columns * (1.0 - jnp.asarray(sparsity, jnp.float32))
    return jnp.clip(jnp.round(kept), 0, columns).astype(jnp.int32)


def most_groups(k: Array, columns: int, n: int, m: int) -> Array:
    """Largest number of N:M groups that a budget of k of `columns` allows.

    h groups use n * h of the budget and remove (m - n) * h columns.
    """
    return jnp.minimum(k // n, (columns - k) // (m - n)).astype(jnp.int32)


def deal(h: Array, m: int, size: int) -> Array:
    """Ranks dealt to groups back and forth, so that groups are equally strong.

    Group g gets the ranks g, 2h-1-g, 2h+g, 4h-1-g, ... of m * h ranked columns.

    Args:
      h: number of groups, may be traced.
      m: group size.
      size: length of the result, at least m * h.

    Returns:
      i32[size]: rank at position p. Positions from m * h on hold their own number, so
      the result is a permutation of arange(size).
    """
    p = jnp.arange(size, dtype=jnp.int32)
    g, slot = p // m, p % m
    rank = slot * h + jnp.where(slot % 2 == 0, g, h - 1 - g)
    return jnp.where(p < m * h, rank, p)


def ranked(vectors: Array) -> Array:
    """i32[t, i]: columns of every tile by descending vector score, ties by index."""
    return jnp.argsort(-vectors, axis=-1, stable=True).astype(jnp.int32)


def column_order(rank_order: Array, dense: Array, h: Array, m: int) -> Array:
    """Order of the columns of every tile: dense, dealt groups, pruned.

    Args:
      rank_order: i32[t, i] from `ranked`.
      dense: i32[], dense columns per tile.
      h: i32[], groups per tile.
      m: group size.

    Returns:
      i32[t, i], original column at each position.
    """
    columns = rank_order.shape[-1]
    p = jnp.arange(columns, dtype=jnp.int32)
    dealt = deal(h, m, columns)
    inside = (p >= dense) & (p < dense + m * h)
    rank = jnp.where(inside, dense + dealt[jnp.clip(p - dense, 0, columns - 1)], p)
    return rank_order[:, rank]


def group_scores(order: Array, start: Array, tiles: Array, m: int) -> Array:
    """Scores of the groups that follow position `start` of every tile.

    Args:
      order: i32[t, i], original column at each position.
      start: i32[t], first grouped position.
      tiles: [t, v, i] in original column order.
      m: group size.

    Returns:
      [t, v, i // m, m]; groups that run past the last column repeat it and are to be
      masked by the caller.
    """
    t, v, i = tiles.shape
    p = start[:, None] + jnp.arange(i // m * m, dtype=jnp.int32)
    index = masks.take(order, jnp.minimum(p, i - 1), axis=1)
    return masks.take(tiles, index[:, None], axis=2).reshape(t, v, -1, m)


def kept(
    tiles: Array, order: Array, dense_end: Array, nm_end: Array, n: int, m: int
) -> Array:
    """Support of the regions: dense columns whole, the n best of each group per row.

    Args:
      tiles: scores [t, v, i] in original column order.
      order: i32[t, i].
      dense_end: i32[t].
      nm_end: i32[t].
      n: kept per group.
      m: group size.

    Returns:
      bool[t, v, i] in original column order.
    """
    t, v, i = tiles.shape
    groups = group_scores(order, dense_end, tiles, m)
    chosen = (masks.group_ranks(groups) < n).reshape(t, v, -1)
    p = jnp.arange(i, dtype=jnp.int32)
    at = jnp.clip(p - dense_end[:, None], 0, chosen.shape[-1] - 1)
    chosen = masks.take(chosen, at[:, None], axis=2)
    in_nm = (p >= dense_end[:, None]) & (p < nm_end[:, None])
    keep = (p < dense_end[:, None])[:, None] | (in_nm[:, None] & chosen)
    return masks.take(keep, jnp.argsort(order, axis=1)[:, None], axis=2)


def value(tiles: Array, columns: Columns) -> Array:
    """Score that the regions retain, all tiles together.

    Args:
      tiles: scores [t, v, i], non-negative, in original column order.
      columns: dense, grouped and pruned ones.

    Returns:
      f32[].
    """
    order, dense, m = columns.order, columns.dense, columns.m
    t, _, i = tiles.shape
    tiles = tiles.astype(jnp.float32)
    column = masks.take(jnp.sum(tiles, axis=1), order, axis=1)
    in_dense = jnp.arange(i, dtype=jnp.int32) < dense
    groups = group_scores(order, jnp.full((t,), dense, jnp.int32), tiles, m)
    live = jnp.arange(i // m, dtype=jnp.int32) < columns.h
    best = jnp.sum(masks.top_n_sum(groups, n=columns.n), axis=1)
    return jnp.sum(jnp.where(in_dense, column, 0)) + jnp.sum(jnp.where(live, best, 0))


def boundary_curve(tiles: Array, k: Array, n: int, m: int) -> Callable[[Array], Array]:
    """The exact retained score as a function of the number of groups.

    The columns are ranked once; for each h the middle ranks are dealt into groups and
    the n best per row and group are summed. Groups are read as m contiguous slices of
    the ranked tiles, forwards and backwards in turn.

    Args:
      tiles: scores [t, v, i], non-negative.
      k: i32[], budget in column-equivalents.
      n: kept per group.
      m: group size.

    Returns:
      A function from a legal h, i32[], to f32[].
    """
    t, _, i = tiles.shape
    size = i // m
    order = ranked(jnp.sum(tiles, axis=1, dtype=jnp.float32))
    rows = masks.take(
        jnp.swapaxes(tiles, 1, 2).astype(jnp.float32), order[..., None], axis=1
    )
    dense_sums = jnp.cumsum(jnp.sum(rows, axis=(0, 2)))
    # Padding keeps every slice of static length `size` in range.
    forward = jnp.pad(rows, ((0, 0), (0, size), (0, 0)))
    backward = jnp.pad(rows[:, ::-1], ((0, 0), (0, size), (0, 0)))

    def retained(h):
        dense = k - n * h
        slots = []
        for j in range(m):
            start = dense + j * h
            flip = j % 2 == 1
            start = i - start - h if flip else start
            source = backward if flip else forward
            slots.append(lax.dynamic_slice_in_dim(source, start, size, axis=1))
        best = masks.top_n_sum(jnp.stack(slots), n=n, axis=0)
        live = jnp.arange(size, dtype=jnp.int32) < h
        total = jnp.sum(jnp.where(live[None, :, None], best, 0))
        return total + jnp.where(dense > 0, dense_sums[jnp.maximum(dense, 1) - 1], 0)

    return retained


@functools.partial(jax.jit, static_argnames=("n", "m", "step", "full"))
def scan_groups(
    tiles: Array, k: Array, n: int, m: int, step: int = 1, full: int = FULL_SCAN
) -> tuple[Array, Array]:
    """Retained score for every legal number of groups, evaluated exactly.

    Above `full` candidates the scan is coarse to fine: 64 evenly spaced numbers and the
    largest, then every number between the neighbours of the best. Each value is exact;
    a maximum narrower than the spacing may be missed.

    Args:
      tiles: scores [t, v, i], non-negative.
      k: i32[], budget in column-equivalents.
      n: kept per group.
      m: group size.
      step: only multiples of this number of groups are legal.
      full: scan everything up to this many candidates.

    Returns:
      h: i32[], the best number of groups, the smallest of equals.
      retained: f32[i // m + 1], retained score by h, -inf where not evaluated.
    """
    size = tiles.shape[-1] // m
    retained = boundary_curve(tiles, k, n, m)
    last = most_groups(k, tiles.shape[-1], n, m) // step

    def evaluate(j, curve):
        return curve.at[j * step].set(retained(j * step))

    curve = jnp.full((size + 1,), -jnp.inf, jnp.float32)
    if size // step <= full:
        curve = lax.fori_loop(0, last + 1, evaluate, curve)
        return jnp.argmax(curve).astype(jnp.int32), curve
    stride = -(-(size // step) // 64)
    coarse = lambda j, curve: evaluate(jnp.minimum(j * stride, last), curve)  # noqa: E731
    curve = lax.fori_loop(0, -(-last // stride) + 1, coarse, curve)
    best = jnp.argmax(curve).astype(jnp.int32) // step
    low, high = jnp.maximum(best - stride, 0), jnp.minimum(best + stride, last)
    curve = lax.fori_loop(low, high + 1, evaluate, curve)
    return jnp.argmax(curve).astype(jnp.int32), curve


@functools.partial(jax.jit, static_argnames=("n", "m", "step"))
def walk_groups(tiles: Array, k: Array, n: int, m: int, step: int = 1) -> Array:
    """The one-dimensional boundary search of FlexHiNM-GP, stopping at the first drop.

    The pruned fraction v starts at the sparsity (no groups) and falls by a step alpha;
    the N:M fraction of the rest is p = 2 (sparsity - v) / (1 - v) for 2:4. After each
    step alpha <- alpha - BETA v - GAMMA rms, with rms the running root mean square of
    the change of (v, p). The paper leaves alpha, BETA, GAMMA and the argument of the
    rms open; these are our choices, and alpha never falls below one group.

    Args:
      tiles: scores [t, v, i], non-negative.
      k: i32[], budget in column-equivalents.
      n: kept per group.
      m: group size.
      step: only multiples of this number of groups are legal.

    Returns:
      i32[], the last number of groups before the retained score fell.
    """
    i = tiles.shape[-1]
    retained = boundary_curve(tiles, k, n, m)
    last = most_groups(k, i, n, m) // step * step
    sparsity = 1 - k.astype(jnp.float32) / i
    least = jnp.float32(step * (m - n) / i)

    def groups(v):
        h = jnp.round((sparsity - v) * (i / (m - n) / step)).astype(jnp.int32) * step
        return jnp.clip(h, 0, last)

    def fraction(v):
        return 2 * (sparsity - v) / jnp.maximum(1 - v, 1 / i)

    def advance(state):
        v, alpha, square, h, best, _ = state
        new_v = v - jnp.maximum(alpha, least)
        new_h = groups(new_v)
        score = retained(new_h)
        change = jnp.square(new_v - v) + jnp.square(fraction(new_v) - fraction(v))
        square = 0.9 * square + 0.1 * change
        alpha -= WALK_BETA * new_v + WALK_GAMMA * jnp.sqrt(square)
        up = score >= best
        go = up & (new_h < last)
        h, best = jnp.where(up, new_h, h), jnp.where(up, score, best)
        return new_v, alpha, square, h, best, go

    zero = jnp.zeros((), jnp.int32)
    start = (
        sparsity,
        jnp.float32(WALK_ALPHA),
        jnp.zeros((), jnp.float32),
        zero,
        retained(zero),
        last > 0,
    )
    return lax.while_loop(lambda s: s[-1], advance, start)[3]


def absorb(tiles: Array, columns: Columns) -> Columns:
    """Merges n dense with m - n pruned columns into groups, as often as possible.

    A group that holds n dense columns can keep just these in every row, so the result
    retains at least what the given regions do, at the same sparsity. With the sparsity
    at least 1 - n / m no dense columns are left (fewer than n of them): this is why
    three regions cannot retain more than HiNM with the best input order.

    Args:
      tiles: scores [t, v, i] in original column order.
      columns: dense, grouped and pruned ones.

    Returns:
      The remaining dense columns, new groups (the weakest dense with the strongest
      pruned columns), old groups, pruned ones.
    """
    order, dense, h = columns.order, columns.dense, columns.h
    n, m = columns.n, columns.m
    i = order.shape[-1]
    p = jnp.arange(i, dtype=jnp.int32)
    column = masks.take(jnp.sum(tiles, axis=1), order, axis=1)
    pruned = i - dense - m * h
    new = jnp.minimum(dense // n, pruned // (m - n))
    # dense and pruned columns by score, the groups where they are
    section = jnp.where(p < dense, 0, jnp.where(p < dense + m * h, 1, 2))
    by_score = jnp.argsort(jnp.where(section == 1, 0, -column), axis=1, stable=True)
    by_section = jnp.argsort(section[by_score], axis=1, stable=True)
    order = masks.take(order, masks.take(by_score, by_section, axis=1), axis=1)
    left = dense - n * new
    group, slot = (p - left) // m, (p - left) % m
    source = jnp.where(
        slot < n,
        left + slot * new + group,
        dense + m * h + (slot - n) * new + group,
    )
    after = p - left - m * new  # old groups, then what stays pruned
    after = jnp.where(after < m * h, dense + after, p)
    source = jnp.where(p < left, p, jnp.where(p < left + m * new, source, after))
    return Columns(order[:, source], left, h + new, n, m)


def shrink(scores: Array, prev: Support, k: Array, steps: Steps) -> Support:
    """Smaller regions inside given ones: nothing that was removed comes back.

    Surviving groups keep their columns and their support, so masks that were hardened
    stay legal; whole groups are removed. Dense columns may stay, leave for new groups
    (dealt from the strongest that leave), or be removed. Every dense count that meets
    the budget is evaluated and the best is taken. This is our choice for the group
    survival that FlexHiNM-GP leaves open.

    Args:
      scores: [o, i], non-negative; larger stays.
      prev: the previous support; all of its tiles have equal boundaries.
      k: i32[], new budget in column-equivalents, at most the previous one and
        reachable: a multiple of n when there is no dense column.
      steps: the counts of columns that are legal.

    Returns:
      The support, nested in the previous one.
    """
    before = prev.regions
    assert before is not None
    t, i = before.in_order.shape
    n, m = before.n, before.m
    keep = tile(prev.keep, before.out_order, scores.shape[0] // t)
    tiles = tile(scores, before.out_order, scores.shape[0] // t)
    order, dense_end, nm_end = before.in_order, before.dense_end, before.nm_end
    size = i // m
    dense, old = dense_end[0], (nm_end[0] - dense_end[0]) // m
    tiles = jnp.where(keep, tiles, 0).astype(jnp.float32)
    p = jnp.arange(i, dtype=jnp.int32)
    # Dense columns by score; the rest of the order is untouched.
    column = masks.take(jnp.sum(tiles, axis=1), order, axis=1)
    by_score = ranked(jnp.where(p < dense, column, -1.0 - p))
    order = masks.take(order, by_score, axis=1)
    sums = jnp.cumsum(masks.take(column, by_score, axis=1), axis=1)
    old_groups = jnp.sum(group_scores(order, dense_end, tiles, m), axis=(1, 3))
    slot = jnp.arange(size, dtype=jnp.int32)
    old_groups = jnp.where(slot < old, old_groups, -1.0)

    def arrange(d):
        """Candidate order for d dense columns: (score, order, h, legal)."""
        h = (k - d) // n
        q = jnp.minimum((dense - d) // m, h) if steps.regroup else jnp.zeros_like(h)
        dealt = deal(q, m, i)
        moved = jnp.where(
            (p >= d) & (p < d + m * q), d + dealt[jnp.clip(p - d, 0, i - 1)], p
        )
        fresh_order = order[:, moved]
        start = jnp.full((t,), d, jnp.int32)
        fresh = group_scores(fresh_order, start, tiles, m)
        fresh = jnp.sum(masks.top_n_sum(fresh, n=n), axis=1)
        fresh = jnp.where(slot < q, fresh, -1.0)
        both = jnp.concatenate([fresh, old_groups], axis=1)
        rank = masks.ranks(both)
        total = jnp.sum(jnp.where((rank < h) & (both >= 0), both, 0))
        total += jnp.sum(jnp.where(d > 0, sums[:, jnp.maximum(d, 1) - 1], 0))
        legal = (d <= k) & ((k - d) % n == 0) & (h <= old + q)
        legal &= (d % steps.dense == 0) & (h % steps.groups == 0)
        if not steps.regroup:
            legal &= (d == k) | (dense == 0)
        if not steps.pruned:
            legal &= d + m * h == i
        return jnp.where(legal, total, -jnp.inf), fresh_order, rank, h, q

    def better(d, best):
        total = arrange(d)[0]
        return lax.cond(total > best[0], lambda: (total, d), lambda: best)

    first = (jnp.asarray(-jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))
    _, d = lax.fori_loop(jnp.zeros((), jnp.int32), dense + 1, better, first)
    _, fresh_order, rank, h, q = arrange(d)
    # Sort positions by section: dense, chosen groups by rank, everything else.
    in_fresh = (p >= d) & (p < d + m * q)
    in_old = (p >= dense) & (p < dense + m * old)
    group = jnp.where(in_fresh, (p - d) // m, size + (p - dense) // m)
    group_rank = masks.take(
        rank, jnp.broadcast_to(jnp.clip(group, 0, 2 * size - 1), (t, i)), axis=1
    )
    chosen = (in_fresh | in_old) & (group_rank < h)
    section = jnp.where(p < d, -1, jnp.where(chosen, group_rank, 2 * size))
    new_order = masks.take(
        fresh_order, jnp.argsort(section, axis=1, stable=True), axis=1
    )
    new = Columns(new_order, d, h, n, m).regions(before.out_order)
    fresh = kept(tiles, new.in_order, new.dense_end, new.nm_end, n, m) & keep
    return Support(masks.fold_tiles(fresh, before.out_order), new)


def natural_order(columns: int) -> Array:
    """i32[1, columns]: one tile in original column order."""
    return jnp.arange(columns, dtype=jnp.int32)[None]


def natural_groups(shape: tuple[int, ...], n: int, m: int) -> Regions:
    """The regions of one tile whose columns are all in groups, in natural order."""
    return Regions(
        out_order=jnp.arange(shape[0], dtype=jnp.int32),
        in_order=natural_order(shape[1]),
        dense_end=jnp.zeros((1,), jnp.int32),
        nm_end=jnp.full((1,), shape[1], jnp.int32),
        n=n,
        m=m,
    )


def tile(scores: Array, out_order: Array, vector_size: int) -> Array:
    """[t, v, i]: rows of `scores` [o, i] in storage order, cut into tiles."""
    return scores[out_order].reshape(-1, vector_size, scores.shape[-1])
