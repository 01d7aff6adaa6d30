"""Coordinate descent over group patterns against brute force."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import descent, gram, masks
from tests.cases import stats, weight
from tests.compiled import compiled

LIVE = jnp.ones((32,), bool)


@functools.cache
def problem():
    return gram.problem(weight(), stats(), damp=0.01)


def objective(b, task):
    """Error of every row, float64."""
    delta = np.asarray(b, np.float64) - np.asarray(task.weight, np.float64)
    return np.sum(delta @ np.asarray(task.gram, np.float64) * delta, axis=1)


def start(task, n=2, m=4):
    keep = masks.n_of_m(jnp.abs(task.weight), n=n, m=m)
    return jnp.where(keep, task.weight, 0), keep


def sweep(task, b, keep, step, unit, live=LIVE, within=None):
    within = jnp.ones(b.shape, bool) if within is None else within
    fit = descent.Fit(b, keep, within, task.weight, task.gram, task.cross)
    return compiled(descent.sweep)(fit, live, step, unit)


@pytest.mark.parametrize("solve", [False, True])
def test_the_best_pattern_of_one_group_is_that_of_brute_force(solve):
    task = problem()
    b, keep = start(task)
    first = jnp.arange(32) < 4  # only the first group may move
    got, _ = sweep(task, b, keep, descent.best_pattern(2, 4, solve), 4, first)
    h, g = (np.asarray(x, np.float64) for x in (task.gram, task.cross))
    for row in range(16):
        best = np.inf
        for pair in itertools.combinations(range(4), 2):
            trial = np.asarray(b[row], np.float64)
            trial[:4] = 0
            on = list(pair)
            if solve:
                free = g[row, on] - h[on] @ trial
                trial[on] = np.linalg.solve(h[np.ix_(on, on)], free)
            else:
                trial[on] = np.asarray(task.weight)[row, on]
            delta = trial - np.asarray(task.weight[row], np.float64)
            best = min(best, delta @ h @ delta)
        np.testing.assert_allclose(objective(got, task)[row], best, rtol=1e-3)


@pytest.mark.parametrize("solve", [False, True])
@pytest.mark.parametrize("name", ["pattern", "swap", "cycle"])
def test_no_sweep_raises_the_error_and_the_pattern_holds(name, solve):
    task = problem()
    b, keep = start(task)
    step = {
        "pattern": descent.best_pattern(2, 4, solve),
        "swap": descent.best_swap(solve),
        "cycle": descent.best_cycle(4, solve),
    }[name]
    if name == "cycle":
        keep = jnp.tile(jnp.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool), (8, 8))
        b = jnp.where(keep, task.weight, 0)
    first = before = objective(b, task).sum()
    columns = keep.reshape(4, 4, 32).sum(1)
    for _ in range(3):
        b, keep = sweep(task, b, keep, step, 4)
        after = objective(b, task).sum()
        assert after <= before * (1 + 1e-4)
        before = after
        assert (jnp.where(keep, 0, b) == 0).all()
        assert (keep.reshape(16, 8, 4).sum(-1) == 2).all()
        if name == "cycle":
            np.testing.assert_array_equal(keep.reshape(4, 4, 32).sum(1), columns)
    assert after < 0.9 * first


def test_columns_that_are_not_live_stay():
    task = problem()
    b, keep = start(task)
    live = jnp.arange(32) >= 8
    got, kept = sweep(task, b, keep, descent.best_pattern(2, 4, True), 4, live)
    np.testing.assert_array_equal(got[:, :8], b[:, :8])
    np.testing.assert_array_equal(kept[:, :8], keep[:, :8])


@pytest.mark.parametrize("name", ["pattern", "swap", "cycle"])
def test_what_is_not_allowed_never_comes_back(name):
    task = problem()
    b, keep = start(task)
    within = masks.n_of_m(jnp.abs(task.weight), n=3, m=4)
    step = {
        "pattern": descent.best_pattern(2, 4, True),
        "swap": descent.best_swap(True),
        "cycle": descent.best_cycle(4, True),
    }[name]
    got, kept = sweep(task, b, keep, step, 4, within=within)
    assert not (kept & ~within).any() and (kept != keep).any()
    assert (kept.reshape(16, 8, 4).sum(-1) == 2).all()
    assert objective(got, task).sum() < objective(b, task).sum()


def test_all_patterns_are_listed_once():
    table = descent.patterns(4, 8)
    assert table.shape == (descent.MAX_PATTERNS, 8)
    assert (table.sum(1) == 4).all() and len(np.unique(table, axis=0)) == 70
