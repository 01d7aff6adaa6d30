import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from flexhinm_jax.ops import assignment


def total(gain, choice):
    return np.take_along_axis(np.asarray(gain), np.asarray(choice)[:, None], 1).sum()


def host(gain):
    """The best assignment by scipy."""
    return linear_sum_assignment(gain, maximize=True)[1]


def gains(seed, g=9):
    return jax.random.uniform(jax.random.key(seed), (g, g))


@pytest.mark.parametrize("seed", range(5))
def test_hungarian_and_scipy_find_the_same_total(seed):
    gain = gains(seed)
    want = total(gain, host(np.asarray(gain)))
    found = jax.jit(assignment.hungarian)(gain)
    assert sorted(found.tolist()) == list(range(9))
    np.testing.assert_allclose(total(gain, found), want, rtol=1e-6)


def test_hungarian_equals_enumeration_on_a_stack():
    stack = jnp.stack([gains(s, 4) for s in range(3)])
    for gain, found in zip(stack, assignment.hungarian(stack), strict=True):
        best = max(total(gain, p) for p in itertools.permutations(range(4)))
        np.testing.assert_allclose(total(gain, found), best, rtol=1e-6)


@pytest.mark.parametrize("rounds", [1, 2, 8])
def test_swaps_are_permutations_that_never_lower_the_total(rounds):
    stack = jnp.stack([gains(s, 12) for s in range(6)])
    for gain, found in zip(stack, assignment.swaps(stack, rounds), strict=True):
        assert sorted(found.tolist()) == list(range(12))
        assert total(gain, found) >= np.trace(gain)


def test_swaps_end_where_no_pair_gains():
    gain = np.asarray(gains(0, 12))
    found = np.asarray(assignment.swaps(jnp.asarray(gain), 64))
    now = gain[:, found]
    own = np.diag(now)
    assert (now + now.T <= own[:, None] + own + 1e-5).all()
    assert total(gain, found) >= 0.9 * total(gain, host(gain))


def test_equal_gains_move_nothing():
    assert assignment.swaps(jnp.ones((7, 7)), 3).tolist() == list(range(7))


def test_partners_are_mutual_and_include_the_best_pair():
    delta = gains(3, 10) - 0.5
    delta = delta + delta.T
    delta = jnp.where(jnp.eye(10, dtype=bool), -jnp.inf, delta)
    partner = np.asarray(assignment.partners(delta))
    assert (partner[partner] == np.arange(10)).all()
    i, j = np.unravel_index(np.argmax(delta), delta.shape)
    assert partner[i] == j


def test_transport_raises_the_score_and_keeps_the_team_sizes():
    scores = jax.random.normal(jax.random.key(0), (24, 4))
    table = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    found = assignment.transport(scores, table, 100)
    assert sorted(found.ravel().tolist()) == list(range(24))

    def worth(table):
        return sum(float(scores[row, team].sum()) for team, row in enumerate(table))

    assert worth(found) > worth(table)
    # the exact optimum: every team repeated once per place
    exact = host(np.repeat(np.asarray(scores), 6, axis=1))
    best = np.asarray(scores)[np.arange(24), exact // 6].sum()
    assert worth(found) >= 0.95 * best


KEY = jax.random.key(0)


def logits(shape=(3, 6, 6), scale=2.0):
    return scale * jax.random.normal(KEY, shape)


def test_rounds_bring_rows_and_columns_to_one():
    x = logits()
    gaps = []
    for rounds in (1, 5, 20):
        p = assignment.sinkhorn(x, rounds)
        np.testing.assert_allclose(p.sum(-2), 1, rtol=1e-5)
        gaps.append(float(jnp.abs(p.sum(-1) - 1).max()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


def test_no_round_is_a_softmax_of_rows():
    x = logits()
    np.testing.assert_allclose(
        assignment.sinkhorn(x, 0), jax.nn.softmax(x, -1), rtol=1e-5
    )


def test_the_scaling_solves_the_entropic_assignment():
    # at the optimum P = diag(u) exp(-C / eps) diag(v): log P - logits is a rank-one sum
    x = logits((5, 5))
    rest = jnp.log(assignment.sinkhorn(x, 200)) - x
    rest = rest - rest[:1] - rest[:, :1] + rest[0, 0]
    np.testing.assert_allclose(rest, 0, atol=1e-4)


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    x = 200 * logits((4, 4))
    value, slope = jax.value_and_grad(lambda x: assignment.sinkhorn(x, 5).sum())(x)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_the_nearest_permutation_is_the_best_of_all():
    p = assignment.sinkhorn(logits((4, 5, 5)), 5)
    found = assignment.nearest(p)
    place = np.arange(5)
    for one, order in zip(np.asarray(p), np.asarray(found), strict=True):
        best = max(one[list(q), place].sum() for q in itertools.permutations(range(5)))
        np.testing.assert_allclose(one[order, place].sum(), best, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_ties_still_give_a_permutation(value):
    found = assignment.nearest(jnp.full((2, 4, 4), value, jnp.float32))
    assert (np.sort(found, -1) == np.arange(4)).all()


def test_one_hot_permutes_as_indexing_does():
    order = jnp.array([2, 0, 1])
    x = jnp.array([[5.0, 6, 7]])
    np.testing.assert_array_equal(x @ assignment.one_hot(order), x[:, order])
