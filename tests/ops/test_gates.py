import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexhinm_jax.ops import gates as eager
from flexhinm_jax.ops import masks
from tests.compiled import Compiled

gates = Compiled(eager, plain=("pattern_table",))

KEY = jax.random.key(0)
group_ranks = jax.jit(masks.group_ranks)
DRAWS = 200_000


def hard_concrete(key, log_alpha, temperature):
    """Sampled gates."""
    noise = gates.logistic(key, log_alpha.shape)
    return gates.stretch((noise + log_alpha) / temperature)


def probability_zero(log_alpha, temperature):
    """P(z = 0) of a Hard Concrete gate."""
    return jax.nn.sigmoid(temperature * math.log(-gates.GAMMA / gates.ZETA) - log_alpha)


def probability_one(log_alpha, temperature):
    """P(z = 1): s >= (1 - gamma) / (zeta - gamma)."""
    edge = math.log((1 - gates.GAMMA) / (gates.ZETA - 1))
    return jax.nn.sigmoid(log_alpha - temperature * edge)


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
    assert float(probability_zero(x, temperature)) == pytest.approx(zero, abs=6e-5)
    if one is not None:
        found = float(probability_one(x, temperature))
        assert found == pytest.approx(one, abs=6e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2 / 3])
def test_closed_forms_agree_with_sampling(temperature):
    for log_alpha in (-2.0, 0.3, 1.5):
        x = jnp.full(DRAWS, log_alpha, jnp.float32)
        z = np.asarray(hard_concrete(KEY, x, temperature))
        assert z.min() >= 0 and z.max() <= 1
        close = {"abs": 4 / DRAWS**0.5}  # eight standard deviations of a fraction
        zero = probability_zero(x[0], temperature)
        one = probability_one(x[0], temperature)
        alive = gates.expected_l0(x[0], temperature)
        assert (z == 0).mean() == pytest.approx(float(zero), **close)
        assert (z == 1).mean() == pytest.approx(float(one), **close)
        assert (z > 0).mean() == pytest.approx(float(alive), **close)
        assert float(alive) == pytest.approx(1 - float(zero), abs=1e-6)


def test_gates_are_finite_for_extreme_locations_and_temperatures():
    x = jnp.array([-80.0, -5.0, 0.0, 5.0, 80.0], jnp.float32)
    for temperature in (1e-3, 0.1, 10.0):
        f = lambda x: jnp.sum(hard_concrete(KEY, x, temperature))  # noqa: B023, E731
        value, grad = jax.value_and_grad(f)(x)
        assert np.isfinite(value) and np.isfinite(grad).all()
        for form in (gates.expected_l0, probability_one):
            assert np.isfinite(jax.grad(lambda x: form(x, temperature).sum())(x)).all()  # noqa: B023


def test_the_gradient_of_the_mean_gate_agrees_with_finite_differences():
    x, h = jnp.float32(0.7), 0.05

    def mean(x):
        return jnp.mean(hard_concrete(KEY, jnp.full(DRAWS, x), 0.5))

    slope = (mean(x + h) - mean(x - h)) / (2 * h)
    assert float(jax.grad(mean)(x)) == pytest.approx(float(slope), rel=2e-3)


@given(
    hnp.arrays(
        np.float32,
        (6, 4),
        # XLA compares subnormal numbers as zeros.
        elements=st.floats(-5, 5, width=32, allow_subnormal=False),
    ),
    st.integers(1, 3),
)
def test_hardening_opens_n_and_agrees_with_the_threshold_where_that_does(x, n):
    hard = np.asarray(group_ranks(x)) < n
    assert (hard.sum(-1) == n).all()
    threshold = np.asarray(gates.stretch(jnp.asarray(x))) > 0.5
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


def prior(groups=64, n=2, m=4, seed=1):
    return masks.n_of_m(jax.random.normal(jax.random.key(seed), (groups, m)), n=n, m=m)


@pytest.mark.parametrize(
    ("scaled", "wanted"), [(3.0, (0.832, 0.041, 0.002)), (4.2, (0.943, 0.014, 0.0002))]
)
def test_the_start_has_the_published_confidence(scaled, wanted):
    keep = jnp.array([True, True, False, False])
    p = jax.nn.softmax(scaled * gates.similarity(keep, n=2, m=4))
    overlap = gates.pattern_table(2, 4)[:, :2].sum(1)
    for common, value in zip((2, 1, 0), wanted, strict=True):
        np.testing.assert_allclose(p[overlap == common], value, atol=6e-4)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
@pytest.mark.parametrize("parameters", ["patterns", "weights"])
def test_the_prior_is_the_choice_and_every_sample_when_strong(n, m, parameters):
    keep, form = prior(n=n, m=m), {"n": n, "m": m, "parameters": parameters}
    full = gates.logits_of_patterns(gates.initial_logits(keep, **form), **form)
    np.testing.assert_array_equal(gates.best_pattern(full, n, m), keep)
    for relaxation in ("soft", "straight_through", "expected"):
        certain, tau = 1e6 * full, jnp.float32(4)
        mask = gates.pattern_mask(KEY, certain, tau, n=n, m=m, relaxation=relaxation)
        np.testing.assert_array_equal(mask, keep)


