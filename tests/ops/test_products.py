"""Products whose order of operands follows from the number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops.products import matmul_transposed


@pytest.mark.parametrize("lead", [(), (1,), (5,), (1, 1), (2, 3)])
def test_it_is_the_product_with_the_transposed_weight(lead):
    x = np.random.default_rng(0).standard_normal((*lead, 8)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    y = matmul_transposed(jnp.asarray(x), jnp.asarray(weight))
    assert y.shape == (*lead, 4)
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    half = matmul_transposed(jnp.bfloat16(x), jnp.bfloat16(weight), jnp.float32)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(("rows", "first"), [(1, (4, 8)), (2, (2, 8))])
def test_a_single_row_is_the_second_operand(rows, first):
    traced = jax.make_jaxpr(matmul_transposed)(jnp.ones((rows, 8)), jnp.ones((4, 8)))
    (product,) = (e for e in traced.eqns if e.primitive.name == "dot_general")
    assert product.invars[0].aval.shape == first
