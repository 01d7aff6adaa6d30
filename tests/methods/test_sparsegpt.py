"""SparseGPT keeps outputs better than masks alone, with every pattern."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import gram
from tests.cases import stats, weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)


def error(method, sparsity=None):
    s = correlated()
    plan = method.decide(method.solve(KEY, weight(), s, sparsity=sparsity), weight())
    fh.verify(plan)
    return float(gram.error(plan.weight, gram.problem(weight(), s, damp=1e-3)))


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (fh.NM(2, 4), None),
        (fh.Transposable(2, 4), None),
        pytest.param(fh.Unstructured(), 0.5, marks=pytest.mark.slow),
        (fh.FlexHiNM(8, permute=None), 0.6),
    ],
    ids=str,
)
def test_it_beats_wanda_on_output_error(pattern, sparsity):
    ours = error(fh.SparseGPT(pattern), sparsity)
    assert ours < 0.8 * error(fh.Wanda(pattern), sparsity)


def test_the_reported_error_is_that_of_the_plan():
    method = fh.SparseGPT(fh.NM(2, 4))
    state = method.solve(KEY, weight(), stats())
    task = gram.problem(weight(), stats(), damp=method.damp)
    want = gram.error(method.decide(state, weight()).weight, task)
    np.testing.assert_allclose(state.fixed["error"], want, rtol=1e-4)


def test_a_first_mask_is_kept_and_still_compensated():
    first = fh.SparseGPT(fh.NM(2, 4), mask="first")
    wanda = fh.Wanda(fh.NM(2, 4)).solve(KEY, weight(), stats())
    state = first.solve(KEY, weight(), stats())
    # The ridge counts in the scores, so near ties may differ.
    same = state.fixed["support"].keep == wanda.fixed["support"].keep
    assert same.mean() > 0.98
    assert error(first) < error(fh.Wanda(fh.NM(2, 4)))


def test_targets_move_the_solution_towards_them():
    s, goal = stats(), weight(1)
    s = dataclasses.replace(s, cross=goal @ s.gram)
    method = fh.SparseGPT(fh.Unstructured(), damp=1e-3)
    plan = method.decide(method.solve(KEY, weight(), s, sparsity=0.1), weight())
    assert jnp.abs(plan.weight - goal).mean() < 0.5 * jnp.abs(weight() - goal).mean()


def test_centring_returns_a_bias_that_restores_the_mean():
    method = fh.SparseGPT(fh.NM(2, 4), center=True)
    plan = method.decide(method.solve(KEY, weight(), stats()), weight())
    mean = stats().mean
    np.testing.assert_allclose(
        plan.weight @ mean + plan.bias, weight() @ mean, atol=1e-4
    )


def test_bad_grams_never_give_nan():
    h = stats().gram
    for bad in (jnp.zeros_like(h), jnp.ones_like(h), -h, jnp.eye(32) - 0.04):
        s = dataclasses.replace(stats(), gram=bad)
        for method in (fh.SparseGPT(), fh.ALPS(), fh.Refit(fh.Wanda())):
            state = method.solve(KEY, weight(), s)
            fh.verify(method.decide(state, weight()))
            assert state.fixed["damping"] >= method.damp * 0.99


def test_nan_in_the_weight_is_refused_with_its_place():
    w = weight().at[2, 5].set(jnp.nan)
    with pytest.raises(ValueError, match=r"NaN .* first at \(2, 5\)"):
        fh.SparseGPT().solve(KEY, w, stats())


def test_norms_alone_are_refused():
    s = dataclasses.replace(stats(), gram=None)
    with pytest.raises(ValueError, match="calibrate with gram=True"):
        fh.SparseGPT().solve(KEY, weight(), s)


@pytest.mark.parametrize(
    "wrong", [{"damp": 0.0}, {"block": 0}, {"mask": "best"}, {"precision": "int8"}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        fh.SparseGPT(**wrong)


def test_float64_needs_its_mode_and_then_agrees():
    method = fh.SparseGPT(fh.NM(2, 4), precision="float64")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        method.solve(KEY, weight(), stats())
    single = dataclasses.replace(method, precision="float32")
    w, s = weight(), stats()
    want = single.solve(KEY, w, s).fixed["weight"]
    with jax.enable_x64(True):
        got = method.solve(KEY, w, s).fixed["weight"]
    np.testing.assert_allclose(got, want, atol=1e-3)
