"""RIA and Fisher: the papers' formulas and claims on small cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import saliency
from tests.cases import stats, weight

KEY = jax.random.key(0)


def test_relative_importance_is_the_formula():
    w, norms = np.abs(np.asarray(weight(), np.float64)), np.asarray(stats().sq_norm)
    want = (w / w.sum(0) + w / w.sum(1, keepdims=True)) * norms**0.25
    np.testing.assert_allclose(fh.RIA().score(weight(), stats()), want, rtol=1e-5)


def test_relative_importance_keeps_some_of_a_weak_channel():
    w = weight().at[:, 3].multiply(1e-4)
    keep = lambda m: m.solve(KEY, w, stats(), sparsity=0.5).fixed["support"].keep  # noqa: E731
    assert not keep(fh.Wanda(fh.Unstructured()))[:, 3].any()
    assert keep(fh.RIA(fh.Unstructured()))[:, 3].any()


def test_a_channel_of_zeros_scores_zero():
    w = weight().at[:, 3].set(0).at[2].set(0)
    score = fh.RIA().score(w, stats())
    assert jnp.isfinite(score).all()
    assert (score[:, 3] == 0).all() and (score[2] == 0).all()


def gradients(count=400):
    """Gradients of one sample each, correlated inside blocks of 8 inputs."""
    mix = jax.random.normal(jax.random.key(1), (8, 8)) + jnp.eye(8)
    g = jax.random.normal(jax.random.key(2), (count, 16, 4, 8)) @ mix
    return g.reshape(count, 16, 32)


def test_accumulated_gradients_are_sums_over_samples():
    s = dataclasses.replace(stats(), sq_grad=None)
    g = gradients(5)
    for one in g:
        s = fh.accumulate_gradients(s, one, block=8)
    np.testing.assert_allclose(s.sq_grad, (g**2).sum(0), rtol=1e-5)
    want = jnp.einsum("nobi,nobj->obij", *(2 * [g.reshape(5, 16, 4, 8)]))
    np.testing.assert_allclose(s.fisher, want, rtol=1e-4, atol=1e-4)


def test_a_block_predicts_the_loss_after_compensation():
    fisher = jnp.einsum("nobi,nobj->obij", *(2 * [gradients().reshape(-1, 16, 4, 8)]))
    score = saliency.block_fisher(weight(), fisher, 1e-6)
    f = np.asarray(fisher[3, 1], np.float64)
    w = np.asarray(weight()[3, 8:16], np.float64)
    q, rest = 2, [0, 1, 3, 4, 5, 6, 7]
    # Remove q; the others minimise the quadratic.
    move = np.zeros(8)
    move[q] = -w[q]
    move[rest] = np.linalg.solve(f[np.ix_(rest, rest)], f[rest, q] * w[q])
    np.testing.assert_allclose(score[3, 10], move @ f @ move / 2, rtol=1e-2)
    assert (
        score
        <= saliency.diagonal_fisher(
            weight(), jnp.einsum("obii->obi", fisher).reshape(16, 32)
        )
        * 1.001
    ).all()


def test_missing_gradients_are_refused_with_the_way_to_get_them():
    s = dataclasses.replace(stats(), sq_grad=None)
    with pytest.raises(ValueError, match="accumulate_gradients"):
        fh.Fisher().solve(KEY, weight(), s)
    with pytest.raises(ValueError, match="block=16"):
        fh.Fisher(kind="block").solve(KEY, weight(), stats())
    with pytest.raises(ValueError, match="kind="):
        fh.Fisher(kind="full")


def test_the_block_form_works_with_any_pattern():
    s = dataclasses.replace(stats(), sq_grad=None)
    for one in gradients(20):
        s = fh.accumulate_gradients(s, one, block=8)
    method = fh.Fisher(fh.FlexHiNM(8, permute=None), kind="block")
    state = method.solve(KEY, weight(), s, sparsity=0.6)
    fh.verify(method.decide(state, weight()))
