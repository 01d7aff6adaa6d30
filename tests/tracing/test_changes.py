"""What a program does to every element of a weight, it does to packed values too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.sparsify import sparsify
from flexhinm_jax.types import AxisFactor, BlockDiagonal, Layout
from tests.tracing.cases import assert_close, dense_tree, normal, packed_leaf

X = normal(5, 8)
LAYOUT = Layout((8, 8), (), (AxisFactor(1, 1, 8),), (AxisFactor(0, 1, 8),))


def sparse_dots(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("name=sparse_product")


CHANGES = {
    "reduce_precision": lambda w, x: lax.reduce_precision(w, 5, 2),
    "stop_gradient": lambda w, x: lax.stop_gradient(w),
    "bfloat16": lambda w, x: w.astype(jnp.bfloat16).astype(jnp.float32),
    "name": lambda w, x: checkpoint_name(w, "w"),
    "copy": lambda w, x: jnp.copy(w),
    "device_put": lambda w, x: jax.device_put(w),
    "constant": lambda w, x: w * 0.3 / 2,
    "negative": lambda w, x: -w,
    "of the batch": lambda w, x: jnp.sin(x).sum() * w,
    "several": lambda w, x: lax.reduce_precision(-w / 3, 5, 3).T.T * 2,
    "rounded, then scaled": lambda w, x: lax.stop_gradient(w) * x[0, 0],
}


@pytest.mark.parametrize("name", CHANGES)
def test_packed_equals_densified_in_value_and_derivative(name):
    f = lambda p, x: x @ CHANGES[name](p["w"], x)  # noqa: E731
    packed = {"w": packed_leaf(normal(8, 8), LAYOUT)}
    assert sparse_dots(sparsify(f), packed, X) == 1
    dense = lambda p, x: f(dense_tree(p), x)  # noqa: E731

    @jax.jit
    def outcome(packed, x):
        def both(f):
            loss = lambda p, x: jnp.sin(f(p, x)).sum()  # noqa: E731
            value = f(packed, x)
            grads = jax.grad(loss, (0, 1), allow_int=True)(packed, x)
            return value, grads[0]["w"].nm_values, grads[0]["w"].dense_values, grads[1]

        return both(sparsify(f)), both(dense)

    for got, want in zip(*map(jax.tree.leaves, outcome(packed, X)), strict=True):
        assert_close(got, want, 1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_a_product_of_factors_is_changed_as_a_whole(name):
    if name == "bfloat16":
        pytest.skip("the factors are rounded one by one")
    import dataclasses

    left = BlockDiagonal(normal(2, 4, 4))
    packed = packed_leaf(normal(8, 8), LAYOUT)
    packed = dataclasses.replace(packed, left=left)
    f = lambda p, x: x @ CHANGES[name](p["w"], x)  # noqa: E731
    leaf = views.leaf(packed.todense(), LAYOUT)
    assert_close(sparsify(f)({"w": packed}, X), f({"w": leaf}, X), 1e-4)


def test_a_position_out_of_range_is_clamped_as_in_the_dense_program():
    stack = Layout(
        (3, 8, 8),
        (AxisFactor(0, 1, 3),),
        (AxisFactor(2, 1, 8),),
        (AxisFactor(1, 1, 8),),
    )
    packed = {"w": packed_leaf(normal(3, 8, 8), stack)}

    def f(p, x, k):
        return x @ lax.dynamic_index_in_dim(p["w"], k, 0, keepdims=False)

    for k in (-9, -2, 1, 7):
        at = np.int32(k)
        assert_close(sparsify(f)(packed, X, at), f(dense_tree(packed), X, at))
