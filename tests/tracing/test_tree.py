"""Trees of parameters leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.paths import over_stack
from flexhinm_jax.tracing.tree import Leaves

W = jnp.arange(96.0).reshape(2, 8, 6)
PARAMS = {"layers": [W[0], None], "stack": W, "name": "dense"}


def apply_fn(params, x):
    h, _ = jax.lax.scan(lambda h, w: (h @ w @ w.T, None), x, params["stack"])
    return h @ params["layers"][0]


def test_leaves_go_back_into_the_tree_with_others_in_place():
    leaves = Leaves.of(PARAMS)
    assert list(leaves) == ["layers/0", "name", "stack"] and len(leaves) == 3
    assert Leaves.of(leaves) is leaves
    assert leaves.tree() == PARAMS
    other = leaves.tree({"layers/0": 3, "stack": None})
    assert other == {"layers": [3, None], "stack": None, "name": "dense"}


def test_leaves_are_a_tree_of_their_leaves():
    leaves = Leaves.of({"stack": W, "layers": [W[0], None]})
    twice = jax.jit(lambda leaves: jax.tree.map(lambda x: 2 * x, leaves))(leaves)
    assert isinstance(twice, Leaves) and twice.structure == leaves.structure
    np.testing.assert_array_equal(twice["stack"], 2 * W)


def test_a_packed_weight_is_one_leaf():
    params = {"w": W[0]}
    method = fh.Magnitude(fh.NM(2, 4))
    x = jnp.ones((1, 8))
    run = lambda p, x: x @ p["w"]  # noqa: E731
    packed = fh.prune(run, params, [x], method, key=jax.random.key(0)).packed
    leaves = Leaves.of(packed)
    assert leaves["w"] is packed["w"] and leaves.tree()["w"] is packed["w"]
    uses = fh.discover(run, params, x)
    with pytest.raises(ValueError, match="w: is packed; pass the dense parameters"):
        leaves.dense(uses)


def test_the_matrices_of_a_leaf_are_stacked_out_by_in():
    x = jnp.ones((1, 8))
    uses = fh.discover(apply_fn, PARAMS, x, rules={"stack": "prune"})
    use = uses.leaves["stack"]
    leaves = Leaves.of(PARAMS)
    np.testing.assert_array_equal(leaves.matrix(use), np.swapaxes(W, 1, 2))
    like = leaves.like(use)
    assert (like.shape, like.dtype) == ((2, 6, 8), jnp.float32)


def test_over_a_stack_is_matrix_by_matrix():
    stack = jnp.arange(24.0).reshape(2, 3, 4)
    f = lambda x, y: x @ y  # noqa: E731
    want = [[f(stack[j, k], stack[j, k]) for k in range(3)] for j in range(2)]
    np.testing.assert_array_equal(over_stack(f, 2)(stack, stack), want)
    np.testing.assert_array_equal(over_stack(f, 0)(stack[0, 0], stack[0, 0]), 14.0)


def test_leaves_of_eight_bits_are_named_in_the_order_of_the_tree():
    names = [f"layer.{k}" for k in range(40)]
    leaves = Leaves.of({name: jnp.ones((4, 4), jnp.int8) for name in names})
    assert list(leaves.on_grid) == list(leaves) and not leaves.packed
