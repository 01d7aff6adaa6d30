import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexhinm_jax.ops import masks, prox
from tests.compiled import compiled

prox24 = compiled(prox.prox24)


def regularizer24(groups):
    """r(w) of every group: zero when at most two of four are non-zero."""
    a, b, c, d = np.moveaxis(np.abs(groups), -1, 0)
    return a * b * c + a * b * d + a * c * d + b * c * d


def objective(w, z, lam):
    return 0.5 * np.sum((w - z) ** 2, -1) + lam * regularizer24(w)


@pytest.mark.parametrize(
    ("z", "lam", "want"),
    [
        ([1, 0.8, 0.5, 0.3], 0.5, [0.942669, 0.725509, 0.158042, 0]),
        ([1, 0.8, 0.5, 0.3], 0.1, [0.951790, 0.739841, 0.402257, 0.161536]),
        ([1, 1, 1, 1], 0.25, [2 / 3] * 4),
        ([0.5, 2, -1, 0.9], 1.0, [0, 2, -1, 0]),
        ([1, -0.8, 0.5, -0.3], 0.5, [0.942669, -0.725509, 0.158042, 0]),
    ],
)
def test_the_published_operator_gives_these_values(z, lam, want):
    found = prox24(jnp.array(z, jnp.float32), lam, sweeps=400)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_nothing_does_better_than_the_enumeration_on_a_fine_grid():
    z = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    steps = np.linspace(0, 1, 9, dtype=np.float32)
    grid = np.stack(np.meshgrid(*[steps] * 4, indexing="ij"), -1).reshape(-1, 4)
    for lam in (0.1, 0.5, 2.0):
        mine = objective(np.asarray(prox24(z, lam, sweeps=100)), z, lam)
        tried = objective(grid[None] * z[:, None], z[:, None], lam).min(1)
        assert np.all(mine <= tried + 1e-6)


@given(
    hnp.arrays(np.float32, (5, 4), elements=st.floats(-4, 4, width=16)),
    st.floats(0, 8, width=16),
)
def test_signs_and_order_survive_and_the_regulariser_falls(z, lam):
    w = np.asarray(prox24(jnp.asarray(z), lam))
    assert np.all(np.abs(w) <= np.abs(z)) and np.all(w * z >= 0)
    for row, given_row in zip(np.abs(w), np.abs(z), strict=True):
        larger = given_row[:, None] > given_row[None, :]
        assert np.all((row[:, None] >= row[None, :] - 1e-6)[larger])
    assert np.all(regularizer24(w) <= regularizer24(z) + 1e-5)


def test_the_published_share_of_groups_becomes_two_of_four():
    z = jax.random.normal(jax.random.key(5), (100_000, 4))
    for lam, share in ((0.1, 3.66), (0.5, 57.87), (1.0, 91.31)):
        alive = jnp.sum(prox24(z, lam) != 0, axis=-1)
        assert int(alive.min()) >= 2
        assert abs(100 * float(jnp.mean(alive == 2)) - share) < 0.3


def test_strength_zero_changes_nothing_and_exact_groups_stay():
    z = jax.random.normal(jax.random.key(0), (64, 4))
    np.testing.assert_allclose(prox24(z, 0.0), z, atol=1e-6)
    exact = jnp.where(masks.n_of_m(jnp.abs(z), n=2, m=4), z, 0)
    np.testing.assert_allclose(prox24(exact, 3.0), exact, atol=1e-6)


def test_scaling_the_weights_scales_the_strength():
    z = jax.random.normal(jax.random.key(1), (256, 4))
    scaled = prox24(0.02 * z, 0.5 / 0.02, sweeps=100)
    np.testing.assert_allclose(scaled, 0.02 * prox24(z, 0.5, sweeps=100), atol=1e-7)


def test_the_mask_it_ends_with_is_that_of_magnitude():
    z = 0.02 * jax.random.normal(jax.random.key(2), (512, 4))
    w = jax.lax.fori_loop(0, 50, lambda _, w: prox24(w, 1.0), z)
    kept = masks.n_of_m(jnp.abs(w), n=2, m=4)
    np.testing.assert_array_equal(kept, masks.n_of_m(jnp.abs(z), n=2, m=4))


def test_a_strength_per_group_and_a_batch_are_elementwise():
    z = jax.random.normal(jax.random.key(3), (3, 5, 4))
    lam = jnp.array([0.1, 0.5, 1.0])
    together = prox24(z, lam[:, None])
    for j in range(3):
        np.testing.assert_allclose(together[j], prox24(z[j], lam[j]), atol=1e-7)


def test_bfloat16_in_is_bfloat16_out():
    z = jax.random.normal(jax.random.key(4), (8, 4)).astype(jnp.bfloat16)
    assert prox24(z, 0.5).dtype == jnp.bfloat16


def test_a_group_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"need \[..., 4\]"):
        prox24(jnp.ones((2, 8)), 0.5)
