"""ARMOR's product diag(A) S diag(B) with a sparse core S, fitted by alternating steps.

The objective is

    L = || (diag(A) S diag(B) - W) H^(1/2) ||^2                                      (1)

where H weighs the inputs: a vector f32[i] of channel weights, or a Gram matrix
f32[i, i]. It is quadratic in each factor, so one step solves

    A_k (T H T^T) = W_k H T^T             with T = S_k diag(B), k a block of rows    (2)
    (U^T U) B_l = U^T W_l                 with U = diag(A) S_l, channel weights      (3)
    (U^T U) D H_ll = U^T (W - A S B) H    for the change D of B_l, a Gram matrix    (3')
    P S Q = F on the support              with P = A^T A, Q = B H B^T,
                                          F = A^T W H B^T, by conjugate gradients    (4)

and then chooses groups of S again (`core_groups`). A small ridge towards the present
factor keeps the solves definite, and none of them can raise the objective. ARMOR
(arXiv:2510.05528) takes Adam steps on all three at once, and its theorem 3.1 says the
same of gradient steps short enough; exact steps need no learning rate and about a tenth
of the time.

Alternating steps creep along a valley, so each starts a little ahead in the direction
of the last one, which halves their number; a step that does not lower the objective is
not taken and the next starts without that push. So the losses fall monotonically from
that of the start, which has A = B = I.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.scipy.linalg import cho_factor, cho_solve

from flexhinm_jax.ops import blocks, core_groups
from flexhinm_jax.ops.blocks import einsum
from flexhinm_jax.ops.gram import ratio

PUSH, GROWTH, FALL, MOST = 0.3, 1.1, 0.5, 0.9  # of the last step, and how it changes
RIDGE = 1e-4  # towards the present factor, as a fraction of the mean of the diagonal


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
        fresh = loss(product(after), w, h)
        better = fresh <= lost  # False for NaN
        take = lambda x, y: jnp.where(better, x, y)  # noqa: E731
        push = take(jnp.minimum(push * GROWTH, MOST), push * FALL)
        lost = take(fresh, lost)
        return (jax.tree.map(take, after, now), now, lost, push), lost

    before = loss(product(first), w, h)
    carry = first, first, before, jnp.asarray(PUSH, jnp.float32)
    (last, *_), trace = lax.scan(once, carry, length=steps)
    return last, jnp.concatenate([before[None], trace])


def improve(x: Factors, w: Array, h: Array, groups: Groups, values: int) -> Factors:
    """One step of `fit`."""
    a, s, b, keep = x
    a = solve_left(a, s, b, w, h)  # (2)
    b = solve_right(a, s, b, w, h)  # (3)
    p, q = normal_left(a), normal_right(b, h)
    cut = lambda x: blocks.cut(x, a.shape[1], q.shape[1])  # noqa: E731
    f, s, keep = cut(pulled(a, b, w, h)), cut(s), cut(keep)
    s, gradient = descend_values(s, keep, p, q, f, values)  # (4)
    if groups.picks > 0:
        n, m, picks = groups
        s, keep = core_groups.sweep(
            s, keep, gradient, p, q, n=n, m=m, picks=picks
        )  # (5)
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
        return loss(approximation, w, h)

    def once(carry, key):
        moved, keep, moments, best, least = carry
        slope = jax.grad(lost)(moved, keep)
        step, moments = tx.update(slope, moments, moved)
        fresh: Any = optax.apply_updates(moved, step)
        a, s, b = fresh
        if groups.picks > 0:
            s, keep = redraw(key, Factors(a, jnp.where(keep, s, 0), b, keep))
        now = lost((a, s, b), keep)
        factors = Factors(a, jnp.where(keep, s, 0), b, keep)
        best = jax.tree.map(lambda x, y: jnp.where(now < least, x, y), factors, best)
        return ((a, s, b), keep, moments, best, jnp.minimum(now, least)), now

    def redraw(key, x):
        p, q = normal_left(x.a), normal_right(x.b, h)
        cut = lambda y: blocks.cut(y, x.a.shape[1], q.shape[1])  # noqa: E731
        s = cut(x.s)
        gradient = image(s, p, q)
        gradient = gradient - cut(pulled(x.a, x.b, w, h))
        s, keep = core_groups.draw(
            key, s, cut(x.keep), gradient, p, q, groups.n, groups.m
        )
        return blocks.join(s), blocks.join(keep)

    moved = first.a, first.s, first.b
    before = lost(moved, first.keep)
    carry = moved, first.keep, tx.init(moved), first, before
    carry, trace = lax.scan(once, carry, jax.random.split(key, steps))
    return carry[3], jnp.concatenate([before[None], trace])


def weigh(x: Array, h: Array) -> Array:
    """Multiplies with the weighting of the inputs.

    Args:
      x: f32[o, i].
      h: f32[i], weights of the channels, or f32[i, i], a Gram matrix.

    Returns:
      f32[o, i], x diag(h) or x h.
    """
    if h.ndim == 1:
        return x * h
    return jnp.dot(x, h, precision=lax.Precision.HIGHEST)


def weighted_square(x: Array, h: Array) -> Array:
    """f32[]: || x h^(1/2) ||^2; see `weigh`."""
    return jnp.sum(weigh(x, h) * x)


def loss(approximation: Array, target: Array, h: Array) -> Array:
    """Squared distance relative to that of the zero matrix.

    Args:
      approximation: f32[o, i].
      target: f32[o, i].
      h: f32[i] or f32[i, i]; see `weigh`.

    Returns:
      f32[], 0 for the target itself, 1 for zeros; 0 when the target is zero.
    """
    total = weighted_square(target, h)
    lost = weighted_square(approximation - target, h)
    return jnp.where(total > 0, lost / jnp.where(total > 0, total, 1), 0)


def _solve(normal: Array, cross: Array, now: Array) -> Array:
    """Solves (normal + ridge) x = cross + ridge now, batched over leading axes."""
    size = normal.shape[-1]
    mean = jnp.trace(normal, axis1=-2, axis2=-1)[..., None, None] / size
    ridge = jnp.where(mean > 0, RIDGE * mean, 1)
    eye = jnp.eye(size, dtype=normal.dtype)
    return cho_solve(cho_factor(normal + ridge * eye), cross + ridge * now)


def solve_left(a: Array, s: Array, b: Array, w: Array, h: Array) -> Array:
    """The best A for given S and B, equation (2); block rows are independent.

    Args:
      a: f32[k, p, p], the present A.
      s: f32[o, i].
      b: f32[c, q, q].
      w: f32[o, i], the target.
      h: f32[i] or f32[i, i].

    Returns:
      f32[k, p, p].
    """
    k, p, _ = a.shape
    t = blocks.right(s, b)
    rows = lambda x: x.reshape(k, p, -1)  # noqa: E731
    heavy = rows(weigh(t, h))
    normal = einsum("kax,kbx->kab", heavy, rows(t))
    cross = einsum("kax,kbx->kab", heavy, rows(w))
    return blocks.transpose(_solve(normal, cross, blocks.transpose(a)))


def solve_right(a: Array, s: Array, b: Array, w: Array, h: Array) -> Array:
    """A better B for given A and S.

    With channel weights the blocks are independent and the weights drop out, as columns
    are fitted one by one, equation (3): the result is the best B. A Gram matrix couples
    the blocks: each is solved in turn with the others fixed, equation (3'), one sweep.

    Args:
      a: f32[k, p, p].
      s: f32[o, i].
      b: f32[c, q, q], the present B.
      w: f32[o, i], the target.
      h: f32[i] or f32[i, i].

    Returns:
      f32[c, q, q].
    """
    c, q, _ = b.shape
    u = jnp.swapaxes(blocks.left(a, s).reshape(-1, c, q), 0, 1)  # [c, o, q]
    normal = einsum("lox,loy->lxy", u, u)
    if h.ndim == 1:
        columns = jnp.swapaxes(w.reshape(-1, c, q), 0, 1)
        return _solve(normal, einsum("lox,loy->lxy", u, columns), b)

    def one(pull, part):
        """`pull` is (W - A S B) H, the error as the normal equations see it."""
        u, normal, now, here, inner, start = part
        own = lax.dynamic_slice_in_dim(pull, start, q, axis=1)
        # Equation (3'), solved from the left and then from the right.
        cross = einsum("ox,oy->xy", u, own)
        change = _solve(normal, cross, jnp.zeros_like(now))
        change = _solve(inner, change.T, jnp.zeros_like(now)).T
        return pull - blocks.einsum("ox,xy->oy", u, change @ here), now + change

    error = w - jnp.swapaxes(einsum("lox,lxy->loy", u, b), 0, 1).reshape(w.shape)
    starts = jnp.arange(0, c * q, q, dtype=jnp.int32)
    band = h.reshape(c, q, c * q)  # rows of H that belong to each block
    inner = jnp.stack([band[j, :, j * q : (j + 1) * q] for j in range(c)])
    parts = u, normal, b, band, inner, starts
    return lax.scan(one, weigh(error, h), parts)[1]


def normal_left(a: Array) -> Array:
    """f32[k, p, p]: P = A^T A."""
    return einsum("kba,kbc->kac", a, a)


def normal_right(b: Array, h: Array) -> Array:
    """Q = B H B^T.

    Args:
      b: f32[c, q, q].
      h: f32[i] or f32[i, i].

    Returns:
      f32[c, q, q] for channel weights, f32[1, i, i] for a Gram matrix.
    """
    if h.ndim == 1:
        c, q, _ = b.shape
        return einsum("lab,lcb->lac", b * h.reshape(c, 1, q), b)
    return blocks.left(b, blocks.right(h, blocks.transpose(b)))[None]


def pulled(a: Array, b: Array, w: Array, h: Array) -> Array:
    """f32[o, i]: F = A^T W H B^T of equation (4)."""
    heavy = blocks.right(weigh(w, h), blocks.transpose(b))
    return blocks.left(blocks.transpose(a), heavy)


def image(s: Array, p: Array, q: Array) -> Array:
    """P S Q, block by block.

    Args:
      s: f32[k, c, a, b].
      p: f32[k, a, a].
      q: f32[c, b, b].
    """
    return einsum("kxa,kcab->kcxb", p, einsum("kcab,cbd->kcad", s, q))


def descend_values(
    s: Array, keep: Array, p: Array, q: Array, f: Array, steps: int
) -> tuple[Array, Array]:
    """Conjugate gradients for the values of S, equation (4), every block alone.

    The support stays. Preconditioned with the diagonal of the normal equations.

    Args:
      s: f32[k, c, a, b], zero outside `keep`.
      keep: bool of that shape.
      p: f32[k, a, a].
      q: f32[c, b, b].
      f: f32[k, c, a, b].
      steps: products with P and Q.

    Returns:
      The new values, and P S Q - F, half the gradient, also outside the support.
    """
    scale = (
        jnp.diagonal(p, axis1=1, axis2=2)[:, None, :, None]
        * jnp.diagonal(q, axis1=1, axis2=2)[None, :, None, :]
    )
    inverse = jnp.where(keep & (scale > 0), 1 / jnp.where(scale > 0, scale, 1), 0)

    def total(x):
        return jnp.sum(x, axis=(2, 3), keepdims=True)

    def step(_, carry):
        s, gradient, direction, size = carry
        moved = image(direction, p, q)
        alpha = ratio(size, total(direction * moved))
        s, gradient = s + alpha * direction, gradient + alpha * moved
        z = -gradient * inverse
        fresh = total(-gradient * z)
        return s, gradient, z + ratio(fresh, size) * direction, fresh

    gradient = image(s, p, q) - f
    z = -gradient * inverse
    carry = s, gradient, z, total(-gradient * z)
    return lax.fori_loop(0, steps, step, carry)[:2]
