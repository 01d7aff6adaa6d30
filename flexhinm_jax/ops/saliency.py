"""Per-weight importance scores of one matrix `[o, i]`, always in float32.

Larger scores stay. A score is only compared with scores of the same matrix.

NoWag (arXiv:2504.14569), equations 2 to 4: W = diag(r) Wbar diag(c), where columns of
W are divided by their norm first, then rows of the result. The loss of an approximation
is its squared distance to Wbar, every input channel weighted by its mean square.
"""

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular


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


def relative_importance(w: Array, sq_norm: Array, a: float) -> Array:
    """Share of a weight in its input and in its output, times the input norm.

    Args:
      w: [o, i].
      sq_norm: f32[i], squared norm of every input channel; any common factor cancels.
      a: exponent of the norm.

    Returns:
      f32[o, i], (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||^a.

    Source: Zhang et al. 2024 (ICLR, openreview Tr0lPx9woF), equations 2 and 4.
    """
    size = magnitude(w)
    tiny = jnp.finfo(jnp.float32).tiny  # a channel of zeros scores zero
    column = jnp.maximum(jnp.sum(size, axis=0, keepdims=True), tiny)
    row = jnp.maximum(jnp.sum(size, axis=1, keepdims=True), tiny)
    norm = jnp.sqrt(sq_norm.astype(jnp.float32))
    return (size / column + size / row) * norm**a


def block_fisher(w: Array, fisher: Array, damp: float) -> Array:
    """Loss increase of removing one weight while its block makes up for it.

    Args:
      w: [o, i].
      fisher: f32[o, i / b, b, b], sum of g g^T over blocks of b consecutive inputs.
      damp: added to the diagonal, as a fraction of the mean of the whole diagonal.

    Returns:
      f32[o, i], w_q^2 / (2 [F^-1]_qq).

    Source: Kurtic et al. 2022 (arXiv:2203.07259), equation 7.
    """
    b = fisher.shape[-1]
    fisher = fisher.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(fisher, axis1=-2, axis2=-1))
    ridge = damp * jnp.where(mean > 0, mean, 1)
    factor = jnp.linalg.cholesky(fisher + ridge * jnp.eye(b, dtype=jnp.float32))
    eye = jnp.broadcast_to(jnp.eye(b, dtype=jnp.float32), fisher.shape)
    half = solve_triangular(factor, eye, lower=True)
    inverse = jnp.sum(jnp.square(half), axis=-2).reshape(w.shape)
    return squared(w) / (2 * inverse)


def normalise(w: Array) -> tuple[Array, Array, Array]:
    """Divides the columns by their norm, then the rows.

    Args:
      w: [o, i], any floating dtype.

    Returns:
      bar f32[o, i], r f32[o], c f32[i] with w = r[:, None] * bar * c. Rows of `bar`
      have unit norm, columns only roughly; a channel of zeros stays zero. Nothing is
      added to the norms, or a factor on the whole weight would change `bar`.
    """

    def norms(x: Array, axis: int) -> Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=axis))
        return jnp.where(norm > 0, norm, jnp.ones_like(norm))

    w = w.astype(jnp.float32)
    c = norms(w, 0)
    bar = w / c
    r = norms(bar, 1)
    return bar / r[:, None], r, c


def channel_weights(energy: Array) -> Array:
    """The weight of every input channel in the loss, mean 1.

    Args:
      energy: f32[i], mean or sum of the squared input; any common factor cancels.

    Returns:
      f32[i], positive: a channel that never fired, or whose energy is not finite, gets
      the mean of the others.
    """
    energy = energy.astype(jnp.float32)
    valid = jnp.isfinite(energy) & (energy > 0)
    count = jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1)
    # Divided first: the sum of large energies may overflow.
    top = jnp.max(jnp.where(valid, energy, 0))
    scaled = jnp.where(valid, energy, 0) / jnp.where(top > 0, top, 1)
    mean = jnp.sum(scaled) / count
    mean = jnp.where(mean > 0, mean, 1)
    return jnp.where(valid, jnp.maximum(scaled / mean, 1e-12), 1).astype(jnp.float32)


def nowag(w: Array, energy: Array) -> Array:
    """Importance of every weight: its share of the loss when it alone goes.

    Args:
      w: [o, i].
      energy: f32[i], see `channel_weights`.

    Returns:
      f32[o, i], bar_ij^2 * d_j.
    """
    bar, _, _ = normalise(w)
    return jnp.square(bar) * channel_weights(energy)
