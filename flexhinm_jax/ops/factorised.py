"""Fits diag(A) S diag(B) with a sparse core S to a matrix, by alternating exact steps.

One step: A, B, then the values of S by conjugate gradients, then the groups of S. None
of them can raise the objective (`block_solves`, `group_updates`). Alternating steps
creep along a valley, so each starts a little ahead in the direction of the last one,
which halves their number; a step that does not lower the objective is not taken and the
next starts without that push. So the losses fall monotonically from that of the start,
which has A = B = I.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from flexhinm_jax.ops import block_solves, blocks, group_updates, proxy

PUSH, GROWTH, FALL, MOST = 0.3, 1.1, 0.5, 0.9  # of the last step, and how it changes


class Factors(NamedTuple):
    """A factorised matrix.

    Attributes:
      a: f32[k, p, p], blocks on the outputs.
      s: f32[o, i], the core, zero outside `keep`.
      b: f32[c, q, q], blocks on the inputs.
      keep: bool[o, i].
    """

    a: Array
    s: Array
    b: Array
    keep: Array


class Groups(NamedTuple):
    """How the core may be re-chosen.

    Attributes:
      n: kept per group.
      m: group size, consecutive inputs; with channel weights it divides the blocks.
      picks: groups re-chosen per row, block and step; 0 keeps the support.
    """

    n: int
    m: int
    picks: int


def start(s: Array, keep: Array, block: tuple[int, int]) -> Factors:
    """The core alone, with identity factors of the given block sizes."""
    o, i = s.shape
    return Factors(blocks.identity(o, block[0]), s, blocks.identity(i, block[1]), keep)


def product(x: Factors) -> Array:
    """f32[o, i]: diag(A) S diag(B)."""
    return blocks.right(blocks.left(x.a, x.s), x.b)


def fit(
    first: Factors, w: Array, h: Array, groups: Groups, *, steps: int, values: int
) -> tuple[Factors, Array]:
    """Alternating exact steps from a start.

    Args:
      first: the start.
      w: f32[o, i], the target.
      h: f32[i], channel weights, or f32[i, i], a Gram matrix.
      groups: how the support may change.
      steps: number of steps.
      values: conjugate-gradient steps on the values per step.

    Returns:
      The best factors and the losses f32[steps + 1], relative to the zero matrix; they
      never rise.
    """

    def once(carry, _):
        now, past, lost, push = carry
        a, s, b = (x + push * (x - y) for x, y in zip(now[:3], past[:3], strict=True))
        ahead = Factors(a, jnp.where(now.keep, s, 0), b, now.keep)
        after = improve(ahead, w, h, groups, values)
        fresh = proxy.loss(product(after), w, h)
        better = fresh <= lost  # False for NaN
        take = lambda x, y: jnp.where(better, x, y)  # noqa: E731
        push = take(jnp.minimum(push * GROWTH, MOST), push * FALL)
        lost = take(fresh, lost)
        return (jax.tree.map(take, after, now), now, lost, push), lost

    before = proxy.loss(product(first), w, h)
    carry = first, first, before, jnp.asarray(PUSH, jnp.float32)
    (last, *_), trace = lax.scan(once, carry, length=steps)
    return last, jnp.concatenate([before[None], trace])


def improve(x: Factors, w: Array, h: Array, groups: Groups, values: int) -> Factors:
    """One step of `fit`."""
    a, s, b, keep = x
    a = block_solves.solve_left(a, s, b, w, h)
    b = block_solves.solve_right(a, s, b, w, h)
    p, q = block_solves.normal_left(a), block_solves.normal_right(b, h)
    cut = lambda x: blocks.cut(x, a.shape[1], q.shape[1])  # noqa: E731
    f, s, keep = cut(block_solves.pulled(a, b, w, h)), cut(s), cut(keep)
    s, gradient = block_solves.descend(s, keep, p, q, f, values)
    if groups.picks > 0:
        n, m, picks = groups
        s, keep = group_updates.sweep(s, keep, gradient, p, q, n=n, m=m, picks=picks)
    return Factors(a, blocks.join(s), b, blocks.join(keep))


def fit_adam(
    key: Array,
    first: Factors,
    w: Array,
    h: Array,
    groups: Groups,
    *,
    steps: int,
    rate: float,
) -> tuple[Factors, Array]:
    """The published loop: one Adam step on all factors, one group per block redrawn.

    It may raise the loss at any step; the best factors met are returned.

    Args:
      key: PRNG key, consumed.
      first: the start.
      w: f32[o, i], the target.
      h: f32[i] or f32[i, i].
      groups: `picks` = 0 keeps the support.
      steps: iterations.
      rate: learning rate.

    Returns:
      The best factors and the loss after every iteration f32[steps + 1], as it was.
    """
    tx = optax.adam(rate)

    def lost(moved, keep):
        a, s, b = moved
        approximation = product(Factors(a, jnp.where(keep, s, 0), b, keep))
        return proxy.loss(approximation, w, h)

    def once(carry, key):
        moved, keep, moments, best, least = carry
        slope = jax.grad(lost)(moved, keep)
        step, moments = tx.update(slope, moments, moved)
        fresh: Any = optax.apply_updates(moved, step)
        a, s, b = fresh
        if groups.picks > 0:
            s, keep = redraw(key, Factors(a, jnp.where(keep, s, 0), b, keep))
        now = lost((a, s, b), keep)
        found = Factors(a, jnp.where(keep, s, 0), b, keep)
        best = jax.tree.map(lambda x, y: jnp.where(now < least, x, y), found, best)
        return ((a, s, b), keep, moments, best, jnp.minimum(now, least)), now

    def redraw(key, x):
        p, q = block_solves.normal_left(x.a), block_solves.normal_right(x.b, h)
        cut = lambda y: blocks.cut(y, x.a.shape[1], q.shape[1])  # noqa: E731
        s = cut(x.s)
        gradient = block_solves.image(s, p, q)
        gradient = gradient - cut(block_solves.pulled(x.a, x.b, w, h))
        s, keep = group_updates.drawn(
            key, s, cut(x.keep), gradient, p, q, groups.n, groups.m
        )
        return blocks.join(s), blocks.join(keep)

    moved = first.a, first.s, first.b
    before = lost(moved, first.keep)
    carry = moved, first.keep, tx.init(moved), first, before
    carry, trace = lax.scan(once, carry, jax.random.split(key, steps))
    return carry[3], jnp.concatenate([before[None], trace])
