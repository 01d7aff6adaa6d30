"""Attention in every dtype, compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.models.attention import attend

OPTIONS = {"is_causal": True, "scale": 0.3}


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)
    return [
        jax.random.normal(*each).astype(dtype)
        for each in zip(keys, shapes, strict=True)
    ]


@jax.jit
def attended(*operands):
    return attend(*operands, **OPTIONS)


@jax.jit
def plain(*operands):
    return jax.nn.dot_product_attention(*operands, **OPTIONS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_dtypes_are_computed_with_as_they_are(dtype):
    given = operands(dtype)
    assert attended(*given).dtype == dtype
    np.testing.assert_array_equal(attended(*given), plain(*given))


def test_float16_is_computed_with_in_float32():
    given = operands(jnp.float16)
    want = plain(*(x.astype(jnp.float32) for x in given))
    np.testing.assert_array_equal(attended(*given), want.astype(jnp.float16))
