"""Boolean supports from scores: n of every m, the k best, whole vectors.

Larger scores stay. Ties go to the lower index everywhere, so results do not depend on
the device, on jit, or on how a matrix was split. Mishra et al. 2021 (arXiv:2104.08378)
define N:M sparsity.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

COUNTED = 16  # up to this group size ranks are counted pairwise, above it sorted
WRITTEN_OUT = 8  # up to this one the pairs are written out


def take(x: Array, index: Array, axis: int) -> Array:
    """`jnp.take_along_axis` for indices that are in bounds.

    That function fills what is out of bounds, which costs two more kernels to compile
    and to run at every call.
    """
    return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")


def ranks(scores: Array) -> Array:
    """Position of every entry in the descending order of the last axis.

    Args:
      scores: [..., c], any real dtype; NaN is not allowed.

    Returns:
      i32[..., c], 0 for the largest; of equal entries the lower index comes first.
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def top_k(scores: Array, k: Array | int) -> Array:
    """Marks the k largest entries of the last axis.

    Bisects the threshold on the integer form of the floats, then the index among ties:
    some fifty passes without a sort, twenty times faster on a CPU for a whole matrix.

    Args:
      scores: [..., c], no NaN.
      k: count, broadcastable to the leading axes plus one; may be traced.

    Returns:
      bool[..., c] with exactly min(k, c) True per row; ties go to the lower index.
    """
    columns = scores.shape[-1]
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.int32)
    x = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of floats
    k = jnp.broadcast_to(jnp.asarray(k, jnp.int32), (*x.shape[:-1], 1))
    index = jnp.arange(columns, dtype=jnp.int32)

    def count(marked):
        return jnp.sum(marked, axis=-1, keepdims=True, dtype=jnp.int32)

    def smallest(enough, low, high, steps):
        """The smallest integer in [low, high] for which `enough` is True."""

        def halve(_, ends):
            low, high = ends
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            hit = enough(middle)
            return jnp.where(hit, low, middle + 1), jnp.where(hit, middle, high)

        ends = jnp.full_like(k, low), jnp.full_like(k, high)
        return lax.fori_loop(0, steps, halve, ends)[0]

    limits = jnp.iinfo(jnp.int32)
    cut = smallest(lambda c: count(x > c) <= k, limits.min, limits.max, 32)
    tied, missing = x == cut, k - count(x > cut)
    end = smallest(
        lambda e: count(tied & (index < e)) >= missing,
        0,
        columns,
        columns.bit_length() + 1,
    )
    return (x > cut) | (tied & (index < end))


def group_ranks(groups: Array) -> Array:
    """Rank of every entry inside its group, like `ranks` but for short last axes.

    Args:
      groups: [..., m].

    Returns:
      i32[..., m], 0 for the largest, ties to the lower index.
    """
    m = groups.shape[-1]
    if m > COUNTED:
        return ranks(groups)
    if m <= WRITTEN_OUT:
        # One elementwise program without an axis of m, also where groups are columns.
        each = [groups[..., j] for j in range(m)]
        ahead = [
            [x >= y if k < j else x > y for k, x in enumerate(each) if k != j]
            for j, y in enumerate(each)
        ]
        zero = jnp.zeros(each[0].shape, jnp.int32)
        counts = [sum((x.astype(jnp.int32) for x in row), zero) for row in ahead]
        return jnp.stack(counts, axis=-1)
    ahead = groups[..., None, :] > groups[..., :, None]
    tied = groups[..., None, :] == groups[..., :, None]
    earlier = jnp.tril(jnp.ones((m, m), bool), -1)
    return jnp.sum(ahead | (tied & earlier), axis=-1, dtype=jnp.int32)


def n_of_m(scores: Array, *, n: int, m: int) -> Array:
    """Keeps the n best of every m consecutive inputs.

    Args:
      scores: [..., i], compared only inside a group; m divides i.
      n: kept per group.
      m: group size.

    Returns:
      bool[..., i], exactly n True per group; ties go to the lower index.

    Example:
      >>> import jax.numpy as jnp
      >>> n_of_m(jnp.array([3.0, 1.0, 3.0, 3.0]), n=2, m=4).tolist()
      [True, False, True, False]
    """
    groups = scores.reshape(*scores.shape[:-1], -1, m)
    return (group_ranks(groups) < n).reshape(scores.shape)


def top_n_sum(groups: Array, *, n: int, axis: int = -1) -> Array:
    """Sum of the n largest entries along a short axis, without sorting.

    n rounds of a bubble pass: each moves the largest remaining entry to the front, so
    the whole is n * m elementwise maxima and minima.

    Args:
      groups: [..., m, ...].
      n: entries to add, at most m.
      axis: the axis of m.

    Returns:
      The sum, without that axis, in the dtype of `groups`.
    """
    rest = [lax.index_in_dim(groups, j, axis, False) for j in range(groups.shape[axis])]
    if n == len(rest):
        return sum(rest[1:], rest[0])
    return sum(n_largest(rest, n), jnp.zeros_like(rest[0]))


def n_largest(rest: list[Array], n: int) -> list[Array]:
    """Elementwise n largest of a few arrays, the largest first, by bubble passes."""
    largest = []
    for _ in range(n):
        best, left = rest[0], []
        for x in rest[1:]:
            left.append(jnp.minimum(best, x))
            best = jnp.maximum(best, x)
        largest.append(best)
        rest = left
    return largest


def first_max(x: Array) -> Array:
    """i32[b]: first index of the largest entry of x [c, b]; faster than argmax."""
    index = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    hit = x == jnp.max(x, axis=0)
    return jnp.min(jnp.where(hit, index, x.shape[0] - 1), axis=0)


def vectors(scores: Array, vector_size: int) -> Array:
    """Importance of every column vector of every row tile.

    Args:
      scores: [o, i]; `vector_size` divides o.
      vector_size: rows of a tile.

    Returns:
      f32[t, i], the sum over the rows of the tile.
    """
    o, i = scores.shape
    tiles = scores.reshape(o // vector_size, vector_size, i)
    return jnp.sum(tiles, axis=1, dtype=jnp.float32)


def retained(scores: Array, keep: Array) -> Array:
    """Share of the total score that a support keeps.

    Args:
      scores: [..., o, i], non-negative.
      keep: bool of the same shape.

    Returns:
      f32[...], in [0, 1]; 1 when every score is zero.
    """
    scores = scores.astype(jnp.float32)
    total = jnp.sum(scores, axis=(-2, -1))
    kept = jnp.sum(jnp.where(keep, scores, 0), axis=(-2, -1))
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), 1.0)


def fold_tiles(tiles: Array, out_order: Array) -> Array:
    """Rows of tiles back in original row order.

    Args:
      tiles: [t, v, i] in storage order.
      out_order: i32[o], original row at storage row r.

    Returns:
      [o, i].
    """
    rows = tiles.reshape(-1, tiles.shape[-1])
    return rows[jax.numpy.argsort(out_order)]
