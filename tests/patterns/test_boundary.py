"""FlexHiNM without a pruned region and with one boundary for all rows (Spense)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import patterns
from flexhinm_jax.io import checkpoints
from tests.cases import SHAPE, stats, weight

KEY = jax.random.key(0)
SPLIT = fh.FlexHiNM(permute=None, regions="dense+nm", boundary="matrix")


def scores(seed=0, shape=SHAPE):
    return jnp.square(weight(seed, shape))


def counts(support):
    """Dense columns and groups, the same in every tile."""
    given = support.regions
    (dense,), (end,) = (set(x.tolist()) for x in (given.dense_end, given.nm_end))
    return dense, (end - dense) // given.m


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (5, 8)])
def test_the_sparsity_alone_says_where_the_boundary_is(n, m):
    pattern = dataclasses.replace(SPLIT, n=n, m=m)
    _, most = pattern.sparsity_range()
    for target in np.linspace(0, most, 9):
        support = pattern.project(KEY, scores(), target)
        # Every split of the columns into dense ones and groups, none pruned.
        splits = [(32 - m * h, h) for h in range(32 // m + 1)]
        removed = [(m - n) * h / 32 for _, h in splits]
        found = counts(support)
        assert found in splits
        gap = np.abs(np.asarray(removed) - target)
        assert gap[splits.index(found)] <= gap.min() + 1e-6
        assert len(support.regions.in_order) == 1
        np.testing.assert_allclose(
            1 - support.keep.mean(), removed[splits.index(found)], atol=1e-6
        )


def test_it_equals_the_pair_of_counts_on_one_tile():
    support = SPLIT.project(KEY, scores(), 0.25)
    pair = fh.FlexHiNM(16, permute=None, regions=(16, 16)).project(KEY, scores())
    jax.tree.map(np.testing.assert_array_equal, support, pair)


@pytest.mark.parametrize("permute", [fh.Gyro(), patterns.ChannelSearch()])
def test_a_search_finds_the_best_dense_columns(permute):
    hits = 0
    pattern = dataclasses.replace(SPLIT, permute=permute)
    for seed in range(4):
        s = np.asarray(scores(seed, (6, 8)), np.float64)
        support = pattern.project(KEY, jnp.asarray(s, jnp.float32), 0.25)
        best = 0.0
        for dense in itertools.combinations(range(8), 4):
            group = np.delete(s, dense, axis=1)
            kept = s[:, dense].sum() + np.sort(group, axis=1)[:, 2:].sum()
            best = max(best, kept)
        hits += np.where(support.keep, s, 0).sum() >= best - 1e-4
        assert counts(support) == (4, 1)
    assert hits >= 3


def test_a_smaller_support_is_nested_and_prunes_no_column():
    first = SPLIT.project(KEY, scores(), 0.125)
    second = SPLIT.project(KEY, scores(1), 0.375, first)
    assert counts(first) == (24, 2) and counts(second) == (8, 6)
    assert not (second.keep & ~first.keep).any()


def test_one_gather_serves_the_packed_product():
    state = fh.Wanda(SPLIT).solve(KEY, weight(), stats(), sparsity=0.25)
    plan = fh.Wanda(SPLIT).decide(state, weight())
    fh.verify(plan)
    packed = fh.kernels.pack(plan)
    assert packed.dense_index.shape == (1, 16) and packed.nm_index.shape == (1, 16)
    np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)
    x = weight(5, (3, 32))
    got = fh.sparse_dot(x, packed)
    np.testing.assert_allclose(got, x @ plan.weight.T, rtol=1e-4, atol=1e-4)


def test_hardware_counts_are_whole_instructions():
    pattern = dataclasses.replace(SPLIT, hardware=True)
    dense, groups = counts(pattern.project(KEY, scores(0, (8, 128)), 0.2))
    assert dense % 16 == 0 and 4 * groups % 32 == 0 and dense + 4 * groups == 128
    assert 2 * groups / 128 == 0.25  # 0.2 in steps of 1/8


def test_the_configuration_survives_text_and_a_checkpoint(tmp_path):
    text = "flexhinm:permute=none,regions=dense+nm,boundary=matrix"
    assert patterns.parse(text) == SPLIT
    assert "dense+nm" in str(SPLIT) and "matrix" in str(SPLIT)
    method = fh.Wanda(SPLIT)
    state = method.solve(KEY, weight(), stats(), sparsity=0.25)
    checkpoints.save(tmp_path / "state", state, method)
    restored = checkpoints.restore(tmp_path / "state", state, method)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    other = fh.Wanda(fh.FlexHiNM(16, permute=None, regions="dense+nm"))
    with pytest.raises(ValueError, match="boundary"):
        checkpoints.restore(tmp_path / "state", state, other)


def test_what_is_asked_too_much_is_refused():
    with pytest.raises(ValueError, match=r"sparsity=0.6 is outside \[0, 0.5\]"):
        SPLIT.project(KEY, scores(), 0.6)
    wrong: Any = "row"
    with pytest.raises(ValueError, match="boundary='row': choose 'tile'"):
        fh.FlexHiNM(boundary=wrong)
    with pytest.raises(ValueError, match="'dense\\+nm' or a pair"):
        fh.FlexHiNM(regions=wrong)
