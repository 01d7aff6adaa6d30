"""The normalised weight of NoWag, its score, and the loss that ARMOR fits.

W = diag(r) Wbar diag(c): columns of W are divided by their norm first, then rows of the
result. The loss of an approximation is its squared distance to Wbar, every input
channel weighted by its mean square. NoWag (arXiv:2504.14569), equations 2 to 4.
"""

import jax.numpy as jnp
from jax import Array, lax

EPS = 1e-5  # added to every norm


def normalise(w: Array) -> tuple[Array, Array, Array]:
    """Divides the columns by their norm, then the rows.

    Args:
      w: [o, i], any floating dtype.

    Returns:
      bar f32[o, i], r f32[o], c f32[i] with w = r[:, None] * bar * c. Rows of `bar`
      have unit norm up to EPS, columns only roughly; a channel of zeros stays zero.
    """
    w = w.astype(jnp.float32)
    c = jnp.sqrt(jnp.sum(jnp.square(w), axis=0)) + EPS
    bar = w / c
    r = jnp.sqrt(jnp.sum(jnp.square(bar), axis=1)) + EPS
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


def score(w: Array, energy: Array) -> Array:
    """Importance of every weight: its share of the loss when it alone goes.

    Args:
      w: [o, i].
      energy: f32[i], see `channel_weights`.

    Returns:
      f32[o, i], bar_ij^2 * d_j.
    """
    bar, _, _ = normalise(w)
    return jnp.square(bar) * channel_weights(energy)


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


def squared(x: Array, h: Array) -> Array:
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
    total = squared(target, h)
    lost = squared(approximation - target, h)
    return jnp.where(total > 0, lost / jnp.where(total > 0, total, 1), 0)
