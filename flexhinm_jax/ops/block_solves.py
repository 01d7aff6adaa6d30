"""The least-squares steps of a product diag(A) S diag(B): for A, for B, for S.

The objective is || (diag(A) S diag(B) - W) H^(1/2) ||^2, where H weighs the inputs: a
vector f32[i] of channel weights, or a Gram matrix f32[i, i]. It is quadratic in each
factor, so every step is a solve of block size; a small ridge towards the present factor
keeps it definite, and none of them can raise the objective.

ARMOR (arXiv:2510.05528) takes Adam steps on all three at once; exact steps need no
learning rate and about a tenth of the time.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_factor, cho_solve

from flexhinm_jax.ops import blocks
from flexhinm_jax.ops.blocks import einsum
from flexhinm_jax.ops.proxy import weigh

RIDGE = 1e-4  # towards the present factor, as a fraction of the mean of the diagonal


def _solve(normal: Array, cross: Array, now: Array) -> Array:
    """Solves (normal + ridge) x = cross + ridge now, batched over leading axes."""
    size = normal.shape[-1]
    mean = jnp.trace(normal, axis1=-2, axis2=-1)[..., None, None] / size
    ridge = jnp.where(mean > 0, RIDGE * mean, 1)
    eye = jnp.eye(size, dtype=normal.dtype)
    return cho_solve(cho_factor(normal + ridge * eye), cross + ridge * now)


def solve_left(a: Array, s: Array, b: Array, w: Array, h: Array) -> Array:
    """The best A for given S and B; block rows are independent.

    Args:
      a: f32[k, p, p], the present A.
      s: f32[o, i].
      b: f32[c, q, q].
      w: f32[o, i], the target.
      h: f32[i] or f32[i, i].

    Returns:
      f32[k, p, p]: the solution of A_k (T H T^T) = W_k H T^T with T = S_k diag(B).
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
    are fitted one by one: the result is the best B. A Gram matrix couples the blocks:
    each is solved in turn with the others fixed, one sweep.

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
        mine = lax.dynamic_slice_in_dim(pull, start, q, axis=1)
        # (U^T U) D H_jj = U^T pull_j for the change D of the block.
        cross = einsum("ox,oy->xy", u, mine)
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
    """f32[o, i]: F = A^T W H B^T, so that the normal equations of S are P S Q = F."""
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


def descend(
    s: Array, keep: Array, p: Array, q: Array, f: Array, steps: int
) -> tuple[Array, Array]:
    """Conjugate gradients for the values of S on a fixed support, every block alone.

    Preconditioned with the diagonal of the normal equations.

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

    def ratio(x, y):
        return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)

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
