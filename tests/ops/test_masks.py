import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexhinm_jax.ops import masks as eager
from tests.compiled import Compiled

masks = Compiled(eager)


def best_by_enumeration(group: np.ndarray, n: int) -> tuple[int, ...]:
    """Indices of the best n, the lexicographically first of equals."""
    choices = itertools.combinations(range(len(group)), n)
    return max(choices, key=lambda c: (sum(group[list(c)]), [-j for j in c]))


@given(
    st.integers(1, 6).flatmap(
        lambda m: st.tuples(
            st.integers(1, m),
            st.just(m),
            st.lists(st.integers(0, 3), min_size=3 * m, max_size=3 * m),
        )
    )
)
def test_n_of_m_is_the_best_choice_with_the_lowest_indices(case):
    n, m, values = case
    scores = np.array(values, np.float32)
    keep = np.asarray(masks.n_of_m(jnp.asarray(scores), n=n, m=m)).reshape(-1, m)
    for group, kept in zip(scores.reshape(-1, m), keep, strict=True):
        assert tuple(np.flatnonzero(kept)) == best_by_enumeration(group, n)


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_counted_and_sorted_ranks_agree(m):
    groups = jax.random.randint(jax.random.key(m), (50, m), 0, 5).astype(jnp.float32)
    np.testing.assert_array_equal(masks.group_ranks(groups), masks.ranks(groups))


@pytest.mark.parametrize("k", [0, 1, 5, 8])
def test_top_k_keeps_exactly_k(k):
    keep = masks.top_k(jnp.zeros((3, 8)), jnp.asarray(k, jnp.int32))
    np.testing.assert_array_equal(keep, [[j < k for j in range(8)]] * 3)


@given(st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_top_n_sum_equals_sorting(n, seed):
    x = np.random.default_rng(seed).standard_normal((4, 5, 3)).astype(np.float32)
    want = np.sort(x, axis=1)[:, ::-1][:, :n].sum(1)
    np.testing.assert_allclose(
        masks.top_n_sum(jnp.asarray(x), n=n, axis=1), want, atol=1e-5
    )


def test_retained_of_everything_nothing_and_zero_scores():
    scores = jnp.array([[1.0, 3.0]])
    assert masks.retained(scores, jnp.array([[True, True]])) == 1
    assert masks.retained(scores, jnp.array([[False, True]])) == 0.75
    assert masks.retained(jnp.zeros((1, 2)), jnp.array([[False, True]])) == 1


def test_folding_tiles_undoes_the_row_order():
    w = jax.random.normal(jax.random.key(0), (12, 5))
    order = jax.random.permutation(jax.random.key(1), 12)
    tiles = w[order].reshape(3, 4, 5)
    np.testing.assert_array_equal(masks.fold_tiles(tiles, order), w)


def test_ranks_do_not_change_under_jit():
    scores = jax.random.normal(jax.random.key(2), (6, 40))
    np.testing.assert_array_equal(masks.ranks(scores), eager.ranks(scores))
