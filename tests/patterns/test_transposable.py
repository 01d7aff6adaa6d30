"""Transposable N:M supports: both axes, refinement, certificate, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from flexhinm_jax.types import Support

KEY = jax.random.key(0)
FAST = ((20.0, 20),)


def scores(seed=0, shape=(32, 48)):
    return jax.random.normal(jax.random.key(seed), shape) ** 2


def assert_n_of_m(keep, n, m):
    kept = np.asarray(keep).reshape(keep.shape[0], -1, m).sum(-1)
    assert (kept == n).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (8, 16)])
def test_the_mask_and_its_transpose_are_n_of_m(n, m):
    keep = fh.Transposable(n, m, stages=FAST).project(KEY, scores()).keep
    assert_n_of_m(keep, n, m)
    assert_n_of_m(keep.T, n, m)


def test_it_keeps_nearly_what_free_rows_keep():
    s = scores()
    best = masks.retained(s, masks.n_of_m(s, n=8, m=16))
    got = masks.retained(s, fh.Transposable(8, 16, stages=FAST).project(KEY, s).keep)
    assert 0.97 * best < got < best


def test_the_transposed_scores_give_the_transposed_mask():
    pattern, s = fh.Transposable(2, 4), scores()
    keep, other = pattern.project(KEY, s).keep, pattern.project(KEY, s.T).keep
    np.testing.assert_array_equal(keep.T, other)


def test_refining_never_loses_score_on_any_tile():
    pattern = fh.Transposable(4, 8, exchanges=0, stages=((20.0, 2),))
    good = fh.Transposable(4, 8).project(KEY, scores())
    again = pattern.refine(good, scores())
    kept = lambda s: jnp.sum(jnp.where(s.keep, scores(), 0))  # noqa: E731
    assert kept(again) >= kept(good) - 1e-4
    assert_n_of_m(again.keep.T, 4, 8)


def test_the_certificate_bounds_the_loss():
    pattern, s = fh.Transposable(4, 8), scores()
    good = pattern.certificate(s, pattern.project(KEY, s).keep)
    bad = pattern.certificate(s, pattern.project(KEY, scores(1)).keep)
    assert 0 <= good < 3e-3 < bad


def test_a_previous_support_stays():
    pattern = fh.Transposable(2, 4)
    first = pattern.project(KEY, scores(0))
    assert pattern.project(KEY, scores(1), prev=first) is first


def test_the_soft_mask_has_the_shape_and_density_of_the_pattern():
    soft = fh.Transposable(4, 8).soft(scores(), k=20.0)
    assert soft.shape == (32, 48)
    np.testing.assert_allclose(soft.mean(), 0.5, atol=0.01)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (0, 4), (5, 4), (2.0, 4)])
def test_impossible_counts_are_refused(n, m):
    with pytest.raises(ValueError, match="0 < n < m|n=2.0: need an integer"):
        fh.Transposable(n, m)


def test_sides_that_do_not_divide_are_refused_by_axis():
    pattern = fh.Transposable(2, 4)
    with pytest.raises(ValueError, match=r"out=30 is not a multiple of m=4"):
        pattern.check((30, 48))
    with pytest.raises(ValueError, match=r"in=46 is not a multiple of m=4"):
        pattern.check((32, 46))
    with pytest.raises(ValueError, match="always removes 0.5"):
        pattern.check((32, 48), 0.75)


def test_unstructured_refinement_keeps_the_count_of_every_scope():
    s = scores()
    keep = scores(3) > 1
    for scope in ("layer", "row"):
        again = fh.Unstructured(scope).refine(Support(keep), s).keep
        assert again.sum() == keep.sum()
        if scope == "row":
            np.testing.assert_array_equal(again.sum(1), keep.sum(1))
        least = jnp.min(jnp.where(again, s, jnp.inf), axis=1)
        most = jnp.max(jnp.where(again, 0, s), axis=1)
        assert (least >= most).all() or scope == "layer"


@pytest.mark.parametrize(
    "pattern", [fh.NM(2, 4), fh.Vector(8), fh.FlexHiNM(8, permute=None)], ids=str
)
def test_refining_keeps_columns_and_groups(pattern):
    s = scores()
    first = pattern.project(KEY, s, None if isinstance(pattern, fh.NM) else 0.7)
    np.testing.assert_array_equal(pattern.refine(first, s).keep, first.keep)
    moved = pattern.refine(first, scores(5))
    assert moved.regions is first.regions
    assert moved.keep.sum() == first.keep.sum()
