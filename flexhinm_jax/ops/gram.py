"""The layer-wise least-squares problem of one matrix, and factors of its Gram matrix.

A layer keeps its outputs if || T - X W'^T ||^2 stays small, with targets T = X W^T of
the same inputs, or others such as the dense model's outputs. All that is needed of the
data is H = X^T X and G = T^T X. A ridge that pulls to the dense weight makes H definite
and the solution generalise.

`jnp.linalg.cholesky` returns NaN instead of raising, so a matrix that is not definite
is met by a ladder: ten times the damping until it factorises. What was used comes back
as data; `damping_message` words it.

`refit` finds the weights of a fixed support by conjugate gradients: the final
refinement of ALPS (Meng et al. 2024, arXiv:2406.07831), for any support.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from flexhinm_jax.types import Stats

STRIP = 512  # columns of a product that are summed at once
RUNGS = 6  # dampings tried: damp * 10^0 .. 10^5, then the diagonal alone

#: Products that decide about weights run in full float32 on every device.
dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)


class Problem(NamedTuple):
    """min over W' of tr(W' H W'^T) / 2 - tr(W' G^T), damping included.

    Attributes:
      weight: f[o, i], the dense weight; zero for dead inputs.
      gram: f[i, i], H: symmetric positive definite.
      cross: f[o, i], G; equal to weight @ gram unless targets were given.
      factor: f[i, i], lower K with J H J = K K^T, J the reversal.
      damping: f[], damping used as a fraction of the mean of the diagonal; inf when
        only the diagonal was used.
      has_targets: whether `cross` is more than weight @ gram; a Python bool.
    """

    weight: Array
    gram: Array
    cross: Array
    factor: Array
    damping: Array
    has_targets: bool


def problem(
    w: Array, stats: Stats, *, damp: float, center: bool = False, dtype=jnp.float32
) -> Problem:
    """States the problem of one matrix.

    Args:
      w: [o, i], the dense weight.
      stats: statistics with a Gram; `cross` is used when it is there.
      damp: ridge towards the dense weight, as a fraction of the mean of the diagonal.
      center: removes the means from inputs and targets; the bias then makes up for
        them, see `bias`.
      dtype: dtype to compute in.

    Returns:
      The problem; inputs that never fire have weight zero.
    """
    assert stats.gram is not None
    h = stats.gram.astype(dtype)
    h = (h + h.T) / 2
    w = w.astype(dtype)
    mean = stats.mean.astype(dtype)
    count = stats.count.astype(dtype)
    g = None if stats.cross is None else stats.cross.astype(dtype)
    if center:
        if g is not None:
            g = g - count * target_mean(w, stats)[:, None] * mean[None]
        h = h - count * mean[:, None] * mean[None]
    diagonal = jnp.diag(h)
    dead = ~(diagonal > 0)  # also NaN
    w = jnp.where(dead, 0, w)
    h, factor, damping, ridge = damped(h, damp)
    # Damping H and adding the same multiple of W to G pulls to W, not to zero.
    cross = dot(w, h) if g is None else jnp.where(dead, 0, g) + ridge * w
    return Problem(w, h, cross, factor, damping, has_targets=g is not None)


def target_mean(w: Array, stats: Stats) -> Array:
    """f[o]: mean target, W mean(x) unless other targets were given."""
    if stats.target_mean is not None:
        return stats.target_mean.astype(w.dtype)
    return dot(w, stats.mean.astype(w.dtype))


def bias(w: Array, solved: Array, stats: Stats) -> Array:
    """f[o]: what to add to W' x so that its mean is that of the target.

    Args:
      w: [o, i], the dense weight.
      solved: [o, i], the pruned weight.
      stats: statistics; without `target_mean` the target is W x, so the result is the
        correction to a bias that the layer may have.
    """
    return target_mean(w, stats) - dot(solved, stats.mean.astype(w.dtype))


def damped(h: Array, damp: float) -> tuple[Array, Array, Array, Array]:
    """Adds damp * mean(diagonal), and ten times more as long as h is not definite.

    Args:
      h: f[i, i], symmetric; may be singular or indefinite, NaN counts as dead.
      damp: first fraction to try.

    Returns:
      The damped matrix; K lower with J H J = K K^T; the fraction used, inf for the
      diagonal alone; the ridge that was added to the diagonal.
    """
    diagonal = jnp.diag(h)
    dead = ~(diagonal > 0)
    h = jnp.where(dead[:, None] | dead[None], 0, h)
    diagonal = jnp.where(dead, 0, diagonal)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1)
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def attempt(rung):
        ridge = damp * mean * jnp.asarray(10, h.dtype) ** rung
        return ridge, reversed_cholesky(h + ridge * eye)

    def failed(k):
        return ~jnp.all(jnp.isfinite(jnp.diag(k)))

    def more(carry):
        return failed(carry[2]) & (carry[0] < RUNGS - 1)

    def climb(carry):
        return carry[0] + 1, *attempt(carry[0] + 1)

    zero = jnp.zeros((), jnp.int32)
    rung, ridge, factor = lax.while_loop(more, climb, (zero, *attempt(zero)))
    give_up = failed(factor)
    matrix = jnp.where(
        give_up, jnp.diag(jnp.where(dead, mean, diagonal)), h + ridge * eye
    )
    factor = jnp.where(give_up, jnp.sqrt(matrix[::-1, ::-1]), factor)
    fraction = jnp.where(give_up, jnp.inf, damp * jnp.asarray(10, h.dtype) ** rung)
    return matrix, factor, fraction, jnp.where(give_up, 0, ridge)


def damping_message(used: float, asked: float) -> str:
    """Says on the host what the ladder did; "" when the first rung held.

    Example:
      >>> damping_message(0.01, 0.01)
      ''
    """
    if used <= asked * 1.001:
        return ""
    if used == float("inf"):
        return (
            "the Gram matrix is not positive definite at any damping: only its "
            "diagonal was used; recompute the statistics in float32"
        )
    return (
        f"the Gram matrix needed damping {used:g} instead of {asked:g} to be positive "
        "definite; calibrate on more tokens, or raise damp"
    )


def reversed_cholesky(h: Array) -> Array:
    """Lower K with J h J = K K^T, J the reversal; NaN when h is not definite."""
    return jnp.linalg.cholesky(h[::-1, ::-1])


def inverse_factor(factor: Array) -> Array:
    """Upper U with H^-1 = U^T U from the reversed Cholesky factor.

    One factorisation and one triangular solve: cheaper than the usual
    inverse-then-factorise, and seven times closer to float64.
    """
    eye = jnp.eye(factor.shape[0], dtype=factor.dtype)
    return solve_triangular(factor, eye, lower=True)[::-1, ::-1]


@functools.partial(jax.jit, static_argnames="damp")
def inverse(h: Array, damp: float) -> Array:
    """f[i, i]: the inverse of a Gram matrix, damped as by `damped`."""
    u = inverse_factor(damped(h, damp)[1])
    return dot(u.T, u)


def permuted_inverse_factor(h: Array, order: Array) -> Array:
    """`inverse_factor` of h[order][:, order], the diagonal's if that fails."""
    p = h[order][:, order]
    u = inverse_factor(reversed_cholesky(p))
    return jnp.where(jnp.all(jnp.isfinite(u)), u, jnp.diag(1 / jnp.sqrt(jnp.diag(p))))


