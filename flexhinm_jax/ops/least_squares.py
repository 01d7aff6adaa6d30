"""Weights of a fixed support by conjugate gradients on the Gram matrix.

ALPS (Meng et al. 2024, arXiv:2406.07831), its final refinement, for any support.
"""

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops import gram as grams


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


def descend(b: Array, keep: Array, h: Array, g: Array, steps: int) -> Array:
    """`refit` for a Gram that has a unit diagonal already."""

    def squared(x):
        return jnp.sum(jnp.square(x), axis=1, keepdims=True)

    def ratio(a, b):
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def step(_, carry):
        b, residual, direction, size = carry
        image = grams.dot(direction, h)
        alpha = ratio(size, jnp.sum(direction * image, axis=1, keepdims=True))
        b = b + alpha * direction
        residual = jnp.where(keep, residual - alpha * image, 0)
        fresh = squared(residual)
        return b, residual, residual + ratio(fresh, size) * direction, fresh

    residual = jnp.where(keep, g - grams.dot(b, h), 0)
    carry = (b, residual, residual, squared(residual))
    return lax.fori_loop(0, steps, step, carry)[0]
