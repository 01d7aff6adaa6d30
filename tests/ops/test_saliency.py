import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.ops import saliency

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