def solve(task: Problem) -> Array:
    """f[o, i]: the dense least-squares weight G H^-1."""
    return solve_by(task.factor, task.cross[:, ::-1])[:, ::-1]


def factor_of(h: Array) -> Array:
    """Lower K with h = K K^T; the diagonal's where h is not definite."""
    factor = jnp.linalg.cholesky(h, symmetrize_input=False)
    definite = jnp.all(jnp.isfinite(jnp.diag(factor)))
    diagonal = lambda: jnp.diag(jnp.sqrt(jnp.diag(h)))  # noqa: E731
    return lax.cond(definite, lambda: factor, diagonal)


def solve_by(factor: Array, g: Array) -> Array:
    """f[o, i]: G (K K^T)^-1 for a lower K."""
    half = solve_triangular(factor, g.T, lower=True)
    return solve_triangular(factor, half, lower=True, trans=1).T


@jax.jit
def energy(w: Array, h: Array) -> Array:
    """f[*stack]: || X W^T ||^2 = tr(W H W^T).

    Strip by strip: XLA makes one loop of a product and its sum, which on a CPU takes
    five times as long as the product alone where both have 4096 columns.

    Args:
      w: f[*stack, o, i].
      h: f[*stack, i, i], the Gram X^T X.
    """
    strips = [slice(k, k + STRIP) for k in range(0, w.shape[-1], STRIP)]
    total = jnp.zeros(w.shape[:-2], w.dtype)
    for strip in strips:
        image = jnp.matmul(w, h[..., strip], precision=lax.Precision.HIGHEST)
        total += jnp.sum(image * w[..., strip], axis=(-2, -1), dtype=w.dtype)
    return total


def error(solved: Array, task: Problem, lost: Array | None = None) -> Array:
    """f[]: || X (W' - W) ||^2 / || X W ||^2 in the damped Gram.

    Args:
      solved: f[o, i], W'.
      task: the problem.
      lost: f[], || X (W' - W) ||^2 where it is known.
    """
    missed = energy(solved - task.weight, task.gram) if lost is None else lost
    total = energy(task.weight, task.gram)
    return jnp.where(total > 0, missed / jnp.where(total > 0, total, 1), 0)


def unit_diagonal(h: Array) -> tuple[Array, Array]:
    """(h / (s s^T), s) with s the root of the diagonal: Jacobi preconditioning."""
    s = jnp.sqrt(jnp.diag(h))
    s = jnp.where(s > 0, s, 1)
    return h / (s[:, None] * s[None]), s


def refit(start: Array, keep: Array, h: Array, g: Array, steps: int) -> Array:
    """Moves the kept weights of every row towards the least-squares solution.

    Few steps act as a ridge towards the start; ten are within a percent of the optimum.

    Args:
      start: f[o, i].
      keep: bool[o, i].
      h: f[i, i], damped Gram.
      g: f[o, i], damped cross Gram.
      steps: conjugate-gradient steps, one [o, i] x [i, i] product each.

    Returns:
      f[o, i], zero outside `keep`; the objective never rises.
    """
    h, s = unit_diagonal(h)
    solved = descend(jnp.where(keep, start * s, 0), keep, h, g / s, steps)
    return solved / s


def descend(b: Array, keep: Array, h: Array, g: Array, steps: Array | int) -> Array:
    """`refit` for a Gram that has a unit diagonal already."""

    def squared(x):
        return jnp.sum(jnp.square(x), axis=1, keepdims=True)

    def step(_, carry):
        b, residual, direction, size = carry
        image = dot(direction, h)
        alpha = ratio(size, jnp.sum(direction * image, axis=1, keepdims=True))
        b = b + alpha * direction
        residual = jnp.where(keep, residual - alpha * image, 0)
        fresh = squared(residual)
        return b, residual, residual + ratio(fresh, size) * direction, fresh

    residual = jnp.where(keep, g - dot(b, h), 0)
    carry = (b, residual, residual, squared(residual))
    return lax.fori_loop(0, steps, step, carry)[0]


def ratio(part: Array, whole: Array) -> Array:
    """Fraction of the whole, 0 where that is 0, with finite gradients."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
