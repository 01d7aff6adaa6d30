import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexhinm_jax.ops import gyro

KEY = jax.random.key(0)


def planted(seed, clusters, size, columns):
    """Shuffled rows of hidden clusters that share a column profile, and the labels."""
    r = np.random.default_rng(seed)
    profile = np.exp(r.standard_normal((clusters, columns)))
    label = r.permutation(np.repeat(np.arange(clusters), size))
    w = profile[label] * r.standard_normal((clusters * size, columns))
    return jnp.asarray(np.abs(w), jnp.float32), label


def rows(o, v):
    return jnp.arange(o, dtype=jnp.int32).reshape(-1, v)


@jax.jit
def total(scores, table, dense, nm):
    return gyro.worth(gyro.tile_sums(scores, table), (dense, dense + nm))[0].sum()


def worth(scores, table, dense, nm):
    return float(total(scores, table, jnp.int32(dense), jnp.int32(nm)))


def purity(table, label):
    return sum(np.bincount(label[row]).max() for row in np.asarray(table)) / label.size


def search(scores, table, dense, nm, rounds=4, exchanges=4, key=KEY, **options):
    dense, nm = jnp.int32(dense), jnp.int32(nm)
    return gyro.arrange(
        key, scores, table, dense, nm, rounds=rounds, exchanges=exchanges, **options
    )


@given(st.integers(0, 99), st.integers(1, 12))
def test_kth_largest_is_that_of_sorting(seed, k):
    c = np.random.default_rng(seed).random((3, 12)).astype(np.float32)
    c[0, :5] = c[0, 5]
    want = np.sort(c, axis=1)[:, ::-1][:, k - 1]
    found = jax.jit(gyro.kth_largest)(jnp.asarray(c), jnp.int32(k))
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(("dense", "nm"), [(0, 4), (3, 4), (5, 0), (0, 0), (4, 8)])
def test_worth_is_the_weighted_sum_of_the_largest(dense, nm):
    c = np.random.default_rng(0).random((2, 12)).astype(np.float32)
    found, _ = gyro.worth(jnp.asarray(c), (jnp.int32(dense), jnp.int32(dense + nm)))
    order = np.sort(c, axis=1)[:, ::-1]
    want = order[:, :dense].sum(1) + gyro.RHO * order[:, dense : dense + nm].sum(1)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_the_linear_score_of_an_exchange_is_a_lower_bound():
    scores = gyro.rounded(planted(0, 4, 4, 24)[0])
    np.testing.assert_array_equal(gyro.rounded(scores), scores)
    table, counts = rows(16, 4), (jnp.int32(2), jnp.int32(10))
    c = gyro.tile_sums(scores, table)
    f, level = gyro.worth(c, counts)
    fit = np.asarray(gyro.fits(scores, c, level))
    for a, b in itertools.product(table[0], table[1]):
        swapped = table.at[0, a].set(b).at[1, b - 4].set(a)
        gain = worth(scores, swapped, 2, 8) - float(f.sum())
        bound = (fit[a, 1] - fit[a, 0] + fit[b, 0] - fit[b, 1]) / 4
        assert gain >= bound - 1e-3


def test_row_scores_are_exact_whatever_the_order_of_the_columns():
    scores, _ = planted(1, 4, 8, 96)
    c = gyro.tile_sums(scores, rows(32, 8))
    _, level = gyro.worth(c, (jnp.int32(3), jnp.int32(40)))
    shuffled = np.random.default_rng(0).permutation(96)
    whole = gyro.rounded(scores)
    one = gyro.fits(whole, c, level)
    two = gyro.fits(whole[:, shuffled], c[:, shuffled], level)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(whole, jnp.round(whole))


def test_outliers_cost_the_other_scores_no_resolution():
    scores, _ = planted(1, 4, 8, 96)
    spiky = scores.at[:, 7].multiply(1e4).at[3, 5].set(1e6)
    strongest = int(jnp.argsort(jnp.max(scores, axis=0))[48])
    assert strongest not in (5, 7)
    calm, loud = gyro.rounded(scores), gyro.rounded(spiky)
    assert float(jnp.max(loud)) == 2.0**12
    assert len(np.unique(loud)) > 0.7 * len(np.unique(calm))


def test_where_most_columns_are_empty_the_largest_score_is_the_unit():
    scores = jnp.zeros((4, 8)).at[1, 2].set(3.0).at[2, 2].set(1.5)
    found = gyro.rounded(scores)
    np.testing.assert_array_equal(found[:, 2], [0, 4096, 2048, 0])
    np.testing.assert_array_equal(gyro.rounded(scores * 0), jnp.zeros((4, 8)))


