import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import blocks as eager_blocks
from flexhinm_jax.ops import factorised as eager_factorised
from tests.compiled import Compiled

blocks = Compiled(eager_blocks)
factorised = Compiled(eager_factorised)

OUT, IN, P, Q = 8, 12, 4, 6
KEYS = jax.random.split(jax.random.key(1), 6)
A = jnp.eye(P) + 0.3 * jax.random.normal(KEYS[0], (OUT // P, P, P))
B = jnp.eye(Q) + 0.3 * jax.random.normal(KEYS[1], (IN // Q, Q, Q))
KEEP = jax.random.bernoulli(KEYS[2], 0.6, (OUT, IN))
S = jnp.where(KEEP, jax.random.normal(KEYS[3], (OUT, IN)), 0)
W = jax.random.normal(KEYS[4], (OUT, IN))
X = jax.random.normal(KEYS[5], (40, IN)) * jnp.linspace(0.5, 2, IN)
WEIGHTS = {"diagonal": jnp.linspace(0.5, 2, IN), "gram": X.T @ X / 40}
weightings = pytest.mark.parametrize("h", WEIGHTS.values(), ids=WEIGHTS)


def objective(a, s, b, h):
    return factorised.weighted_square(blocks.right(blocks.left(a, s), b) - W, h)


def repeat(step, x, times):
    for _ in range(times):
        x = step(x)
    return x


@weightings
def test_the_solved_left_factor_has_no_gradient_left(h):
    step = jax.jit(lambda a: factorised.solve_left(a, S, B, W, h))
    assert objective(step(A), S, B, h) < objective(A, S, B, h)
    slope = jax.jit(jax.grad(lambda a: objective(a, S, B, h)))
    last = repeat(step, A, 4)  # the ridge towards the present factor dies out
    assert jnp.abs(slope(last)).max() < 1e-4 * jnp.abs(slope(A)).max()


@weightings
def test_the_solved_right_factor_has_no_gradient_left(h):
    step = jax.jit(lambda b: factorised.solve_right(A, S, b, W, h))
    slope = jax.jit(jax.grad(lambda b: objective(A, S, b, h)))
    losses = [objective(A, S, repeat(step, B, k), h) for k in range(5)]
    assert all(
        after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses)
    )
    times = 4 if h.ndim == 1 else 60  # a Gram couples the blocks: one sweep at a time
    last = repeat(step, B, times)
    assert jnp.abs(slope(last)).max() < 1e-3 * jnp.abs(slope(B)).max()


def test_a_right_factor_with_channel_weights_does_not_depend_on_them():
    one = factorised.solve_right(A, S, B, W, WEIGHTS["diagonal"])
    other = factorised.solve_right(A, S, B, W, jnp.ones(IN))
    np.testing.assert_array_equal(one, other)


@weightings
def test_conjugate_gradients_reach_the_least_squares_values(h):
    p, q = factorised.normal_left(A), factorised.normal_right(B, h)
    cut = lambda x: blocks.cut(x, P, q.shape[1])  # noqa: E731
    f = cut(factorised.pulled(A, B, W, h))
    run = jax.jit(factorised.descend_values, static_argnums=5)
    losses = []
    for steps in (0, 1, 3, 60):
        s, gradient = run(cut(S), cut(KEEP), p, q, f, steps)
        losses.append(objective(A, blocks.join(s), B, h))
    assert losses == sorted(losses, reverse=True)
    slope = jax.grad(lambda s: objective(A, s, B, h))(blocks.join(s))
    np.testing.assert_allclose(blocks.join(gradient) * 2, slope, rtol=1e-3, atol=1e-3)
    assert jnp.abs(jnp.where(KEEP, slope, 0)).max() < 1e-3
    assert not jnp.where(KEEP, 0, blocks.join(s)).any()
    # against one dense least-squares problem
    root = jnp.linalg.cholesky(jnp.diag(h) if h.ndim == 1 else h)
    full = jnp.kron(
        jax.scipy.linalg.block_diag(*A), (jax.scipy.linalg.block_diag(*B) @ root).T
    )
    design = full.reshape(-1, OUT * IN)[:, KEEP.ravel()]
    best = jnp.linalg.lstsq(design, (W @ root).ravel())[0]
    np.testing.assert_allclose(blocks.join(s)[KEEP], best, rtol=1e-2, atol=1e-3)


def test_an_empty_core_gives_finite_factors():
    zero = jnp.zeros_like(S)
    for h in WEIGHTS.values():
        assert jnp.isfinite(factorised.solve_left(A, zero, B, W, h)).all()
        assert jnp.isfinite(factorised.solve_right(A, zero, B, W, h)).all()
