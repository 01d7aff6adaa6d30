import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh


def packed_of(pattern=None, sparsity=0.6, dtype=jnp.float32, shape=(16, 32)):
    w = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    method = fh.Magnitude(pattern or fh.FlexHiNM(8))
    plan = method.decide(method.solve(jax.random.key(1), w, None, sparsity=sparsity), w)
    return fh.kernels.pack(plan), plan.weight


X = jax.random.normal(jax.random.key(3), (2, 3, 32))


def test_the_product_is_that_of_the_dense_matrix():
    packed, w = packed_of()
    np.testing.assert_allclose(fh.sparse_dot(X, packed), X @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fh.sparse_dot(X[0, 0], packed), w @ X[0, 0], atol=1e-5)


def test_the_transposed_product_is_that_of_the_dense_matrix():
    packed, w = packed_of()
    y = jax.random.normal(jax.random.key(4), (5, 16))
    got = fh.sparse_dot(y, packed, transposed=True)
    np.testing.assert_allclose(got, y @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_input_and_values_match_the_dense_product(transposed):
    packed, w = packed_of()
    x = jax.random.normal(jax.random.key(5), (4, 16 if transposed else 32))

    def sparse(x, p):
        return jnp.sin(fh.sparse_dot(x, p, transposed=transposed)).sum()

    def dense(x, w):
        return jnp.sin(x @ (w if transposed else w.T)).sum()

    gx, gp = jax.grad(sparse, (0, 1), allow_int=True)(x, packed)
    want_x, want_w = jax.grad(dense, (0, 1))(x, w)
    np.testing.assert_allclose(gx, want_x, rtol=1e-4, atol=1e-5)
    # A gradient with the same indices unpacks to the masked dense gradient.
    as_weight = type(packed)(
        packed.dense_index, gp.dense_values, packed.nm_index, gp.nm_values,
        packed.nm_positions, packed.out_order, None, None,
        packed.shape, packed.n, packed.m,
    )  # fmt: skip
    want = jnp.where(w != 0, want_w, 0)
    np.testing.assert_allclose(fh.kernels.unpack(as_weight), want, rtol=1e-4, atol=1e-5)


def test_vmap_over_inputs_and_over_a_stack_of_weights():
    packed, w = packed_of()
    got = jax.vmap(lambda x: fh.sparse_dot(x, packed))(X)
    np.testing.assert_allclose(got, X @ w.T, rtol=1e-5, atol=1e-5)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    got = jax.vmap(fh.sparse_dot)(X, stack)
    np.testing.assert_allclose(got, X @ w.T, rtol=1e-5, atol=1e-5)


def test_bfloat16_in_is_bfloat16_out_with_float32_accumulation():
    packed, w = packed_of(dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    y = fh.sparse_dot(x, packed)
    assert y.dtype == jnp.bfloat16
    exact = x.astype(jnp.float32) @ w.astype(jnp.float32).T
    # One rounding of the result: bfloat16 has 8 bits.
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-7, atol=1e-2)


def test_mixed_dtypes_promote_like_jax():
    packed, _ = packed_of(dtype=jnp.bfloat16)
    assert fh.sparse_dot(X, packed).dtype == jnp.float32


def test_the_accumulator_can_be_returned_unrounded():
    packed, w = packed_of(dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    y = fh.sparse_dot(x, packed, dtype=jnp.float32)
    exact = x.astype(jnp.float32) @ w.astype(jnp.float32).T
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_an_empty_result():
    packed, _ = packed_of()
    assert fh.sparse_dot(jnp.zeros((0, 32)), packed).shape == (0, 16)


def test_a_wrong_inner_dimension_is_named():
    packed, _ = packed_of()
    with pytest.raises(ValueError, match=r"last axis must be 32"):
        fh.sparse_dot(jnp.zeros((3, 16)), packed)
    with pytest.raises(ValueError, match=r"last axis must be 16 .* transposed"):
        fh.sparse_dot(jnp.zeros((3, 32)), packed, transposed=True)


def test_a_stack_is_refused_with_the_remedy():
    packed, _ = packed_of()
    stack = jax.tree.map(lambda a: a[None], packed)
    with pytest.raises(ValueError, match="vmap over the stack"):
        fh.sparse_dot(X, stack)


def test_every_product_shows_up_by_name_in_the_jaxpr():
    packed, _ = packed_of()
    text = str(jax.make_jaxpr(fh.sparse_dot)(X, packed))
    assert text.count("name=sparse_product") == 1
