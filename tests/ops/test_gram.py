"""Factors, damping ladder and least squares against plain linear algebra."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import gram
from tests.cases import stats, weight


def exact(h):
    return np.asarray(h, np.float64)


def test_the_inverse_factor_is_upper_and_squares_to_the_inverse():
    h = stats().gram + jnp.eye(32)
    u = gram.inverse_factor(gram.reversed_cholesky(h))
    np.testing.assert_array_equal(u, jnp.triu(u))
    np.testing.assert_allclose(exact(u.T) @ exact(u) @ exact(h), np.eye(32), atol=2e-3)


def test_the_inverse_is_that_of_the_damped_matrix():
    h = stats().gram
    product = exact(gram.inverse(h, 0.01)) @ exact(gram.damped(h, 0.01)[0])
    np.testing.assert_allclose(product, np.eye(32), atol=2e-3)


def test_a_permuted_factor_belongs_to_the_permuted_matrix():
    h = stats().gram + jnp.eye(32)
    order = jax.random.permutation(jax.random.key(0), 32)
    u = exact(gram.permuted_inverse_factor(h, order))
    p = exact(h)[order][:, order]
    np.testing.assert_allclose(u.T @ u @ p, np.eye(32), atol=2e-3)


def test_a_definite_matrix_is_damped_once():
    h = stats().gram
    damped, _, fraction, ridge = gram.damped(h, 0.01)
    np.testing.assert_allclose(fraction, 0.01)
    np.testing.assert_allclose(ridge, 0.01 * jnp.diag(h).mean(), rtol=1e-6)
    np.testing.assert_allclose(damped, h + ridge * jnp.eye(32), rtol=1e-6)
    assert gram.damping_message(float(fraction), 0.01) == ""


@pytest.mark.parametrize("kind", ["indefinite", "singular", "zero", "nan", "hopeless"])
def test_the_ladder_ends_with_a_finite_factor(kind):
    h = {
        "indefinite": jnp.eye(32) - 0.04,  # smallest eigenvalue -0.28
        "singular": jnp.ones((32, 32)),
        "zero": jnp.zeros((32, 32)),
        "nan": stats().gram.at[3, 3].set(jnp.nan),
        "hopeless": jnp.eye(32) + 1e9 * (1 - jnp.eye(32)),
    }[kind]
    damped, factor, fraction, _ = jax.jit(gram.damped)(h, 0.01)
    assert jnp.isfinite(damped).all() and jnp.isfinite(factor).all()
    product = exact(factor) @ exact(factor).T
    np.testing.assert_allclose(
        product, exact(damped)[::-1, ::-1], rtol=1e-3, atol=1e-4 * product.max()
    )
    if kind == "indefinite":
        assert float(fraction) > 0.28
        assert "raise damp" in gram.damping_message(float(fraction), 0.01)
    if kind == "hopeless":
        assert np.isinf(fraction)
        assert "only its diagonal" in gram.damping_message(float(fraction), 0.01)


def test_dead_inputs_get_weight_zero():
    h = stats().gram.at[5].set(0).at[:, 5].set(0)
    task = gram.problem(weight(), dataclasses.replace(stats(), gram=h), damp=0.01)
    assert (task.weight[:, 5] == 0).all()
    assert jnp.isfinite(gram.solve(task)).all()


def test_without_targets_the_dense_weight_is_the_solution():
    task = gram.problem(weight(), stats(), damp=0.01)
    assert not task.has_targets
    np.testing.assert_allclose(gram.solve(task), weight(), atol=1e-3)


def test_with_targets_the_solution_is_ridge_regression_towards_the_weight():
    s, w = stats(), weight()
    other = dataclasses.replace(s, cross=weight(1) @ s.gram)
    task = gram.problem(w, other, damp=0.1)
    ridge = 0.1 * np.trace(exact(s.gram)) / 32
    h = exact(s.gram) + ridge * np.eye(32)
    want = (exact(other.cross) + ridge * exact(w)) @ np.linalg.inv(h)
    np.testing.assert_allclose(gram.solve(task), want, atol=1e-3)


def test_centring_and_the_bias_leave_no_mean_error():
    x = jax.random.normal(jax.random.key(0), (200, 32)) + 2.0
    w, pruned = weight(), weight(1)
    s = dataclasses.replace(
        stats(), gram=x.T @ x, mean=x.mean(0), count=jnp.float32(200)
    )
    task = gram.problem(w, s, damp=1e-6, center=True)
    centred = x - x.mean(0)
    np.testing.assert_allclose(task.gram, centred.T @ centred, rtol=1e-2, atol=0.1)
    out = x @ pruned.T + gram.bias(w, pruned, s)
    np.testing.assert_allclose(out.mean(0), (x @ w.T).mean(0), atol=1e-3)


def test_conjugate_gradients_reach_the_least_squares_weights():
    task = gram.problem(weight(), stats(), damp=0.01)
    keep = weight(4) > 0
    solved = gram.refit(task.weight, keep, task.gram, task.cross, 60)
    for row in range(4):
        on = np.flatnonzero(keep[row])
        h = exact(task.gram)[np.ix_(on, on)]
        want = np.linalg.solve(h, exact(task.cross)[row, on])
        np.testing.assert_allclose(solved[row, on], want, atol=2e-3)
    assert (jnp.where(keep, 0, solved) == 0).all()


def test_every_step_lowers_the_error():
    task = gram.problem(weight(), stats(), damp=0.01)
    keep = weight(4) > 0
    errors = [
        float(
            gram.error(
                gram.refit(task.weight, keep, task.gram, task.cross, steps),
                task,
            )
        )
        for steps in (0, 1, 3, 10)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_an_empty_support_stays_zero():
    task = gram.problem(weight(), stats(), damp=0.01)
    none = jnp.zeros((16, 32), bool)
    solved = gram.refit(task.weight, none, task.gram, task.cross, 5)
    assert (solved == 0).all()


def test_a_factor_solves_for_the_rows_of_a_matrix():
    h = np.array([[4, 1, 0], [1, 3, 1], [0, 1, 2]], np.float32)
    g = np.array([[1, 2, 3], [-1, 0, 5]], np.float32)
    solved = gram.solve_by(gram.factor_of(jnp.asarray(h)), jnp.asarray(g))
    np.testing.assert_allclose(solved, g @ np.linalg.inv(h), rtol=1e-5, atol=1e-6)


def test_a_matrix_that_is_not_definite_has_the_factor_of_its_diagonal():
    h = jnp.asarray([[4, 9], [9, 9]], jnp.float32)
    np.testing.assert_array_equal(gram.factor_of(h), [[2, 0], [0, 3]])


@pytest.mark.parametrize("columns", [8, 600, 1100])
def test_the_energy_of_strips_is_that_of_the_outputs(columns):
    w = jax.random.normal(jax.random.key(1), (2, 3, columns))
    x = jax.random.normal(jax.random.key(2), (2, 5, columns))
    h = jnp.swapaxes(x, 1, 2) @ x
    want = jnp.sum(jnp.square(x @ jnp.swapaxes(w, 1, 2)), axis=(1, 2))
    np.testing.assert_allclose(gram.energy(w, h), want, rtol=1e-5)
