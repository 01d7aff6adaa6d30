import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import gates, masks
from flexhinm_jax.ops import pattern_logits as pl

KEY = jax.random.key(0)


def prior(groups=64, n=2, m=4, seed=1):
    return masks.n_of_m(jax.random.normal(jax.random.key(seed), (groups, m)), n=n, m=m)


@pytest.mark.parametrize(
    ("scaled", "wanted"), [(3.0, (0.832, 0.041, 0.002)), (4.2, (0.943, 0.014, 0.0002))]
)
def test_the_start_has_the_published_confidence(scaled, wanted):
    keep = jnp.array([True, True, False, False])
    p = jax.nn.softmax(scaled * pl.similarity(keep, n=2, m=4))
    overlap = gates.pattern_table(2, 4)[:, :2].sum(1)
    for common, value in zip((2, 1, 0), wanted, strict=True):
        np.testing.assert_allclose(p[overlap == common], value, atol=6e-4)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
@pytest.mark.parametrize("parameters", ["patterns", "weights"])
def test_the_prior_is_the_choice_and_every_sample_when_strong(n, m, parameters):
    keep, form = prior(n=n, m=m), {"n": n, "m": m, "parameters": parameters}
    full = pl.of_patterns(pl.initial(keep, **form), **form)
    np.testing.assert_array_equal(gates.best_pattern(full, n, m), keep)
    for relaxation in ("soft", "straight_through", "expected"):
        certain, tau = 1e6 * full, jnp.float32(4)
        mask = pl.mask(KEY, certain, tau, n=n, m=m, relaxation=relaxation)
        np.testing.assert_array_equal(mask, keep)


@pytest.mark.parametrize("relaxation", ["soft", "straight_through", "expected"])
def test_every_group_keeps_n_in_sum(relaxation):
    logits = jax.random.normal(KEY, (500, 6))
    mask = pl.mask(KEY, logits, jnp.float32(0.7), n=2, m=4, relaxation=relaxation)
    np.testing.assert_allclose(mask.sum(-1), 2, atol=1e-6)
    if relaxation == "straight_through":
        assert set(np.unique(mask)) == {0.0, 1.0}


def test_straight_through_has_the_gradient_of_soft_and_its_pattern_when_cold():
    logits = jax.random.normal(KEY, (50, 6))

    def total(logits, relaxation):
        tau = jnp.float32(0.5)
        mask = pl.mask(KEY, logits, tau, n=2, m=4, relaxation=relaxation)
        return jnp.sum(mask * jnp.arange(4.0))

    soft, hard = (jax.grad(total)(logits, r) for r in ("soft", "straight_through"))
    np.testing.assert_allclose(soft, hard, atol=1e-6)
    cold = pl.mask(KEY, logits, jnp.float32(1e-4), n=2, m=4)
    hard = pl.mask(KEY, logits, jnp.float32(1), n=2, m=4, relaxation="straight_through")
    np.testing.assert_allclose(cold, hard, atol=1e-3)


def test_the_gradient_without_noise_is_that_of_finite_differences():
    with (
        jax.enable_x64(True)
        if hasattr(jax, "enable_x64")
        else jax.experimental.enable_x64()
    ):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)))
        weight = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))

        def loss(x):
            mask = pl.mask(KEY, x, jnp.ones(()), n=2, m=4, relaxation="expected")
            return jnp.sum(jnp.square(mask * weight))

        grad, step = jax.grad(loss)(logits), 1e-6
        for at in ((0, 0), (1, 3), (2, 5)):
            up, down = (loss(logits.at[at].add(s)) for s in (step, -step))
            np.testing.assert_allclose(grad[at], (up - down) / (2 * step), rtol=1e-6)
