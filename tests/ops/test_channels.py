import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexhinm_jax.ops import channels, masks, regions

KEY = jax.random.key(0)


def tiles(seed, shape=(2, 4, 16)):
    return jnp.abs(jax.random.normal(jax.random.key(seed), shape))


def start(t, dense, h, m=4):
    rank = regions.ranked(jnp.sum(t, axis=1))
    return regions.column_order(rank, jnp.int32(dense), jnp.int32(h), m)


@functools.partial(jax.jit, static_argnames=("n", "m"))
def worth(t, order, dense, h, n=2, m=4):
    return regions.value(t, regions.Columns(order, dense, h, n, m))


def search(key, t, order, dense, h, **options):
    columns = regions.Columns(order, dense, h, 2, 4)
    return channels.search(key, t, columns, **options).order


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_a_group_keeps_a_plus_the_maximum_of_b_and_the_new_column(n, m):
    rest = np.random.default_rng(n).random((50, m - 1)).astype(np.float32)
    x = np.random.default_rng(9).random(50).astype(np.float32)
    want = np.sort(np.column_stack([rest, x]), 1)[:, ::-1][:, :n].sum(1)
    a = np.sort(rest, 1)[:, ::-1][:, : n - 1].sum(1)
    b = masks.n_largest([jnp.asarray(c) for c in rest.T], n)[-1]
    np.testing.assert_allclose(a + np.maximum(b, x), want, rtol=1e-6)


@pytest.mark.parametrize("v", [1, 6, 32])
def test_max_reduction_equals_its_definition(v):
    b, x = np.random.default_rng(v).random((2, v, 5)).astype(np.float32)
    want = np.maximum(b[:, :, None], x[:, None]).sum(0)
    found = channels.max_reduction(jnp.asarray(b), jnp.asarray(x))
    np.testing.assert_allclose(found, want, rtol=1e-6)


@given(st.integers(0, 99), st.integers(0, 2), st.integers(0, 3))
def test_search_permutes_the_columns_and_never_loses(seed, dense, h):
    t = tiles(seed)
    order = start(t, dense, h)
    columns = regions.Columns(order, jnp.int32(dense), jnp.int32(h), 2, 4)
    searched: Any = channels.search(KEY, t, columns, sweeps=4, block=3, trace=True)
    found, curve = searched[0].order, searched[1]
    assert (np.sort(found, axis=1) == np.arange(16)).all()
    curve = np.asarray([worth(t, order, dense, h), *curve])
    assert (np.diff(curve) >= -1e-5 * curve[-1]).all()
    np.testing.assert_allclose(worth(t, found, dense, h), curve[-1], rtol=1e-6)


def test_search_finds_the_best_order_of_a_tiny_tile():
    # 8 columns in two groups of 4, enumerated, and 4 of the 8 columns
    for h in (2, 1):
        hits = 0
        for seed in range(6):
            t = tiles(seed, (1, 3, 8))
            best = max(
                float(worth(t, jnp.asarray([p]), 0, h)) for p in best_candidates(h)
            )
            found = search(KEY, t, start(t, 0, h), 0, h, sweeps=64, block=2)
            hits += float(worth(t, found, 0, h)) >= best - 1e-5
        assert hits >= 5


def best_candidates(h):
    """Every choice of the first group, or of both groups, of 8 columns."""
    for first in itertools.combinations(range(8), 4):
        yield [*first, *(c for c in range(8) if c not in first)]


@pytest.mark.slow
def test_both_solvers_reach_nearly_the_same():
    t = tiles(5, (2, 8, 48))
    order = start(t, 0, 12)
    found = {
        solver: float(
            worth(
                t,
                search(KEY, t, order, 0, 12, sweeps=32, solver=solver),
                0,
                12,
            )
        )
        for solver in ("swaps", "hungarian")
    }
    assert abs(found["swaps"] / found["hungarian"] - 1) < 5e-3
    assert found["swaps"] > float(worth(t, order, 0, 12))


def test_equal_and_zero_scores_leave_the_order_alone():
    for t in (jnp.ones((2, 4, 16)), jnp.zeros((2, 4, 16))):
        order = start(t, 1, 2)
        found = search(KEY, t, order, 1, 2, sweeps=4, block=3)
        np.testing.assert_array_equal(found, order)


@given(st.integers(0, 3), st.integers(0, 3))
def test_unit_layout_is_undone_by_its_inverse(dense, h):
    order = jnp.arange(16, dtype=jnp.int32)[None]
    moved = channels.unit_layout(order, jnp.int32(dense), jnp.int32(h), 4)
    back = channels.unit_layout(moved, jnp.int32(dense), jnp.int32(h), 4, inverse=True)
    np.testing.assert_array_equal(back, order)
    assert moved[0, : 4 * h].tolist() == list(range(dense, dense + 4 * h))


def test_serpentine_deals_the_columns_by_strength():
    scores = jnp.array([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    order = channels.serpentine(scores, 4)
    groups = scores[0][order[0]].reshape(2, 4)
    np.testing.assert_array_equal(groups.sum(1), [18, 18])


def test_the_search_of_a_stack_equals_the_search_of_each():
    stack = jnp.stack([tiles(s) for s in range(3)])
    keys = jax.random.split(KEY, 3)
    run = functools.partial(search, sweeps=4, block=3)
    orders = jnp.stack([start(t, 1, 2) for t in stack])
    together = jax.vmap(run, (0, 0, 0, None, None))(keys, stack, orders, 1, 2)
    each = [run(k, t, o, 1, 2) for k, t, o in zip(keys, stack, orders, strict=True)]
    np.testing.assert_array_equal(together, jnp.stack(each))


def test_retained_score_is_the_one_of_the_mask():
    t = tiles(7)
    order = start(t, 2, 2)
    ends = jnp.full((2,), 2, jnp.int32), jnp.full((2,), 10, jnp.int32)
    keep = regions.kept(t, order, *ends, 2, 4)
    want = jnp.sum(jnp.where(keep, t, 0))
    np.testing.assert_allclose(worth(t, order, 2, 2), want, rtol=1e-6)
    assert float(masks.retained(t.reshape(-1, 16), keep.reshape(-1, 16))) < 1
