"""Removing sets of weights of a group, against brute force in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods import accumulate_gradients
from flexhinm_jax.ops import groups, subsets
from tests.cases import stats

KEY = jax.random.key(3)
OUT, IN, B = 4, 16, 8
DAMP = 0.05


@functools.partial(jax.jit, static_argnums=0)
def solved(method, w, s, sparsity=None, prev=None):
    return method.solve(KEY, w, s, sparsity=sparsity, prev=prev)


@functools.cache
def setting():
    """A weight and statistics whose blocks are far from diagonal."""
    keys = jax.random.split(KEY, 3)
    w = jax.random.normal(keys[0], (OUT, IN))
    mix = jnp.eye(IN) + jax.random.normal(keys[1], (IN, IN))
    s = stats(inputs=IN, outputs=OUT)
    s = fh.Stats(sq_norm=s.sq_norm, mean=s.mean, count=s.count, gram=s.gram)
    add = jax.jit(functools.partial(accumulate_gradients, block=B))
    for g in jax.random.normal(keys[2], (24, OUT, IN)) @ mix:
        s = add(s, g)
    return w, s


def exact_loss(w, s, row, removed):
    """Rise of the quadratic model, the kept weights of each block free to move."""
    f = np.asarray(s.fisher, np.float64)[row]
    f = f + DAMP * np.mean(np.diagonal(s.fisher, axis1=-2, axis2=-1)) * np.eye(B)
    total = 0.0
    for k in range(IN // B):
        q = [c - k * B for c in removed if c // B == k]
        r = [c for c in range(B) if c not in q]
        x = np.asarray(w, np.float64)[row, k * B : (k + 1) * B][q]
        schur = f[k][np.ix_(q, q)] - f[k][np.ix_(q, r)] @ np.linalg.solve(
            f[k][np.ix_(r, r)], f[k][np.ix_(r, q)]
        )
        total += x @ schur @ x / 2
    return total


def group_losses(w, s, keep, columns):
    """f[o, groups]: cost of what is removed in each group of columns."""
    return np.array(
        [
            [exact_loss(w, s, r, [c for c in group if not keep[r, c]]) for group in cs]
            for r, cs in enumerate(columns)
        ]
    )


def cheapest(w, s, columns, n):
    """f[o, groups]: the least cost of any set that leaves n of each group."""
    return np.array(
        [
            [
                min(
                    exact_loss(w, s, r, q)
                    for q in itertools.combinations(group, len(group) - n)
                )
                for group in cs
            ]
            for r, cs in enumerate(columns)
        ]
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_the_best_set_of_every_group_is_that_of_brute_force(n, m):
    w, s = setting()
    columns = np.broadcast_to(np.arange(IN).reshape(-1, m), (OUT, IN // m, m))
    method = fh.Fisher(fh.NM(n, m), kind="joint", damp=DAMP)
    keep = np.asarray(solved(method, w, s).fixed["support"].keep)
    want = cheapest(w, s, columns, n)
    np.testing.assert_allclose(group_losses(w, s, keep, columns), want, rtol=1e-3)
    single = solved(fh.Fisher(fh.NM(n, m), kind="block", damp=DAMP), w, s)
    single = np.asarray(single.fixed["support"].keep)
    assert group_losses(w, s, single, columns).sum() > 1.02 * want.sum()


def test_groups_in_any_order_and_across_blocks_are_searched_too():
    w, s = setting()
    pattern = fh.FlexHiNM(2, permute=None, regions=(4, 8))
    method = fh.Fisher(pattern, kind="joint", damp=DAMP)
    plan = method.decide(solved(method, w, s), w)
    fh.verify(plan)
    regions = plan.support.regions
    order = np.asarray(groups.group_order(regions)).reshape(OUT // 2, -1, 4)[:, :2]
    rows = np.asarray(regions.out_order)
    columns = np.empty((OUT, 2, 4), int)
    columns[rows] = order.repeat(2, axis=0)
    keep = np.asarray(plan.support.keep)
    want = cheapest(w, s, columns, 2)
    np.testing.assert_allclose(group_losses(w, s, keep, columns), want, rtol=1e-3)
    first = solved(fh.Fisher(pattern, kind="block", damp=DAMP), w, s)
    old = first.fixed["support"]
    np.testing.assert_array_equal(old.regions.in_order, regions.in_order)
    np.testing.assert_array_equal(old.keep.sum(), keep.sum())


def test_the_inverse_is_that_of_the_damped_blocks():
    _, s = setting()
    inverse = subsets.inverse_blocks(s.fisher, DAMP)
    ridge = DAMP * jnp.mean(jnp.diagonal(s.fisher, axis1=-2, axis2=-1))
    product = (s.fisher + ridge * jnp.eye(B)) @ inverse
    np.testing.assert_allclose(
        product, np.broadcast_to(np.eye(B), product.shape), atol=1e-3
    )


def test_with_an_earlier_state_the_kept_set_only_shrinks():
    w, s = setting()
    method = fh.Fisher(fh.FlexHiNM(2, permute=None), kind="joint", damp=DAMP)
    before = solved(method, w, s, 0.25)
    after = solved(method, w[::-1], s, 0.5, before)
    fh.verify(method.decide(after, w))
    keep = after.fixed["support"].keep
    assert not (keep & ~before.fixed["support"].keep).any()
    assert float(keep.mean()) == 0.5


@pytest.mark.parametrize(
    ("pattern", "match"),
    [(fh.Transposable(2, 4), "every row for itself"), (fh.NM(8, 16), "12870 patterns")],
    ids=str,
)
def test_patterns_that_cannot_be_searched_are_refused(pattern, match):
    w, s = setting()
    with pytest.raises(ValueError, match=match):
        fh.Fisher(pattern, kind="joint").solve(KEY, w, s)
