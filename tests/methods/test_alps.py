"""ALPS finds better supports than a sweep, and settles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import gram
from tests.cases import weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)
CASES = pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (fh.NM(2, 4), None),
        pytest.param(fh.Transposable(2, 4), None, marks=pytest.mark.slow),
        pytest.param(fh.Unstructured(), 0.5, marks=pytest.mark.slow),
        (fh.FlexHiNM(8, permute=None), 0.6),
    ],
    ids=str,
)


def solve(method, sparsity=None):
    state = method.solve(KEY, weight(), correlated(), sparsity=sparsity)
    plan = method.decide(state, weight())
    fh.verify(plan)
    return float(state.fixed["error"]), plan


@CASES
def test_it_beats_sparsegpt_and_refitted_wanda(pattern, sparsity):
    ours, _ = solve(fh.ALPS(pattern), sparsity)
    assert ours < solve(fh.SparseGPT(pattern), sparsity)[0]
    assert ours < solve(fh.Refit(fh.Wanda(pattern), steps=30), sparsity)[0] * 1.01


def test_the_iteration_stops_by_itself():
    few, _ = solve(fh.ALPS(iterations=150))
    many, _ = solve(fh.ALPS(iterations=3000))
    assert few == many


def test_the_state_says_how_the_iteration_went():
    done, out = (
        fh.ALPS(iterations=n).solve(KEY, weight(), correlated()).fixed for n in (300, 6)
    )
    assert 6 < int(done["steps"]) < 300 and bool(done["settled"])
    assert int(out["steps"]) == 6 and not bool(out["settled"])
    assert done["steps"].dtype == jnp.int32 and done["settled"].dtype == bool


def test_order_and_regions_are_those_of_the_score():
    pattern = fh.FlexHiNM(8, permute=None)
    _, plan = solve(fh.ALPS(pattern), 0.6)
    task = gram.problem(weight(), correlated(), damp=0.01)
    scores = jnp.square(task.weight) * jnp.diag(task.gram)
    first = pattern.project(KEY, scores, 0.6)
    np.testing.assert_array_equal(plan.support.regions.in_order, first.regions.in_order)
    assert (plan.support.keep != first.keep).any()


@pytest.mark.parametrize(
    "wrong", [{"rho": 0.0}, {"growth": (1.0, 1.2, 1.3)}, {"iterations": 0}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        fh.ALPS(**wrong)
