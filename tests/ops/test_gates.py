import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexhinm_jax.ops import gates

KEY = jax.random.key(0)
DRAWS = 200_000


@pytest.mark.parametrize(
    ("temperature", "log_alpha", "zero", "one"),
    [
        (2 / 3, 0.0, 0.1682, 0.1682),
        (2 / 3, 2.0, 0.0266, 0.5990),
        (0.2, 0.0, 0.3824, None),
    ],
)
def test_probabilities_are_those_of_the_specification(
    temperature, log_alpha, zero, one
):
    x = jnp.float32(log_alpha)
    assert float(gates.probability_zero(x, temperature)) == pytest.approx(
        zero, abs=6e-5
    )
    if one is not None:
        found = float(gates.probability_one(x, temperature))
        assert found == pytest.approx(one, abs=6e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2 / 3])
@pytest.mark.parametrize("ends", [(-0.1, 1.1), (-0.3, 1.05)])
def test_closed_forms_agree_with_sampling(temperature, ends):
    gamma, zeta = ends
    forms = {"gamma": gamma, "zeta": zeta}
    for log_alpha in (-2.0, 0.3, 1.5):
        x = jnp.full(DRAWS, log_alpha, jnp.float32)
        z = np.asarray(gates.hard_concrete(KEY, x, temperature, **forms))
        assert z.min() >= 0 and z.max() <= 1
        close = {"abs": 4 / DRAWS**0.5}  # eight standard deviations of a fraction
        zero = gates.probability_zero(x[0], temperature, **forms)
        one = gates.probability_one(x[0], temperature, **forms)
        alive = gates.expected_l0(x[0], temperature, **forms)
        assert (z == 0).mean() == pytest.approx(float(zero), **close)
        assert (z == 1).mean() == pytest.approx(float(one), **close)
        assert (z > 0).mean() == pytest.approx(float(alive), **close)
        assert float(alive) == pytest.approx(1 - float(zero), abs=1e-6)


def test_gates_are_finite_for_extreme_locations_and_temperatures():
    x = jnp.array([-80.0, -5.0, 0.0, 5.0, 80.0], jnp.float32)
    for temperature in (1e-3, 0.1, 10.0):
        f = lambda x: jnp.sum(gates.hard_concrete(KEY, x, temperature))  # noqa: B023, E731
        value, grad = jax.value_and_grad(f)(x)
        assert np.isfinite(value) and np.isfinite(grad).all()
        for form in (gates.expected_l0, gates.probability_one):
            assert np.isfinite(jax.grad(lambda x: form(x, temperature).sum())(x)).all()  # noqa: B023


def test_the_gradient_of_the_mean_gate_agrees_with_finite_differences():
    x, h = jnp.float32(0.7), 0.05

    def mean(x):
        return jnp.mean(gates.hard_concrete(KEY, jnp.full(DRAWS, x), 0.5))

    slope = (mean(x + h) - mean(x - h)) / (2 * h)
    assert float(jax.grad(mean)(x)) == pytest.approx(float(slope), rel=2e-3)


@given(
    hnp.arrays(np.float32, (6, 4), elements=st.floats(-5, 5, width=32)),
    st.integers(1, 3),
)
def test_hardening_opens_n_and_agrees_with_the_threshold_where_that_does(x, n):
    hard = np.asarray(gates.harden(jnp.asarray(x), n))
    assert (hard.sum(-1) == n).all()
    threshold = np.asarray(gates.deterministic(jnp.asarray(x))) > 0.5
    clear = (threshold.sum(-1) == n) & (x != 0).all(-1)  # 1e-39 + 1/2 is 1/2
    clear &= (threshold == (x > 0)).all(-1)
    np.testing.assert_array_equal(hard[clear], threshold[clear])
    for row, kept in zip(x, hard, strict=True):
        best = sorted(range(4), key=lambda j: (-row[j], j))[:n]
        assert set(np.flatnonzero(kept)) == set(best)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    x = jax.random.normal(KEY, (50, 6))
    hard = x > 0.3
    f = lambda x: gates.straight_through(jax.nn.sigmoid(x), hard)  # noqa: E731
    np.testing.assert_array_equal(f(x), hard.astype(jnp.float32))
    factor = jnp.arange(6.0)
    got = jax.grad(lambda x: jnp.sum(f(x) * factor))(x)
    s = jax.nn.sigmoid(x)
    np.testing.assert_allclose(got, s * (1 - s) * factor, rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_the_table_lists_every_pattern_once(n, m):
    table = gates.pattern_table(n, m)
    found = [tuple(np.flatnonzero(row)) for row in table]
    assert found == list(itertools.combinations(range(m), n))


def test_cold_gumbel_choices_are_single_patterns_with_softmax_probabilities():
    logits = jnp.array([0.0, 1.0, -1.0, 0.5, 0.0, 0.2], jnp.float32)
    many = jnp.broadcast_to(logits, (DRAWS, 6))
    drawn = gates.gumbel_softmax(KEY, many, 1e-4)
    share = np.asarray(drawn.mean(0))
    np.testing.assert_allclose(share, jax.nn.softmax(logits), atol=4 / DRAWS**0.5)
    mixed = gates.mixed_pattern(gates.gumbel_softmax(KEY, many[:99], 0.7), 2, 4)
    np.testing.assert_allclose(mixed.sum(-1), 2, rtol=1e-5)
    best = gates.best_pattern(logits, 2, 4)
    np.testing.assert_array_equal(best, gates.pattern_table(2, 4)[1])