@given(st.integers(0, 99), st.integers(0, 4), st.integers(0, 12))
def test_rows_are_permuted_and_the_objective_never_falls(seed, dense, nm):
    scores = jnp.abs(jax.random.normal(jax.random.key(seed), (16, 16)))
    table, curve = search(scores, rows(16, 4), dense, nm, trace=True)
    assert sorted(table.ravel().tolist()) == list(range(16))
    curve = [worth(scores, rows(16, 4), dense, nm), *curve.tolist()]
    assert (np.diff(curve) >= -1e-5 * curve[-1]).all()
    np.testing.assert_allclose(
        worth(scores, table, dense, nm), curve[-1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("exponent", [-60, -40, 40, 60])
def test_a_factor_on_the_scores_moves_no_row(exponent):
    scores, _ = planted(2, 4, 8, 64)
    one = search(scores, rows(32, 8), 8, 16)
    np.testing.assert_array_equal(
        search(scores * 2.0**exponent, rows(32, 8), 8, 16), one
    )


def test_tiny_matrices_reach_the_best_of_all_partitions():
    hits = 0
    for seed in range(6):
        scores = jnp.abs(jax.random.normal(jax.random.key(seed), (6, 8)))
        best = max(
            worth(
                scores, jnp.array([half, [r for r in range(6) if r not in half]]), 0, 4
            )
            for half in itertools.combinations(range(6), 3)
        )
        table = search(scores, rows(6, 3), 0, 4, rounds=16, exchanges=8)
        hits += worth(scores, table, 0, 4) >= best - 1e-4
    assert hits >= 5


def test_planted_row_clusters_are_recovered():
    scores, label = planted(3, 4, 8, 64)
    table = search(scores, rows(32, 8), 0, 32, rounds=16, exchanges=8)
    assert purity(table, label) == 1.0


def test_two_tiles_with_half_of_two_clusters_each_are_separated():
    scores, label = planted(0, 2, 16, 64)
    mixed = np.argsort(label, kind="stable").reshape(2, 16)
    mixed = jnp.asarray(np.concatenate([mixed[:, :8], mixed[:, 8:]], 1).reshape(2, 16))
    halves = jnp.concatenate([mixed[:, :8].reshape(1, 16), mixed[:, 8:].reshape(1, 16)])
    table = search(scores, halves.astype(jnp.int32), 0, 32, rounds=1, exchanges=0)
    assert purity(table, label) > purity(halves, label)


@pytest.mark.parametrize("scores", [jnp.ones((16, 16)), jnp.zeros((16, 16))])
def test_scores_without_structure_leave_the_rows_alone(scores):
    np.testing.assert_array_equal(search(scores, rows(16, 4), 0, 8), rows(16, 4))


def test_one_tile_has_nothing_to_exchange():
    scores, _ = planted(0, 1, 8, 16)
    np.testing.assert_array_equal(search(scores, rows(8, 8), 0, 8), rows(8, 8))


def test_an_odd_number_of_tiles_works():
    scores, label = planted(5, 3, 8, 64)
    table = search(scores, rows(24, 8), 0, 32, rounds=16, exchanges=8)
    assert sorted(table.ravel().tolist()) == list(range(24))
    assert purity(table, label) > purity(rows(24, 8), label)


def test_the_search_of_a_stack_equals_the_search_of_each():
    stack = jnp.stack([planted(s, 4, 4, 16)[0] for s in range(3)])
    keys = jax.random.split(KEY, 3)
    table = rows(16, 4)
    together = jax.vmap(lambda k, s: search(s, table, 1, 8, key=k))(keys, stack)
    each = [search(s, table, 1, 8, key=k) for k, s in zip(keys, stack, strict=True)]
    np.testing.assert_array_equal(together, jnp.stack(each))


@pytest.mark.parametrize("size", [1, 2])
def test_the_published_sampling_never_loses(size):
    scores, _ = planted(2, 4, 4, 32)
    table = gyro.sample(
        KEY, scores, rows(16, 4), jnp.int32(0), jnp.int32(16), size=size, patience=3
    )
    assert sorted(table.ravel().tolist()) == list(range(16))
    assert worth(scores, table, 0, 16) >= worth(scores, rows(16, 4), 0, 16)


def test_clusters_have_equal_size_and_contain_every_point_once():
    points = jax.random.normal(jax.random.key(0), (30, 5))
    table = gyro.balanced_clusters(jax.random.key(1), points, 6)
    assert table.shape == (5, 6)
    assert sorted(table.ravel().tolist()) == list(range(30))


def test_separated_clusters_are_found():
    centres = 100 * jnp.eye(3)
    label = np.tile(np.arange(3), 8)
    points = centres[label] + jax.random.normal(jax.random.key(2), (24, 3))
    found = [
        gyro.balanced_clusters(jax.random.key(seed), points, 8) for seed in range(4)
    ]
    pure = [(label[np.asarray(t)] == label[np.asarray(t)][:, :1]).all() for t in found]
    assert any(pure)
