import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.ops import factorised as eager_factorised
from flexhinm_jax.ops import saliency as eager_saliency
from tests.compiled import Compiled

factorised = Compiled(eager_factorised)
saliency = Compiled(eager_saliency)

W = jax.random.normal(jax.random.key(0), (6, 8))
X = jax.random.normal(jax.random.key(1), (32, 8)) * jnp.arange(1, 9)


def test_wanda_is_the_output_change_of_removing_one_weight():
    score = saliency.wanda(W, jnp.sum(X**2, axis=0))
    for o, i in ((0, 0), (3, 5), (5, 7)):
        change = jnp.linalg.norm(X @ W[o] - X @ W[o].at[i].set(0))
        np.testing.assert_allclose(score[o, i], change, rtol=1e-5)


def test_fisher_is_half_the_mean_squared_first_order_change():
    grads = jax.random.normal(jax.random.key(2), (16, 6, 8))
    want = jnp.mean((grads * W) ** 2, axis=0) / 2
    got = saliency.diagonal_fisher(W, jnp.mean(grads**2, axis=0))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_scores_are_float32_for_bfloat16_weights():
    w = W.astype(jnp.bfloat16)
    scores = (
        saliency.magnitude(w),
        saliency.squared(w),
        saliency.wanda(w, jnp.ones(8)),
        saliency.diagonal_fisher(w, jnp.ones((6, 8))),
    )
    assert all(s.dtype == jnp.float32 for s in scores)


SKEWED = jax.random.normal(jax.random.key(0), (6, 8)) * jnp.arange(1.0, 9)
ENERGY = jnp.linspace(0.5, 4, 8)


def test_normalising_gives_unit_rows_and_can_be_undone():
    bar, r, c = saliency.normalise(SKEWED)
    np.testing.assert_allclose(jnp.linalg.norm(bar, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(r[:, None] * bar * c, SKEWED, rtol=1e-5)


def test_a_channel_of_zeros_stays_zero():
    w = SKEWED.at[2].set(0).at[:, 3].set(0)
    bar, _, _ = saliency.normalise(w)
    assert not bar[2].any() and not bar[:, 3].any() and jnp.isfinite(bar).all()
    assert not saliency.normalise(jnp.zeros((4, 4)))[0].any()


def test_an_input_without_valid_energy_counts_like_the_mean_of_the_others():
    bad = jnp.array([1.0, 3, 0, -1, jnp.nan, jnp.inf, 2, 2])
    got = saliency.channel_weights(bad)
    np.testing.assert_allclose(got, [0.5, 1.5, 1, 1, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(saliency.channel_weights(jnp.zeros(3)), jnp.ones(3))
    huge = saliency.channel_weights(jnp.full(4, 1e37))
    np.testing.assert_allclose(huge, jnp.ones(4), rtol=1e-6)


def test_a_factor_on_the_energy_changes_no_score():
    one, other = saliency.nowag(SKEWED, ENERGY), saliency.nowag(SKEWED, 512 * ENERGY)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_factor_on_the_weight_changes_no_score():
    small = SKEWED * 2.0**-20
    np.testing.assert_array_equal(
        saliency.nowag(small, ENERGY), saliency.nowag(SKEWED, ENERGY)
    )


def test_the_loss_is_zero_for_the_target_and_one_for_zeros():
    assert factorised.loss(SKEWED, SKEWED, ENERGY) == 0
    assert factorised.loss(jnp.zeros_like(SKEWED), SKEWED, ENERGY) == 1
    assert factorised.loss(jnp.zeros_like(SKEWED), jnp.zeros_like(SKEWED), ENERGY) == 0


def test_the_score_is_the_loss_of_removing_one_weight():
    bar, _, _ = saliency.normalise(SKEWED)
    d = saliency.channel_weights(ENERGY)
    lost = factorised.weighted_square(bar - bar.at[1, 2].set(0), d)
    np.testing.assert_allclose(lost, saliency.nowag(SKEWED, ENERGY)[1, 2], rtol=1e-5)


def test_channel_weights_are_a_diagonal_gram():
    x = SKEWED[::-1]
    got = factorised.loss(x, SKEWED, jnp.diag(ENERGY))
    np.testing.assert_allclose(got, factorised.loss(x, SKEWED, ENERGY), rtol=1e-5)