@pytest.mark.parametrize("relaxation", ["soft", "straight_through", "expected"])
def test_every_group_keeps_n_in_sum(relaxation):
    logits = jax.random.normal(KEY, (500, 6))
    mask = gates.pattern_mask(
        KEY, logits, jnp.float32(0.7), n=2, m=4, relaxation=relaxation
    )
    np.testing.assert_allclose(mask.sum(-1), 2, atol=1e-6)
    if relaxation == "straight_through":
        assert set(np.unique(mask)) == {0.0, 1.0}


def test_straight_through_has_the_gradient_of_soft_and_its_pattern_when_cold():
    logits = jax.random.normal(KEY, (50, 6))

    def total(logits, relaxation):
        tau = jnp.float32(0.5)
        mask = gates.pattern_mask(KEY, logits, tau, n=2, m=4, relaxation=relaxation)
        return jnp.sum(mask * jnp.arange(4.0))

    soft, hard = (jax.grad(total)(logits, r) for r in ("soft", "straight_through"))
    np.testing.assert_allclose(soft, hard, atol=1e-6)
    cold = gates.pattern_mask(KEY, logits, jnp.float32(1e-4), n=2, m=4)
    hard = gates.pattern_mask(
        KEY, logits, jnp.float32(1), n=2, m=4, relaxation="straight_through"
    )
    np.testing.assert_allclose(cold, hard, atol=1e-3)


def test_the_gradient_without_noise_is_that_of_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)))
        weight = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))

        def loss(x):
            mask = gates.pattern_mask(
                KEY, x, jnp.ones(()), n=2, m=4, relaxation="expected"
            )
            return jnp.sum(jnp.square(mask * weight))

        grad, step = jax.grad(loss)(logits), 1e-6
        for at in ((0, 0), (1, 3), (2, 5)):
            up, down = (loss(logits.at[at].add(s)) for s in (step, -step))
            np.testing.assert_allclose(grad[at], (up - down) / (2 * step), rtol=1e-6)


LOGITS = jnp.array([0.3, -0.2, 0.5, 0.1])


def subset(items, m=4):
    return jnp.asarray(np.isin(np.arange(m), items))


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
    value, grad = jax.value_and_grad(lambda x: gates.log_prob(x, keep, n=2))(LOGITS)
    np.testing.assert_allclose(value, -1.3293316402, atol=1e-6)
    want = [0.510614, -0.406410, 0.444392, -0.548596]
    np.testing.assert_allclose(grad, want, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(4, 1), (4, 2), (4, 3), (6, 3), (8, 4), (4, 4)])
def test_the_sum_over_subsets_is_the_sum_over_orders(m, n):
    logits = 2 * jax.random.normal(jax.random.key(m + n), (m,))
    sets = list(itertools.combinations(range(m), n))
    keep = jnp.stack([subset(list(s), m) for s in sets])
    found = gates.log_prob(jnp.broadcast_to(logits, keep.shape), keep, n=n)
    wanted = [brute(logits, s) for s in sets]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(found).sum(), 1, atol=1e-5)


def test_draws_have_the_probabilities_of_the_closed_form():
    draws = gates.draw(jax.random.key(0), jnp.broadcast_to(LOGITS, (200_000, 4)), n=2)
    keep = gates.members(draws, m=4)
    assert bool(jnp.all(keep.sum(-1) == 2))
    for items in itertools.combinations(range(4), 2):
        seen = float(jnp.all(keep == subset(list(items)), -1).mean())
        assert abs(seen - math.exp(brute(LOGITS, items))) < 4e-3


def test_the_score_is_unbiased():
    sets = list(itertools.combinations(range(4), 2))
    keep = jnp.stack([subset(list(s)) for s in sets])
    worth = jnp.arange(6.0)

    def expected(logits):
        logs = gates.log_prob(jnp.broadcast_to(logits, keep.shape), keep, n=2)
        return jnp.sum(jnp.exp(logs) * worth)

    def score(logits):
        logs = gates.log_prob(jnp.broadcast_to(logits, keep.shape), keep, n=2)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logs) * worth) * logs)

    np.testing.assert_allclose(
        jax.grad(score)(LOGITS), jax.grad(expected)(LOGITS), atol=1e-6
    )


def test_confident_logits_stay_finite():
    logits = jnp.array([40.0, 40.0, -40.0, -40.0])
    value, grad = jax.value_and_grad(lambda x: gates.log_prob(x, subset([0, 1]), n=2))(
        logits
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert np.all(np.isfinite(grad))
    far = gates.log_prob(logits, subset([2, 3]), n=2)
    assert np.isfinite(far) and far < -100


def test_a_set_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="keeps 3 of 4: a draw of n=2"):
        eager.log_prob(LOGITS, subset([0, 1, 2]), n=2)
    with pytest.raises(ValueError, match="n=8: the sum .* stops at n=6; draw fewer"):
        eager.log_prob(jnp.zeros((16,)), jnp.arange(16) < 8, n=8)
