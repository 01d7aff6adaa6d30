import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.ops import factorised, saliency
from tests.methods.cases import correlated

W = jax.random.normal(jax.random.key(0), (16, 32)) * jnp.exp(
    jax.random.normal(jax.random.key(1), (32,))
)


def normalised_loss(w, stats):
    bar, r, c = saliency.normalise(W)
    return factorised.loss(
        w / r[:, None] / c, bar, saliency.channel_weights(stats.sq_norm)
    )


def test_it_loses_less_of_the_normalised_weight_than_other_scores():
    stats, key = correlated(), jax.random.key(0)
    losses = {}
    for method in (fh.NoWagP(), fh.Wanda(), fh.Magnitude()):
        plan = method.decide(method.solve(key, W, stats), W)
        losses[type(method).__name__] = normalised_loss(plan.weight, stats)
        np.testing.assert_array_equal(
            plan.weight[plan.support.keep], W[plan.support.keep]
        )
    assert losses["NoWagP"] < min(losses["Wanda"], losses["Magnitude"])


def test_a_dead_input_counts_like_the_mean_of_the_others():
    stats = correlated()
    dead = stats.sq_norm.at[3].set(0)
    mean = dead.sum() / 31
    one = fh.NoWagP().score(W, fh.Stats(dead, stats.mean, stats.count))
    other = fh.NoWagP().score(
        W, fh.Stats(dead.at[3].set(mean), stats.mean, stats.count)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
