"""Doubly stochastic relaxations of permutations, by Sinkhorn scaling in the log domain.

A relaxed permutation P of b channels has P[i, j] = weight of channel i at position j;
rows and columns sum to one. PermLLM (arXiv:2510.10136) scales the softmax of free
logits for a few rounds; the cost predictor (arXiv:2601.22980) solves the entropic
assignment problem min <C, P> + eps sum P (log P - 1), whose solution is the same
scaling of exp(-C / eps).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops import assignment


def sinkhorn(logits: Array, rounds: int) -> Array:
    """Scales exp(logits) towards a doubly stochastic matrix.

    Args:
      logits: f[..., b, b], finite, already divided by the temperature.
      rounds: rounds of normalising rows, then columns, after a first normalisation of
        the rows; 0 is a softmax of every row.

    Returns:
      f32[..., b, b], positive; columns sum to one exactly and rows nearly, the nearer
      the more rounds (with 0 rounds the other way round). Differentiable in `logits`
      through all rounds.

    Source: Sinkhorn 1964; arXiv:2510.10136, section 4 (5 rounds).

    Example:
      >>> import jax.numpy as jnp
      >>> sinkhorn(jnp.zeros((2, 2)), 1).tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    def one(log_p, _):
        log_p = jax.nn.log_softmax(log_p, axis=-1)
        return jax.nn.log_softmax(log_p, axis=-2), None

    return jnp.exp(lax.scan(one, log_p, None, length=rounds)[0])


def nearest(relaxed: Array) -> Array:
    """The permutation with the largest inner product with a relaxed one.

    Args:
      relaxed: f32[..., b, b], finite.

    Returns:
      i32[..., b], the channel at every position: the P[order[j], j] are chosen. Not
      differentiable; equal entries still give a permutation, the same every time.
    """
    gain = lax.stop_gradient(jnp.swapaxes(relaxed, -1, -2))
    flat = gain.reshape(-1, *gain.shape[-2:])
    return assignment.hungarian(flat).reshape(gain.shape[:-1])


def one_hot(order: Array) -> Array:
    """f32[..., b, b]: the permutation matrix of `order`, [order[j], j] = 1."""
    b = order.shape[-1]
    channel = jnp.arange(b, dtype=jnp.int32)[:, None]
    return (order[..., None, :] == channel).astype(jnp.float32)
