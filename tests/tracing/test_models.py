"""discover, calibrate and sparsify agree with the hand-made answers on every model."""

import jax
import numpy as np
import pytest

from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing import views
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from tests.tracing.cases import (
    CASES,
    assert_close,
    dense_tree,
    outcome,
    packed_tree,
)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]()


@pytest.fixture(scope="module")
def uses(case):
    return discover(case.apply_fn, case.params, *case.args)


def test_the_axes_and_biases_are_found(case, uses):
    found = {}
    for path, use in uses.leaves.items():
        layout = use.layout
        groups = (layout.stack, layout.out, layout.inputs)
        found[path] = tuple(tuple(f.axis for f in group) for group in groups)
        assert use.bias == case.leaves[path].bias
    assert found == {path: leaf.axes for path, leaf in case.leaves.items()}
    everything = set(leaf_paths(case.params))
    assert everything == set(uses.leaves) | set(uses.skipped)
    for bias in {leaf.bias for leaf in case.leaves.values()} - {None}:
        assert uses.skipped[bias].startswith("bias of")


def test_abstract_arrays_give_the_same_uses(case, uses):
    shapes = jax.eval_shape(lambda x: x, (case.params, case.args))
    assert discover(case.apply_fn, shapes[0], *shapes[1]) == uses


def test_the_statistics_are_those_of_the_inputs_computed_by_hand(case, uses):
    stats = calibrate(case.apply_fn, case.params, uses, [case.args, case.args])
    assert set(stats) == set(case.leaves)
    for path, leaf in case.leaves.items():
        got, x = stats[path], np.concatenate(leaf.inputs, axis=-2).astype(np.float32)
        count = 2 * np.array(x.shape[-2] if leaf.count is None else leaf.count)
        assert_close(got.gram, 2 * np.einsum("...ti,...tj->...ij", x, x))
        assert_close(got.sq_norm, 2 * np.square(x).sum(-2))
        assert_close(got.count, np.broadcast_to(count, got.count.shape), 0)
        assert_close(got.mean * np.asarray(got.count)[..., None], 2 * x.sum(-2))


def test_sparsify_equals_the_dense_function_of_the_same_zeros(case, uses):
    paths = leaf_paths(case.params)
    packed = packed_tree(case.params, uses, paths)
    assert leaf_paths(packed) == paths
    sparse = sparsify(case.apply_fn)
    program = jax.make_jaxpr(sparse)(packed, *case.args)
    assert str(program).count("name=sparse_product") >= len(uses)

    def dense(packed, *args):
        return case.apply_fn(dense_tree(packed), *args)

    if case.differentiable:
        (got, got_grads), (want, want_grads) = (
            outcome(f, packed, *case.args, argnums=(0, 1)) for f in (sparse, dense)
        )
    else:
        got, want = (jax.jit(f)(packed, *case.args) for f in (sparse, dense))
        got_grads = want_grads = []
    tol = 3e-2 if case.apply_fn.__qualname__.startswith("mixed") else 1e-5
    assert_close(got, want, tol)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_close(g, w, 10 * tol)


def test_matrix_and_leaf_are_inverse_on_every_layout(case, uses):
    leaves = dict(
        zip(leaf_paths(case.params), jax.tree.leaves(case.params), strict=True)
    )
    for path, use in uses.leaves.items():
        m = views.matrix(leaves[path], use.layout)
        assert m.shape == (*use.layout.stack_shape, *use.layout.matrix_shape)
        assert (views.leaf(m, use.layout) == leaves[path]).all()
