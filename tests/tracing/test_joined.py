"""Leaves put side by side before a product keep their own rows, columns and tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from tests.tracing.cases import assert_close, dense_tree, normal, outcome, packed_tree

X = normal(5, 8)
QKV = {"q": normal(8, 4), "k": normal(8, 8), "v": normal(8, 12)}
SQUARE = {name: normal(8, 8) + k for k, name in enumerate("abc")}
BIAS = {"bq": normal(4), "bk": normal(8), "bv": normal(12)}


def names(p, which):
    return [p[name] for name in which]


def outputs(p, x):
    return x @ jnp.concatenate(names(p, "qkv"), 1)


def moved(p, x):
    w = jnp.concatenate([w.T for w in names(p, "qkv")], 0).astype(jnp.float32)
    return jnp.tanh(x) @ (-w.reshape(24, 2, 4).reshape(24, 8)).T * 0.5


def sliced(p, x):
    w = jnp.concatenate(names(p, "qkv"), 1)
    q, rest = w[:, :4], w[:, 4:]
    return jnp.concatenate([jnp.sin(x) @ q, x @ rest], -1)


def inputs(p, x):
    return jnp.concatenate([x, jnp.sin(x), x**2], -1) @ jnp.concatenate(
        names(p, "abc"), 0
    )


def stacked(p, x):
    return jnp.einsum("td,ndh->nth", x, jnp.stack(names(p, "abc")))


def batched(p, x):
    xs = jnp.stack([x, jnp.sin(x), x**2])
    return jax.vmap(lambda w, x: x @ w)(jnp.stack(names(p, "abc")), xs)


def indexed(p, x):
    w = jnp.stack(names(p, "abc"))
    return jnp.sin(x @ w[0] @ w[2]) @ w[1].T


def twice(p, x):
    return x @ jnp.concatenate([p["a"], p["a"]], 1)


def nested(p, x):
    pair = jnp.concatenate(names(p, "ab"), 1)
    return x @ jnp.concatenate([pair, p["c"]], 1)


def heads(p, x):
    w = jnp.stack(names(p, "abc"), 1).reshape(8, 24)
    return jax.jit(lambda w: x @ w)(w)


def in_a_branch(p, x):
    w = jnp.concatenate(names(p, "abc"), 1)
    return lax.cond(x[0, 0] > 1e9, lambda w: x @ w, lambda w: jnp.sin(x) @ w, w)


def hidden(x):
    return np.sin(x @ SQUARE["a"] @ SQUARE["c"])


ALL = dict.fromkeys("abc", [X])
APART = {"a": [X], "b": [np.sin(X)], "c": [X**2]}
TRUTH = {
    outputs: (QKV, dict.fromkeys("qkv", [X])),
    moved: (QKV, dict.fromkeys("qkv", [np.tanh(X)])),
    sliced: (QKV, {"q": [np.sin(X)], "k": [X], "v": [X]}),
    inputs: (SQUARE, APART),
    stacked: (SQUARE, ALL),
    batched: (SQUARE, APART),
    indexed: (SQUARE, {"a": [X], "c": [X @ SQUARE["a"]], "b": [hidden(X)]}),
    twice: ({"a": SQUARE["a"]}, {"a": [X]}),
    nested: (SQUARE, ALL),
    heads: (SQUARE, ALL),
    in_a_branch: (SQUARE, dict.fromkeys("abc", [np.sin(X)])),
}


def by_name(case):
    return case.__name__


@pytest.mark.parametrize("apply_fn", TRUTH, ids=by_name)
def test_every_part_meets_its_own_inputs(apply_fn):
    params, truth = TRUTH[apply_fn]
    uses = discover(apply_fn, params, X)
    assert set(uses.leaves) == set(truth)
    stats = calibrate(apply_fn, params, uses, [X])
    for path, seen in truth.items():
        layout, x = uses.leaves[path].layout, np.concatenate(seen)
        shape = params[path].shape
        expected = shape if path == "b" and apply_fn is indexed else shape[::-1]
        assert layout.matrix_shape == expected
        assert_close(stats[path].gram, x.T @ x)
        assert float(stats[path].count) == len(x)


@pytest.mark.parametrize("apply_fn", TRUTH, ids=by_name)
def test_packed_parts_run_sparse_and_equal_densified_ones(apply_fn):
    params, _ = TRUTH[apply_fn]
    uses = discover(apply_fn, params, X)
    packed = packed_tree(params, uses, leaf_paths(params))
    sparse = sparsify(apply_fn)
    program = str(jax.make_jaxpr(sparse)(packed, X))
    assert program.count("name=sparse_product") >= len(params)
    dense = lambda p, x: apply_fn(dense_tree(p), x)  # noqa: E731
    trees = [packed]
    if apply_fn in (batched, inputs):
        trees.append({**dense_tree(packed), "b": packed["b"]})
    for p in trees:
        got, want = (outcome(f, p, X, argnums=(0, 1)) for f in (sparse, dense))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(g, w, 1e-4)


def test_parts_of_one_input_share_their_statistics():
    uses = discover(outputs, QKV, X)
    assert len({use.source for use in uses}) == 1
    stats = calibrate(outputs, QKV, uses, [X])
    assert stats["q"].gram is stats["v"].gram


def test_joined_biases_belong_to_their_parts():
    def apply_fn(p, x):
        b = jnp.concatenate([p["bq"], p["bk"], p["bv"]])
        return outputs(p, x) + b

    uses = discover(apply_fn, {**QKV, **BIAS}, X)
    assert {use.path: use.bias for use in uses} == {"q": "bq", "k": "bk", "v": "bv"}
    assert uses.skipped["bq"] == "bias of 'q'"


def conv(p, x):
    spec = ("NHWC", "HWIO", "NHWC")
    wide = jnp.concatenate([p["a"], p["b"]], 3)
    y = lax.conv_general_dilated(x, wide, (1, 1), "SAME", dimension_numbers=spec)
    both = jnp.concatenate([p["c"], p["d"]], 2)
    return lax.conv_general_dilated(y, both, (2, 2), "VALID", dimension_numbers=spec)


def test_joined_kernels_of_convolutions():
    shapes = {
        "a": (3, 3, 4, 4),
        "b": (3, 3, 4, 8),
        "c": (2, 2, 4, 4),
        "d": (2, 2, 8, 4),
    }
    params, x = {k: normal(*s) for k, s in shapes.items()}, normal(2, 6, 6, 4)
    uses = discover(conv, params, x)
    assert set(uses.leaves) == set(params)
    packed = packed_tree(params, uses, leaf_paths(params))
    assert_close(sparsify(conv)(packed, x), conv(dense_tree(packed), x))
    stats = calibrate(conv, params, uses, [x])
    spec = ("NHWC", "HWIO", "NHWC")
    wide = np.concatenate([params["a"], params["b"]], 3)
    arrays = jnp.asarray(x), jnp.asarray(wide)
    y = lax.conv_general_dilated(*arrays, (1, 1), "SAME", dimension_numbers=spec)
    y = np.asarray(y)
    rows = [
        y[:, i : i + 2, j : j + 2, 4:].reshape(2, -1)
        for i in (0, 2, 4)
        for j in (0, 2, 4)
    ]
    tokens = np.concatenate(rows)
    assert_close(stats["d"].gram, tokens.T @ tokens)


def test_what_is_joined_and_scanned_or_used_otherwise_says_so():
    def scanned(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, jnp.stack(names(p, "abc")))[0]

    assert "scanned over a part of an axis" in discover(scanned, SQUARE, X).skipped["a"]
    scaled = lambda p, x: x * jnp.concatenate(names(p, "abc"), 0)[:5]  # noqa: E731
    assert discover(scaled, SQUARE, X).skipped["a"] == "stopped at 'mul'"
    token = lambda p, x: jnp.concatenate([p["a"][:1], x], 0) @ p["b"]  # noqa: E731
    uses = discover(token, SQUARE, X)
    assert uses.skipped["a"] == "stopped at 'concatenate'" and set(uses.leaves) == {"b"}


def test_an_lstm_cell_that_concatenates_its_kernels_is_pruned():
    cell = nn.OptimizedLSTMCell(8)
    carry = cell.initialize_carry(jax.random.key(0), X.shape)
    params = jax.tree.map(
        lambda x: normal(*x.shape), cell.init(jax.random.key(1), carry, X)["params"]
    )
    f = lambda p, x: cell.apply({"params": p}, (x, -x), x**2)[1]  # noqa: E731
    uses = discover(f, params, X)
    gates = [f"{side}{gate}/kernel" for side in "ih" for gate in "ifgo"]
    assert sorted(uses.leaves) == sorted(gates)
    assert uses.leaves["hf/kernel"].bias == "hf/bias"
    stats = calibrate(f, params, uses, [X])
    assert_close(stats["hf/kernel"].gram, (-X).T @ -X)
    assert_close(stats["if/kernel"].gram, (X**2).T @ X**2)


@pytest.mark.parametrize("apply_fn", [outputs, inputs, batched], ids=by_name)
def test_going_in_order_solves_every_part_on_its_inputs(apply_fn):
    params, truth = TRUTH[apply_fn]
    method, key = fh.Wanda(fh.NM(2, 4)), jax.random.key(0)
    once = fh.prune(apply_fn, params, [X], method, key=key)
    notes = []
    result = fh.prune_sequential(
        apply_fn, params, [X], method, key=key, progress=lambda r: notes.append(r.note)
    )
    assert set(result.plans) == set(truth) and not any(notes)
    for path in truth:
        np.testing.assert_array_equal(result.params[path] != 0, once.params[path] != 0)


def test_leaves_stacked_for_a_ragged_dot_each_see_their_own_group():
    sizes = jnp.array([3, 0, 5, 4], jnp.int32)
    params = {"a": normal(8, 4), "bc": normal(2, 8, 4), "d": normal(8, 4)}
    x = normal(12, 8)

    def apply_fn(p, x):
        w = jnp.concatenate([p["a"][None], p["bc"], p["d"][None]])
        return jnp.tanh(lax.ragged_dot(x, 0.5 * w, sizes))

    uses = discover(apply_fn, params, x)
    assert {p: use.layout.matrix_shape for p, use in uses.leaves.items()} == {
        "a": (4, 8),
        "bc": (4, 8),
        "d": (4, 8),
    }
    stats = calibrate(apply_fn, params, uses, [x])
    seen = 0.5 * x  # what the leaves themselves are multiplied with
    runs = [seen[:3], seen[3:3], seen[3:8], seen[8:]]
    for name, own in (("a", runs[0]), ("d", runs[3])):
        assert stats[name].count == len(own)
        assert_close(stats[name].gram, own.T @ own)
    np.testing.assert_array_equal(stats["bc"].count, [0, 5])
    assert_close(stats["bc"].gram[1], runs[2].T @ runs[2])
    result = fh.prune(
        apply_fn, params, [x], fh.Wanda(fh.NM(2, 4)), key=jax.random.key(0)
    )
    want = apply_fn(result.params, x)
    assert_close(fh.sparsify(apply_fn)(result.packed, x), want)
    one_pass = fh.prune_sequential(
        apply_fn, params, [x], fh.Wanda(fh.NM(2, 4)), key=jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, one_pass.params, result.params)
