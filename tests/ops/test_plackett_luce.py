import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import plackett_luce as pl

LOGITS = jnp.array([0.3, -0.2, 0.5, 0.1])


def subset(items, m=4):
    return jnp.zeros((m,), bool).at[jnp.array(items)].set(True)


def brute(logits, items):
    """Sum over all orders, in float64."""
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum()
    total = 0.0
    for order in itertools.permutations(items):
        left, chance = 1.0, 1.0
        for j in order:
            chance *= p[j] / left
            left -= p[j]
        total += chance
    return math.log(total)


def test_the_published_value_and_gradient():
    keep = subset([0, 2])
    value, grad = jax.value_and_grad(lambda x: pl.log_prob(x, keep, n=2))(LOGITS)
    np.testing.assert_allclose(value, -1.3293316402, atol=1e-6)
    want = [0.510614, -0.406410, 0.444392, -0.548596]
    np.testing.assert_allclose(grad, want, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(4, 1), (4, 2), (4, 3), (6, 3), (8, 4), (4, 4)])
def test_the_sum_over_subsets_is_the_sum_over_orders(m, n):
    logits = 2 * jax.random.normal(jax.random.key(m + n), (m,))
    sets = list(itertools.combinations(range(m), n))
    keep = jnp.stack([subset(list(s), m) for s in sets])
    found = pl.log_prob(jnp.broadcast_to(logits, keep.shape), keep, n=n)
    wanted = [brute(logits, s) for s in sets]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(found).sum(), 1, atol=1e-5)


def test_draws_have_the_probabilities_of_the_closed_form():
    draws = pl.sample(jax.random.key(0), jnp.broadcast_to(LOGITS, (200_000, 4)), n=2)
    keep = pl.members(draws, m=4)
    assert bool(jnp.all(keep.sum(-1) == 2))
    for items in itertools.combinations(range(4), 2):
        seen = float(jnp.all(keep == subset(list(items)), -1).mean())
        assert abs(seen - math.exp(brute(LOGITS, items))) < 4e-3


def test_the_orders_of_a_set_add_up_to_the_set():
    orders = jnp.array(list(itertools.permutations([0, 2, 3])), jnp.int32)
    each = pl.ordered_log_prob(jnp.broadcast_to(LOGITS, (6, 4)), orders)
    together = pl.log_prob(LOGITS, subset([0, 2, 3]), n=3)
    np.testing.assert_allclose(jax.nn.logsumexp(each), together, atol=1e-6)


def test_the_score_is_unbiased():
    sets = list(itertools.combinations(range(4), 2))
    keep = jnp.stack([subset(list(s)) for s in sets])
    worth = jnp.arange(6.0)

    def expected(logits):
        logs = pl.log_prob(jnp.broadcast_to(logits, keep.shape), keep, n=2)
        return jnp.sum(jnp.exp(logs) * worth)

    def score(logits):
        logs = pl.log_prob(jnp.broadcast_to(logits, keep.shape), keep, n=2)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logs) * worth) * logs)

    np.testing.assert_allclose(
        jax.grad(score)(LOGITS), jax.grad(expected)(LOGITS), atol=1e-6
    )


def test_confident_logits_stay_finite():
    logits = jnp.array([40.0, 40.0, -40.0, -40.0])
    value, grad = jax.value_and_grad(lambda x: pl.log_prob(x, subset([0, 1]), n=2))(
        logits
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert np.all(np.isfinite(grad))
    far = pl.log_prob(logits, subset([2, 3]), n=2)
    assert np.isfinite(far) and far < -100


def test_a_set_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="keeps 3 of 4: a draw of n=2"):
        pl.log_prob(LOGITS, subset([0, 1, 2]), n=2)
    with pytest.raises(ValueError, match="ordered_log_prob"):
        pl.log_prob(jnp.zeros((16,)), jnp.arange(16) < 8, n=8)
