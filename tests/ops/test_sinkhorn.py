import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import sinkhorn

KEY = jax.random.key(0)


def logits(shape=(3, 6, 6), scale=2.0):
    return scale * jax.random.normal(KEY, shape)


def test_rounds_bring_rows_and_columns_to_one():
    x = logits()
    gaps = []
    for rounds in (1, 5, 20):
        p = sinkhorn.sinkhorn(x, rounds)
        np.testing.assert_allclose(p.sum(-2), 1, rtol=1e-5)
        gaps.append(float(jnp.abs(p.sum(-1) - 1).max()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


def test_no_round_is_a_softmax_of_rows():
    x = logits()
    np.testing.assert_allclose(
        sinkhorn.sinkhorn(x, 0), jax.nn.softmax(x, -1), rtol=1e-5
    )


def test_the_scaling_solves_the_entropic_assignment():
    # at the optimum P = diag(u) exp(-C / eps) diag(v): log P - logits is a rank-one sum
    x = logits((5, 5))
    rest = jnp.log(sinkhorn.sinkhorn(x, 200)) - x
    rest = rest - rest[:1] - rest[:, :1] + rest[0, 0]
    np.testing.assert_allclose(rest, 0, atol=1e-4)


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    x = 200 * logits((4, 4))
    value, slope = jax.value_and_grad(lambda x: sinkhorn.sinkhorn(x, 5).sum())(x)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_the_nearest_permutation_is_the_best_of_all():
    p = sinkhorn.sinkhorn(logits((4, 5, 5)), 5)
    found = sinkhorn.nearest(p)
    place = np.arange(5)
    for one, order in zip(np.asarray(p), np.asarray(found), strict=True):
        best = max(one[list(q), place].sum() for q in itertools.permutations(range(5)))
        np.testing.assert_allclose(one[order, place].sum(), best, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_ties_still_give_a_permutation(value):
    found = sinkhorn.nearest(jnp.full((2, 4, 4), value, jnp.float32))
    assert (np.sort(found, -1) == np.arange(4)).all()


def test_one_hot_permutes_as_indexing_does():
    order = jnp.array([2, 0, 1])
    x = jnp.array([[5.0, 6, 7]])
    np.testing.assert_array_equal(x @ sinkhorn.one_hot(order), x[:, order])
