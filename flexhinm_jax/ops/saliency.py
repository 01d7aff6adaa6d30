"""Per-weight importance scores of one matrix `[o, i]`, always in float32.

Larger scores stay. A score is only compared with scores of the same matrix.
"""

import jax.numpy as jnp
from jax import Array


def magnitude(w: Array) -> Array:
    """|w|, as f32[o, i]."""
    return jnp.abs(w.astype(jnp.float32))


def squared(w: Array) -> Array:
    """w^2, as f32[o, i]."""
    return jnp.square(w.astype(jnp.float32))


def wanda(w: Array, sq_norm: Array) -> Array:
    """Weight magnitude times the norm of the input it meets.

    Args:
      w: [o, i].
      sq_norm: f32[i], squared norm of every input channel; any common factor cancels.

    Returns:
      f32[o, i], |w_ij| * ||x_j||_2.

    Source: Sun et al. 2023 (arXiv:2306.11695), equation 1.
    """
    return magnitude(w) * jnp.sqrt(sq_norm.astype(jnp.float32))


def diagonal_fisher(w: Array, sq_grad: Array) -> Array:
    """Loss increase that removing one weight causes, to second order.

    Args:
      w: [o, i].
      sq_grad: f32[o, i], mean squared gradient: the diagonal of the empirical Fisher.

    Returns:
      f32[o, i], w_ij^2 * E[g_ij^2] / 2.

    Source: Theis et al. 2018 (arXiv:1801.05787), equation 7.
    """
    return squared(w) * sq_grad.astype(jnp.float32) / 2
