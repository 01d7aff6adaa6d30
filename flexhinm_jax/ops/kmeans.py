"""Balanced k-means: clusters of exactly equal size.

Lloyd iterations in which the assignment step is a transportation problem: every cluster
takes exactly `size` points. The released Gyro code solves it with an assignment of size
points x points; we improve the previous clusters by exchanges (`assignment.transport`),
which is monotone and O(points * clusters) per round.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops import assignment


def balanced(
    key: Array, points: Array, size: int, *, steps: int = 10, rounds: int = 64
) -> Array:
    """Clusters points into groups of exactly `size`.

    Args:
      key: consumed: the initial centroids are random distinct points.
      points: f32[p, d]; `size` divides p.
      size: points per cluster.
      steps: Lloyd steps.
      rounds: rounds of exchanges per step.

    Returns:
      i32[p / size, size], the points of every cluster.
    """
    p, _ = points.shape
    k = p // size
    shuffled = jax.random.permutation(key, p).astype(jnp.int32)
    # Each cluster starts with its random centroid and arbitrary company.
    start = shuffled.reshape(size, k).T

    def step(_, state):
        table, centroids = state
        scores = 2 * jnp.matmul(points, centroids.T, precision="highest")
        scores -= jnp.sum(jnp.square(centroids), axis=1)
        table = assignment.transport(scores, table, rounds)
        return table, jnp.mean(points[table], axis=1)

    return lax.fori_loop(0, steps, step, (start, points[start[:, 0]]))[0]
