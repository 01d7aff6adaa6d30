import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import assignment


def total(gain, choice):
    return np.take_along_axis(np.asarray(gain), np.asarray(choice)[:, None], 1).sum()


def gains(seed, g=9):
    return jax.random.uniform(jax.random.key(seed), (g, g))


@pytest.mark.parametrize("seed", range(5))
def test_hungarian_and_scipy_find_the_same_total(seed):
    gain = gains(seed)
    want = total(gain, assignment.host(np.asarray(gain)))
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
    assert total(gain, found) >= 0.9 * total(gain, assignment.host(gain))


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
    exact = assignment.host(np.repeat(np.asarray(scores), 6, axis=1))
    best = np.asarray(scores)[np.arange(24), exact // 6].sum()
    assert worth(found) >= 0.95 * best
