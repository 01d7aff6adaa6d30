import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from flexhinm_jax.ops import blocks as eager_blocks
from flexhinm_jax.ops import core_groups as eager_groups
from flexhinm_jax.ops import descent, masks
from flexhinm_jax.ops import factorised as eager
from tests.compiled import Compiled

blocks, factorised = Compiled(eager_blocks), Compiled(eager)
core_groups = Compiled(eager_groups)

OUT, IN, P, Q, N, M = 4, 16, 2, 8, 2, 4
KEYS = jax.random.split(jax.random.key(2), 4)
A = jnp.eye(P) + 0.4 * jax.random.normal(KEYS[0], (OUT // P, P, P))
B = jnp.eye(Q) + 0.4 * jax.random.normal(KEYS[1], (IN // Q, Q, Q))
W = jax.random.normal(KEYS[2], (OUT, IN))
H = jnp.linspace(0.5, 2, IN)
KEEP = masks.n_of_m(jnp.abs(jax.random.normal(KEYS[3], (OUT, IN))), n=N, m=M)
S = jnp.where(KEEP, W, 0)


def objective(s):
    return float(weighted_square(s))


@jax.jit
def weighted_square(s):
    return eager.weighted_square(eager_blocks.right(eager_blocks.left(A, s), B) - W, H)


def parts(s=S, keep=KEEP):
    p, q = factorised.normal_left(A), factorised.normal_right(B, H)
    cut = lambda x: blocks.cut(x, P, Q)  # noqa: E731
    gradient = factorised.image(cut(s), p, q) - cut(factorised.pulled(A, B, W, H))
    return cut(s), cut(keep), gradient, p, q


def brute(s, row, group):
    """The least objective over all pairs of one group, values by least squares."""
    a, b, w, h = (np.asarray(x, np.float64) for x in (A, B, W, H))
    left: np.ndarray = np.asarray(scipy.linalg.block_diag(*a))
    right = np.asarray(scipy.linalg.block_diag(*b)) * h**0.5
    others = np.array(s, np.float64)
    others[row, group * M : group * M + M] = 0
    rest = left @ others @ right - w * h**0.5
    best = np.inf
    for pattern in itertools.combinations(range(M), N):
        design = np.stack(
            [np.outer(left[:, row], right[group * M + j]).ravel() for j in pattern], 1
        )
        values = np.linalg.lstsq(design, -rest.ravel())[0]
        best = min(best, np.sum(np.square(design @ values + rest.ravel())))
    return best


def test_a_group_gets_the_best_of_all_patterns_and_least_squares_values():
    s, _, gradient, p, q = parts()
    own = jnp.stack([q[:, j : j + M, j : j + M] for j in range(0, Q, M)], axis=1)
    groups = lambda x: x.reshape(OUT // P, IN // Q, P, Q // M, M)  # noqa: E731
    scale = jnp.diagonal(p, axis1=1, axis2=2)[:, None, :, None, None]
    gain, fresh, kept = core_groups.best_values(
        groups(s),
        groups(gradient),
        scale[..., 0],
        own[None, :, None],
        core_groups.pattern_inverses(q, N, M)[None, :, None],
        N,
    )
    before = objective(S)
    for row in range(OUT):
        for group in range(IN // M):
            at = row // P, group * M // Q, row % P, group % (Q // M)
            want = before - brute(S, row, group)
            np.testing.assert_allclose(gain[at], want, rtol=1e-3, atol=1e-4)
            columns = slice(group * M, group * M + M)
            changed = objective(S.at[row, columns].set(fresh[at]))
            np.testing.assert_allclose(before - changed, want, rtol=1e-3, atol=1e-4)
            assert kept[at].sum() == N and not fresh[at][~kept[at]].any()


def test_one_sweep_of_single_rows_takes_the_best_group_of_every_block():
    # One row per block of A: rows do not interact, so one pick is the best of all.
    a = jnp.ones((OUT, 1, 1))
    p, q = factorised.normal_left(a), factorised.normal_right(B, H)
    cut = lambda x: blocks.cut(x, 1, Q)  # noqa: E731
    f = cut(factorised.pulled(a, B, W, H))
    gradient = factorised.image(cut(S), p, q) - f
    s, keep = core_groups.sweep(cut(S), cut(KEEP), gradient, p, q, n=N, m=M, picks=1)
    changed = jnp.any(blocks.join(s) != S, axis=0)
    moved = (blocks.join(s) != S).reshape(OUT, IN // Q, Q // M, M).any(-1).sum(-1)
    assert changed.any() and (moved <= 1).all()
    assert (blocks.join(keep).reshape(OUT, -1, M).sum(-1) == N).all()


def test_compiled_gains_are_those_of_eager_execution():
    # Sixteen blocks on both sides: a size at which fused reductions over axes of four
    # were seen to go wrong on a CPU.
    keys = jax.random.split(jax.random.key(3), 3)
    s, gradient = jax.random.normal(keys[0], (2, 16, 16, 8, M))
    x = jax.random.normal(keys[1], (16, 40, 32))
    q = jnp.einsum("cxa,cxb->cab", x, x) / 40
    own = jnp.stack([q[:, j : j + M, j : j + M] for j in range(0, 32, M)], axis=1)
    scale = 1 + jax.random.uniform(keys[2], (16, 1, 1))
    given = s, gradient, scale, own, core_groups.pattern_inverses(q, N, M)
    one_by_one = eager_groups.best_values(*given, N)
    for one, other in zip(one_by_one, core_groups.best_values(*given, N), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("picks", [1, 2, 5])
def test_a_sweep_never_raises_the_objective_and_keeps_n_of_m(picks):
    s, keep = S, KEEP
    losses = [objective(s)]
    for _ in range(3):
        new, kept = core_groups.sweep(*parts(s, keep), n=N, m=M, picks=picks)
        s, keep = blocks.join(new), blocks.join(kept)
        losses.append(objective(s))
        assert (keep.reshape(OUT, -1, M).sum(-1) == N).all()
        assert not jnp.where(keep, 0, s).any()
    assert losses[1] < losses[0]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))


def test_a_drawn_group_changes_one_group_of_every_block_and_never_for_the_worse():
    key = jax.random.key(0)
    s, keep = core_groups.draw(key, *parts(), N, M)
    assert objective(blocks.join(s)) < objective(S)
    moved = (s != blocks.cut(S, P, Q)).reshape(OUT // P, IN // Q, -1, M).any(-1).sum(-1)
    assert (moved <= 1).all() and (blocks.join(keep).sum() == KEEP.sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 6), (4, 4)])
def test_inverses_are_those_of_the_pattern(n, m):
    x = jax.random.normal(KEYS[0], (20, 12))
    q = (x.T @ x)[None]
    got = core_groups.pattern_inverses(q, n, m)
    for row, kept in enumerate(descent.patterns(n, m)):
        at = np.flatnonzero(kept) + m
        want = np.linalg.inv(np.asarray(q)[0][np.ix_(at, at)])
        inside = got[0, 1, row][np.ix_(kept, kept)]
        np.testing.assert_allclose(inside, want, rtol=1e-3, atol=1e-5)
        assert not np.where(np.outer(kept, kept), 0, got[0, 1, row]).any()


def test_ties_and_empty_factors_give_finite_results():
    zero = jnp.zeros_like(A)
    p, q = factorised.normal_left(zero), factorised.normal_right(B * 0, H)
    s, keep = blocks.cut(S, P, Q), blocks.cut(KEEP, P, Q)
    new, kept = core_groups.sweep(s, keep, jnp.zeros_like(s), p, q, n=N, m=M, picks=2)
    np.testing.assert_array_equal(new, s)
    np.testing.assert_array_equal(kept, keep)
