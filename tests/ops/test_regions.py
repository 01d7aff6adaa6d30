import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexhinm_jax.ops import masks
from flexhinm_jax.ops import regions as eager
from flexhinm_jax.types import Support
from tests.compiled import Compiled

regions = Compiled(eager)


def tiles(seed, shape=(2, 4, 16), sigma=0.0):
    keys = jax.random.split(jax.random.key(seed))
    scale = jnp.exp(sigma * jax.random.normal(keys[0], (1, 1, shape[-1])))
    return jnp.abs(jax.random.normal(keys[1], shape)) * scale


@functools.partial(jax.jit, static_argnames=("n", "m"))
def worth(t, order, dense, h, n=2, m=4):
    return regions.value(t, regions.Columns(order, dense, h, n, m))


def dealt(t, k, h, n=2, m=4):
    rank = regions.ranked(jnp.sum(t, axis=1))
    return regions.column_order(rank, jnp.int32(k - n * h), jnp.int32(h), m)


@given(st.integers(0, 12), st.sampled_from([2, 4, 8]))
def test_deal_is_a_permutation_and_its_groups_are_balanced(h, m):
    p = np.asarray(regions.deal(jnp.int32(h), m, m * 12))
    assert sorted(p.tolist()) == list(range(m * 12))
    sums = p[: m * h].reshape(-1, m).sum(1)
    assert h == 0 or (sums == sums[0]).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4)])
def test_the_scan_evaluates_what_the_regions_retain(n, m):
    t = tiles(1, (2, 4, 32), sigma=1.0)
    k = 12
    h, curve = regions.scan_groups(t, jnp.int32(k), n, m)
    most = int(regions.most_groups(jnp.int32(k), 32, n, m))
    for trial in range(most + 1):
        want = worth(t, dealt(t, k, trial, n, m), k - n * trial, trial, n=n, m=m)
        np.testing.assert_allclose(curve[trial], want, rtol=1e-5)
    assert np.isneginf(curve[most + 1 :]).all()
    assert int(h) == int(np.argmax(curve))


def test_coarse_to_fine_finds_what_the_full_scan_finds():
    for seed in range(4):
        t = tiles(seed, (4, 8, 512), sigma=1.5)
        full, curve = regions.scan_groups(t, jnp.int32(128), 2, 4, full=512)
        fine, partial = regions.scan_groups(t, jnp.int32(128), 2, 4, full=16)
        best = float(curve[full])
        assert float(curve[fine]) >= best * (1 - 1e-3)
        seen = np.isfinite(partial)
        assert seen.sum() < np.isfinite(curve).sum()
        np.testing.assert_array_equal(partial[seen], curve[seen])


@pytest.mark.parametrize("step", [2, 8])
def test_the_scan_keeps_to_multiples(step):
    t = tiles(2, (2, 4, 128), sigma=1.0)
    h, curve = regions.scan_groups(t, jnp.int32(32), 2, 4, step)
    assert int(h) % step == 0
    legal = np.flatnonzero(np.isfinite(curve))
    assert (legal % step == 0).all()


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_the_walk_of_the_paper_stops_at_a_legal_boundary_below_the_scan(sigma):
    t = tiles(3, (2, 8, 64), sigma)
    k = jnp.int32(24)
    walked = int(regions.walk_groups(t, k, 2, 4))
    best, curve = regions.scan_groups(t, k, 2, 4)
    assert 0 <= walked <= int(regions.most_groups(k, 64, 2, 4))
    assert curve[0] <= curve[walked] <= curve[int(best)]


@given(
    st.integers(0, 10**6),
    st.sampled_from([(2, 4), (1, 4), (3, 4)]),
    st.integers(0, 16),
    st.integers(0, 4),
)
def test_absorbing_dense_columns_never_loses(seed, n_of_m, k, h):
    """The containment theorem: every three-region support is inside an absorbed one."""
    n, m = n_of_m
    t = tiles(seed, (2, 4, 16), sigma=1.0)
    h = min(h, int(regions.most_groups(jnp.int32(k), 16, n, m)))
    order = dealt(t, k, h, n, m)
    old = regions.Columns(order, jnp.int32(k - n * h), jnp.int32(h), n, m)
    found = regions.absorb(t, old)
    new, dense, groups = found.order, found.dense, found.h
    assert (np.sort(new, axis=1) == np.arange(16)).all()
    assert int(dense) + n * int(groups) == k  # the same sparsity
    if 1 - k / 16 >= 1 - n / m:
        assert int(dense) < n  # from there on it is HiNM
    before = float(worth(t, order, k - n * h, h, n=n, m=m))
    assert float(worth(t, new, dense, groups, n=n, m=m)) >= before * (1 - 1e-6)


def test_absorbing_keeps_every_weight_of_the_old_support():
    t = tiles(4, (1, 4, 16), sigma=1.0)
    dense, h = jnp.int32(4), jnp.int32(1)
    order = dealt(t, 6, 1)
    found = regions.absorb(t, regions.Columns(order, dense, h, 2, 4))
    new = found.order
    assert (int(found.dense), int(found.h)) == (0, 3)
    assert set(order[0, :4].tolist()) <= set(new[0, :12].tolist())
    assert new[0, 8:12].tolist() == order[0, 4:8].tolist()


@pytest.mark.parametrize("pruned", [True, False])
@given(st.integers(0, 99))
def test_shrinking_nests_and_respects_hardware_steps(pruned, seed):
    t = tiles(seed, (2, 4, 128))
    dense, h, k = (32, 16, 32) if pruned else (64, 16, 80)
    rank = regions.ranked(jnp.sum(t, axis=1))
    order = regions.column_order(rank, jnp.int32(dense), jnp.int32(h), 4)
    old = regions.Columns(order, jnp.int32(dense), jnp.int32(h), 2, 4)
    old = old.regions(jnp.arange(8))
    keep = regions.kept(t, order, old.dense_end, old.nm_end, 2, 4)
    new = shrink(
        t.reshape(8, 128),
        Support(masks.fold_tiles(keep, old.out_order), old),
        k,
        regions.Steps(8, 16, pruned=pruned),
    )
    assert not (np.asarray(new.keep) & ~np.asarray(keep).reshape(8, 128)).any()
    dense_end, nm_end = new.regions.dense_end, new.regions.nm_end
    assert (dense_end % 16 == 0).all()
    assert ((nm_end - dense_end) % 32 == 0).all()
    assert int(dense_end[0]) + int(nm_end[0] - dense_end[0]) // 2 == k
    assert pruned or (nm_end == 128).all()


@functools.partial(jax.jit, static_argnums=3)
def shrink(scores, prev, k, steps):
    return regions.shrink(scores, prev, jnp.int32(k), steps)
