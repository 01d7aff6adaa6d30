"""Momentum whose pace follows the gradient, for masks that have a good start."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

__all__ = ["relative"]


def relative(decay: float = 0.95) -> optax.GradientTransformation:
    """The mean of the gradients, scaled to a root mean square of 1 in every array.

    Adam moves every logit at the same pace, also those whose gradient is noise, and
    they leave a good start together. Here a logit is as fast as its gradient is large
    beside the others of its array, so the few groups that matter change first. One
    number per logit instead of two.

    Args:
      decay: of the mean, in [0, 1).

    Returns:
      A transformation to chain with a learning rate.

    Raises:
      ValueError: a decay outside [0, 1).

    Example:
      >>> tx = optax.chain(relative(0.95), optax.sgd(2e-4))
      >>> params = {"logits": jnp.zeros(4)}
      >>> grads = {"logits": jnp.asarray([3.0, 0.0, 0.0, 0.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [round(float(u) * 1e4, 3) for u in updates["logits"]]
      [-4.0, -0.0, -0.0, -0.0]
    """
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"decay={decay!r}: need a number in [0, 1)")

    def scale(updates: Any, _: Any) -> Any:
        def one(x: Any) -> Any:
            mean = jnp.mean(jnp.square(x), dtype=jnp.float32)
            return x * lax.rsqrt(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

        return jax.tree.map(one, updates)

    return optax.chain(optax.ema(decay), optax.stateless(scale))
