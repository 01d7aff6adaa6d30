import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import groups as eager
from flexhinm_jax.types import Regions
from tests.compiled import Compiled

groups = Compiled(eager)

ROWS, COLS, V, M = 12, 16, 4, 4


def regions(seed=0, dense=3, nm=2):
    """Three tiles in a random row order, every tile with its own column order."""
    rng = np.random.default_rng(seed)
    t = ROWS // V
    return Regions(
        out_order=jnp.asarray(rng.permutation(ROWS), jnp.int32),
        in_order=jnp.asarray(
            np.stack([rng.permutation(COLS) for _ in range(t)]), jnp.int32
        ),
        dense_end=jnp.full(t, dense, jnp.int32),
        nm_end=jnp.full(t, dense + nm * M, jnp.int32),
        n=2,
        m=M,
    )


def test_groups_are_the_columns_that_follow_each_other_in_the_order_of_a_tile():
    r, x = regions(), jnp.arange(ROWS * COLS, dtype=jnp.float32).reshape(ROWS, COLS)
    got = groups.to_groups(x, r)
    assert got.shape == (ROWS // V, V, COLS // M, M)
    np.testing.assert_array_equal(
        groups.live_groups(r), [[True, True, False, False]] * 3
    )
    for t in range(ROWS // V):
        for v in range(V):
            row = np.asarray(x)[r.out_order[t * V + v]]
            for g in range(2):
                start = 3 + g * M
                want = row[np.asarray(r.in_order[t, start : start + M])]
                np.testing.assert_array_equal(got[t, v, g], want)


def test_from_groups_undoes_to_groups():
    r, x = regions(1), jax.random.normal(jax.random.key(0), (ROWS, COLS))
    back = groups.from_groups(groups.to_groups(x, r), r)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_are_those_of_plain_indexing(stacked):
    r, x = regions(2), jax.random.normal(jax.random.key(0), (ROWS, COLS))
    c = jax.random.normal(jax.random.key(1), (ROWS // V, V, COLS // M, M))
    into = jax.grad(lambda x: jnp.sum(jnp.sin(groups.to_groups(x, r)) * c))
    outof = jax.grad(
        lambda y: jnp.sum(jnp.sin(groups.from_groups(y, r)) * groups.from_groups(c, r))
    )
    if stacked:
        into = lambda x, f=into: jax.vmap(f)(jnp.stack([x, 2 * x]))[0]  # noqa: E731
    want = jnp.cos(x) * groups.from_groups(c, r)
    np.testing.assert_allclose(into(x), want, rtol=1e-6)
    y = groups.to_groups(x, r)
    np.testing.assert_allclose(outof(y), jnp.cos(y) * c, rtol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_sums_and_their_gradient_are_those_of_the_groups(stacked):
    r, x = regions(6), jax.random.normal(jax.random.key(0), (ROWS, COLS))
    c = jax.random.normal(jax.random.key(1), (ROWS // V, V, COLS // M))
    value = lambda x: jnp.sum(jnp.sin(groups.sums(x, r)) * c)  # noqa: E731
    grad = jax.grad(value)
    if stacked:
        grad = lambda x, f=grad: jax.vmap(f)(jnp.stack([2 * x, x]))[1]  # noqa: E731
    total = np.asarray(groups.to_groups(x, r)).sum(-1)
    np.testing.assert_allclose(groups.sums(x, r), total, rtol=1e-5, atol=1e-6)
    each = np.broadcast_to((np.cos(total) * c)[..., None], (*total.shape, M))
    want = groups.from_groups(jnp.asarray(each), r)
    np.testing.assert_allclose(grad(x), want, rtol=1e-5, atol=1e-6)


def test_every_weight_is_dense_in_a_group_or_pruned():
    r = regions(3)
    nm, dense = np.asarray(groups.nm_weights(r)), np.asarray(groups.dense_weights(r))
    for t in range(ROWS // V):
        for row in np.asarray(r.out_order)[t * V : (t + 1) * V]:
            order = np.asarray(r.in_order[t])
            np.testing.assert_array_equal(
                np.flatnonzero(dense[row]), np.sort(order[:3])
            )
            np.testing.assert_array_equal(np.flatnonzero(nm[row]), np.sort(order[3:11]))


def test_inverse_inverts():
    order = regions(4).in_order
    lines = jnp.take_along_axis(order, groups.inverse(order), axis=1)
    np.testing.assert_array_equal(lines, np.tile(np.arange(COLS), (ROWS // V, 1)))
