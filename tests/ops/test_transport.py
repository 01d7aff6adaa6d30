"""The solver of transposable masks against exact answers and its own certificate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog

from flexhinm_jax.ops import transport as eager
from tests.compiled import Compiled

transport = Compiled(eager, plain=("mask_table",))


@functools.partial(jax.jit, static_argnames=("n", "stages", "exchanges", "chunk"))
def solve(a, n, stages=transport.ACCURATE, exchanges=8, chunk=None):
    return eager.solve(
        a, n=n, stages=stages, exchanges=exchanges, chunk=chunk, certify=True
    )


def tiles(m, count, dist="normal", seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, m, m)
    a = rng.standard_normal(shape) if dist == "normal" else rng.standard_t(3, shape)
    return np.abs(a).astype(np.float32)


def optimum(a, n):
    """Exact best score of every tile by linear programming."""
    m = a.shape[-1]
    rows = sparse.kron(sparse.eye(m), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, m)), sparse.eye(m))
    sums = sparse.vstack([rows, columns]).tocsr()
    best = [
        linprog(
            -tile.ravel().astype(np.float64),
            A_eq=sums,
            b_eq=np.full(2 * m, n),
            bounds=(0, 1),
            method="highs-ds",
        ).fun
        for tile in a
    ]
    return -np.array(best)


def assert_sums(keep, n):
    keep = np.asarray(keep)
    assert (keep.sum(1) == n).all() and (keep.sum(2) == n).all()


def test_cutting_into_tiles_and_back_is_exact():
    x = jnp.arange(24 * 16.0).reshape(24, 16)
    cut = transport.tiles(x, 8)
    np.testing.assert_array_equal(cut[1], x[:8, 8:])
    np.testing.assert_array_equal(transport.untile(cut, x.shape), x)


def test_two_of_four_has_ninety_masks():
    assert transport.mask_table(2, 4).shape == (90, 4, 4)
    assert transport.mask_table(1, 4).shape == (24, 4, 4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiles_of_four_are_solved_exactly(n):
    a = tiles(4, 30, "t3")
    found = solve(jnp.asarray(a), n)
    assert_sums(found.keep, n)
    scores = (a * np.asarray(found.keep)).sum((1, 2))
    np.testing.assert_allclose(scores, optimum(a, n), rtol=1e-5)


@pytest.mark.parametrize("dist", ["normal", "t3"])
@pytest.mark.parametrize(
    ("n", "m", "count"), [(4, 8, 40), pytest.param(8, 16, 12, marks=pytest.mark.slow)]
)
def test_the_loss_to_the_exact_optimum_is_small(n, m, count, dist):
    a = tiles(m, count, dist)
    best = optimum(a, n).sum()
    kept = lambda s: (a * np.asarray(s.keep)).sum()  # noqa: E731
    plain = solve(jnp.asarray(a), n, stages=((20.0, 50),), exchanges=0)
    full = solve(jnp.asarray(a), n)
    assert 1 - kept(plain) / best < 2.5e-3  # few tiles: 0.15 % is for hundreds
    assert 1 - kept(full) / best < 5e-4
    assert_sums(plain.keep, n)
    assert_sums(full.keep, n)


def test_one_of_m_is_an_assignment():
    a = tiles(16, 8)
    found = np.asarray(solve(jnp.asarray(a), 1).keep)
    assert_sums(found, 1)
    best = sum(t[linear_sum_assignment(-t)].sum() for t in a)
    assert 1 - (a * found).sum() / best < 2e-3


@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 5), (6, 8)])
def test_sums_are_exact_and_the_bound_holds_for_any_scores(n, m):
    rng = np.random.default_rng(n * 10 + m)
    shape = (8, m, m)
    kinds = [
        np.zeros(shape),
        np.ones(shape),
        rng.integers(0, 3, shape),
        rng.random(shape) * (rng.random(shape) < 0.2),
        np.exp(12 * rng.standard_normal(shape)),
    ]
    a = np.concatenate(kinds).astype(np.float32)
    found = solve(jnp.asarray(a), n, stages=((20.0, 10),), exchanges=2)
    assert_sums(found.keep, n)
    kept = (a * np.asarray(found.keep)).sum((1, 2))
    assert (np.asarray(found.bound) >= kept * (1 - 1e-5)).all()


def test_the_mask_does_not_depend_on_the_scale():
    a = jnp.asarray(tiles(8, 20))
    want = solve(a, 4).keep
    for scale in (2.0**-40, 2.0**40):
        np.testing.assert_array_equal(solve(a * scale, 4).keep, want)


def test_chunks_give_the_same_masks():
    a = jnp.asarray(tiles(8, 21))
    want = solve(a, 4).keep
    np.testing.assert_array_equal(solve(a, 4, chunk=4).keep, want)


def test_the_certificate_is_tight():
    a = tiles(8, 60)
    found = solve(jnp.asarray(a), 4)
    kept = (a * np.asarray(found.keep)).sum()
    assert 0 <= 1 - kept / np.asarray(found.bound).sum() < 1.5e-3


def test_scaling_sweeps_equal_the_log_domain_form():
    a = jnp.moveaxis(jnp.asarray(tiles(8, 10)), 0, -1)
    a = a / jnp.mean(a, (0, 1))
    k = 10.0
    u, v = (k * x for x in transport.thresholds(a, 4))
    for _ in range(40):
        logs = jnp.minimum(k * a - u[:, None] - v[None], 0)
        r = jax.nn.logsumexp(logs, axis=1) - np.log(4)
        u, v = u + r, v + jax.nn.logsumexp(logs - r[:, None], axis=0) - np.log(4)
    plan = lambda u, v: jnp.exp(  # noqa: E731
        jnp.minimum(k * (a - u[:, None] - v[None]), 0)
    )
    got = plan(*transport.potentials(a, 4, ((k, 40),)))
    np.testing.assert_allclose(got, plan(u / k, v / k), atol=2e-5)


def test_greedy_is_the_sequential_rule():
    p = tiles(6, 5)
    want = np.zeros(p.shape, bool)
    for tile, keep in zip(p, want, strict=True):
        for flat in np.argsort(-tile.ravel(), kind="stable"):
            i, j = divmod(int(flat), 6)
            if keep[i].sum() < 2 and keep[:, j].sum() < 2:
                keep[i, j] = True
    got = jnp.moveaxis(transport.greedy(jnp.moveaxis(jnp.asarray(p), 0, -1), 2), -1, 0)
    np.testing.assert_array_equal(got, want)


def test_exchanges_keep_the_sums_and_never_lose():
    a = jnp.moveaxis(jnp.asarray(tiles(8, 20)), 0, -1)
    start = transport.repair(a, transport.greedy(a, 4), 4)
    score = jnp.sum(jnp.where(start, a, 0), (0, 1))
    for steps in (1, 8):
        keep = transport.exchange(a, start, steps)
        assert_sums(jnp.moveaxis(keep, -1, 0), 4)
        better = jnp.sum(jnp.where(keep, a, 0), (0, 1))
        assert (better >= score - 1e-4).all()
        score = better


def test_the_soft_plan_hardens_to_the_mask_and_has_gradients():
    a = jnp.asarray(tiles(8, 6))
    soft = transport.soft(a, n=4, k=30.0, sweeps=80)
    assert ((soft >= 0) & (soft <= 1)).all()
    # Sums are n in the limit of many sweeps; the cap comes after the last scaling.
    np.testing.assert_allclose(soft.sum(1), 4, atol=0.2)
    np.testing.assert_allclose(soft.sum(2), 4, atol=0.2)
    agree = (soft > 0.5) == solve(a, 4).keep
    assert agree.mean() > 0.97
    w = jnp.asarray(tiles(8, 6, seed=1))
    loss = lambda a: jnp.sum(transport.soft(a, n=4, k=5.0) * w)  # noqa: E731
    grad = jax.grad(loss)(a)
    assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0
    step = 1e-3 * jnp.asarray(tiles(8, 6, seed=2))
    # The mean that sets the temperature is held fixed: compare at equal means.
    step = step - step.mean((1, 2), keepdims=True)
    slope = (loss(a + step) - loss(a - step)) / 2
    # The thresholds that start the sweeps are not differentiated.
    np.testing.assert_allclose(slope, jnp.sum(grad * step), rtol=0.1)
