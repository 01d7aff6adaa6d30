import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.ops import proxy

W = jax.random.normal(jax.random.key(0), (6, 8)) * jnp.arange(1.0, 9)
ENERGY = jnp.linspace(0.5, 4, 8)


def test_normalising_gives_unit_rows_and_can_be_undone():
    bar, r, c = proxy.normalise(W)
    np.testing.assert_allclose(jnp.linalg.norm(bar, axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(r[:, None] * bar * c, W, rtol=1e-5)


def test_a_channel_of_zeros_stays_zero():
    w = W.at[2].set(0).at[:, 3].set(0)
    bar, _, _ = proxy.normalise(w)
    assert not bar[2].any() and not bar[:, 3].any() and jnp.isfinite(bar).all()
    assert not proxy.normalise(jnp.zeros((4, 4)))[0].any()


def test_an_input_without_valid_energy_counts_like_the_mean_of_the_others():
    bad = jnp.array([1.0, 3, 0, -1, jnp.nan, jnp.inf, 2, 2])
    got = proxy.channel_weights(bad)
    np.testing.assert_allclose(got, [0.5, 1.5, 1, 1, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(proxy.channel_weights(jnp.zeros(3)), jnp.ones(3))
    huge = proxy.channel_weights(jnp.full(4, 1e37))
    np.testing.assert_allclose(huge, jnp.ones(4), rtol=1e-6)


def test_a_factor_on_the_energy_changes_no_score():
    one, other = proxy.score(W, ENERGY), proxy.score(W, 512 * ENERGY)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_loss_is_zero_for_the_target_and_one_for_zeros():
    assert proxy.loss(W, W, ENERGY) == 0
    assert proxy.loss(jnp.zeros_like(W), W, ENERGY) == 1
    assert proxy.loss(jnp.zeros_like(W), jnp.zeros_like(W), ENERGY) == 0


def test_the_score_is_the_loss_of_removing_one_weight():
    bar, _, _ = proxy.normalise(W)
    d = proxy.channel_weights(ENERGY)
    lost = proxy.squared(bar - bar.at[1, 2].set(0), d)
    np.testing.assert_allclose(lost, proxy.score(W, ENERGY)[1, 2], rtol=1e-5)


def test_channel_weights_are_a_diagonal_gram():
    x = W[::-1]
    got = proxy.loss(x, W, jnp.diag(ENERGY))
    np.testing.assert_allclose(got, proxy.loss(x, W, ENERGY), rtol=1e-5)
