import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag

from flexhinm_jax.ops import blocks

KEYS = jax.random.split(jax.random.key(0), 3)
A = jax.random.normal(KEYS[0], (2, 3, 3))
S = jax.random.normal(KEYS[1], (6, 8))
B = jax.random.normal(KEYS[2], (2, 4, 4))


def full(a, s, b):
    return block_diag(*a) @ s @ block_diag(*b)


def test_block_products_are_those_of_the_full_matrices():
    got = blocks.right(blocks.left(A, S), B)
    np.testing.assert_allclose(got, full(A, S, B), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(block_diag(*blocks.transpose(A)), block_diag(*A).T)


def test_cutting_and_joining_changes_nothing():
    tiles = blocks.cut(S, 3, 4)
    np.testing.assert_array_equal(tiles[1, 0], S[3:, :4])
    np.testing.assert_array_equal(blocks.join(tiles), S)


def test_the_identity_factor_changes_nothing():
    np.testing.assert_array_equal(blocks.left(blocks.identity(6, 2), S), S)


def test_balancing_keeps_the_product_and_gives_unit_norms():
    a = A.at[0, :, 1].set(0)
    x, y, z = blocks.balance(a, S, B)
    np.testing.assert_allclose(full(x, y, z), full(a, S, B), rtol=1e-4, atol=1e-5)
    norms = jnp.linalg.norm(x, axis=1)
    np.testing.assert_allclose(norms.ravel(), [1, 0, 1, 1, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=2), 1, rtol=1e-5)


def test_the_largest_block_divides_the_side():
    assert blocks.largest_block(1536, 128) == 128
    assert blocks.largest_block(30, 32, unit=2) == 30
    assert blocks.largest_block(64, 32, unit=64) == 64
