"""Packed leaves run sparse where they can and dense where they must."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from flexhinm_jax.types import AxisFactor, Layout
from tests.tracing.cases import (
    CASES,
    assert_close,
    dense_tree,
    normal,
    packed_leaf,
    packed_tree,
)
from tests.tracing.test_discover import IDS, TIED, tied

X = normal(2, 3, 8)
PLAIN = Layout((8, 6), (), (AxisFactor(1, 1, 6),), (AxisFactor(0, 1, 8),))


def sparse_dots(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("name=sparse_product")


def test_a_tied_table_is_looked_up_dense_and_multiplied_sparse():
    uses = discover(tied, TIED, IDS, rules={"table": "prune"})
    packed = packed_tree(TIED, uses, leaf_paths(TIED))
    f = sparsify(tied)
    assert sparse_dots(f, packed, IDS) == 1
    assert_close(jax.jit(f)(packed, IDS), tied(dense_tree(packed), IDS))


def test_the_derivative_rule_of_a_custom_vjp_is_kept():
    @jax.custom_vjp
    def straight_through(x, w):
        return x @ w

    straight_through.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda r, g: (7 * g @ r[1].T, jnp.einsum("bti,bto->io", r[0], g)),
    )
    f = lambda p, x: straight_through(x, p["w"])  # noqa: E731
    packed = {"w": packed_leaf(normal(8, 6), PLAIN)}
    assert sparse_dots(sparsify(f), packed, X) == 0
    loss = lambda f: jax.grad(lambda x, p: f(p, x).sum())  # noqa: E731
    got = loss(sparsify(f))(X, packed)
    assert_close(got, loss(f)(X, dense_tree(packed)))
    assert_close(got, 7 * np.ones((2, 3, 6)) @ np.asarray(dense_tree(packed)["w"]).T)


def test_a_product_in_another_layout_runs_dense():
    layout = Layout((8, 6), (), (AxisFactor(0, 1, 8),), (AxisFactor(1, 1, 6),))
    other = Layout((8, 6), (AxisFactor(1, 3, 2),), layout.out, (AxisFactor(1, 1, 3),))
    f = sparsify(lambda p, x: x @ p["w"])
    for case, dots in ((layout, 1), (other, 0)):
        packed = {"w": packed_leaf(normal(8, 6), case)}
        assert sparse_dots(f, packed, X) == dots
        assert_close(f(packed, X), X @ np.asarray(dense_tree(packed)["w"]))


def test_a_packed_weight_without_layout_is_a_plain_out_in_matrix():
    import dataclasses

    out_in = Layout((6, 8), (), (AxisFactor(0, 1, 6),), (AxisFactor(1, 1, 8),))
    packed = packed_leaf(normal(6, 8), out_in)
    bare = dataclasses.replace(packed, layout=None)
    f = sparsify(lambda p, x: x @ p["w"].T)
    assert sparse_dots(f, {"w": bare}, X) == 1
    assert_close(f({"w": bare}, X), f({"w": packed}, X))


def test_vmap_over_the_batch_equals_the_batched_call():
    case = CASES["linen attention"]()
    uses = discover(case.apply_fn, case.params, *case.args)
    packed = packed_tree(case.params, uses, leaf_paths(case.params))
    f = sparsify(case.apply_fn)
    got = jax.jit(jax.vmap(f, in_axes=(None, 0)))(packed, case.args[0])
    assert_close(got, jax.jit(f)(packed, *case.args))


def test_a_scan_keeps_slicing_packed_arrays():
    case = CASES["linen scan"]()
    uses = discover(case.apply_fn, case.params, *case.args)
    packed = packed_tree(case.params, uses, leaf_paths(case.params))
    jaxpr = jax.make_jaxpr(sparsify(case.apply_fn))(packed, *case.args)
    (scan,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    assert not any(v.aval.shape == (3, 8, 8) for v in scan.invars)


def test_keyword_arguments_and_static_arguments_reach_the_function():
    def apply_fn(p, x, mode, *, scale):
        return scale * (x @ p["w"]) if mode == "on" else x

    packed = {"w": packed_leaf(normal(8, 6), PLAIN)}
    got = sparsify(apply_fn)(packed, X, "on", scale=2.0)
    assert_close(got, 2 * X @ np.asarray(dense_tree(packed)["w"]))


def test_only_the_last_of_several_loops_over_one_weight_needs_nothing_dense():
    def apply_fn(p, x):
        x = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=2)[0]
        return lax.fori_loop(0, 2, lambda _, h: jnp.sin(h @ p["w"]), x)

    square = Layout((8, 8), (), (AxisFactor(1, 1, 8),), (AxisFactor(0, 1, 8),))
    packed = {"w": packed_leaf(normal(8, 8), square)}
    f = sparsify(apply_fn)
    assert sparse_dots(f, packed, X) == 2
    assert "scatter-add" not in str(jax.make_jaxpr(f)(packed, X)).split("scan")[0]
    assert_close(jax.jit(f)(packed, X), apply_fn(dense_tree(packed), X))
