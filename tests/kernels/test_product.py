import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax import kernels

#: Rows in another order, without a search that takes long to compile.
FLEX, SMALL = (fh.FlexHiNM(v, permute=fh.RandomRows()) for v in (8, 4))


@functools.cache
def packed_of(pattern=FLEX, sparsity=0.6, dtype=jnp.float32, shape=(16, 32)):
    w = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    method = fh.Magnitude(pattern)
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


def values_of(packed):
    return packed.dense_values, packed.nm_values


def with_values(packed, values):
    return dataclasses.replace(packed, dense_values=values[0], nm_values=values[1])


def moves_like(tree, seed=9):
    """A random direction in which a tree can move."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moves = [jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moves)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_forward_mode_in_the_input_and_in_the_values(transposed, wrap):
    packed, w = packed_of()
    x = jax.random.normal(jax.random.key(5), (4, 16 if transposed else 32))
    dx, dv = moves_like((x, values_of(packed)))
    dw = kernels.unpack(with_values(packed, dv))
    dot = functools.partial(fh.sparse_dot, transposed=transposed)

    def sparse(x, values):
        return jnp.sin(dot(x, with_values(packed, values)))

    def dense(x, w):
        return jnp.sin(x @ (w if transposed else w.T))

    at, by = (x, values_of(packed)), (dx, dv)
    got = jax.jvp(wrap(sparse), at, by)
    close(got, jax.jvp(dense, (x, w), (dx, dw)))
    y, push = jax.linearize(wrap(sparse), *at)
    close((y, push(*by)), got)
    # One factor alone.
    f = lambda x: sparse(x, values_of(packed))  # noqa: E731
    close(jax.jvp(wrap(f), (x,), (dx,))[1], jax.jvp(dense, (x, w), (dx, 0 * w))[1])
    f = lambda v: sparse(x, v)  # noqa: E731
    close(jax.jvp(wrap(f), at[1:], by[1:])[1], jax.jvp(dense, (x, w), (0 * x, dw))[1])


def test_jacobians_and_hessians_are_those_of_the_dense_product():
    packed, w = packed_of(shape=(8, 16), pattern=SMALL)
    x = jax.random.normal(jax.random.key(5), (3, 16))
    sparse = lambda x: jnp.tanh(fh.sparse_dot(x, packed))  # noqa: E731
    dense = lambda x: jnp.tanh(x @ w.T)  # noqa: E731
    for jacobian in (jax.jacfwd, jax.jacrev):
        close(jacobian(sparse)(x), jacobian(dense)(x))
    total = lambda f: lambda x: f(x).sum()  # noqa: E731
    for hessian in (
        jax.hessian,
        lambda f: jax.jacrev(jax.grad(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
    ):
        close(hessian(total(sparse))(x), jax.hessian(total(dense))(x))


def test_hessians_in_the_values_are_those_of_the_reference():
    packed, _ = packed_of(shape=(8, 16), pattern=SMALL)
    x = jax.random.normal(jax.random.key(5), (3, 16))

    def loss(values, x, backend):
        y = fh.sparse_dot(x, with_values(packed, values), backend=backend)
        return jnp.tanh(y).sum()

    at = values_of(packed)
    close(jax.hessian(loss)(at, x, "xla"), jax.hessian(loss)(at, x, "reference"))
    mixed = lambda b: jax.jacfwd(jax.grad(loss, 1), 0)(at, x, b)  # noqa: E731
    close(mixed("xla"), mixed("reference"))


def test_forward_mode_through_a_batch_of_inputs_and_of_weights():
    packed, w = packed_of()
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    dx, dv = moves_like((X, values_of(stack)))
    dw = kernels.unpack(with_values(stack, dv))

    def along(x, values, dx, dv):
        f = lambda x, v: fh.sparse_dot(x, with_values(packed, v))  # noqa: E731
        return jax.jvp(f, (x, values), (dx, dv))

    got = jax.vmap(along)(X, values_of(stack), dx, dv)
    close(got, (X @ w.T, X @ dw.mT + dx @ w.T))
    got = jax.vmap(along, (0, None, 0, None))(
        X, values_of(packed), dx, values_of(packed)
    )
    close(got, (X @ w.T, X @ w.T + dx @ w.T))


def test_forward_mode_in_a_shard_map():
    packed, w = packed_of()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    x, dx = X[0], moves_like(X[0])

    def along(x, dx, values):
        f = lambda x, v: fh.sparse_dot(x, with_values(packed, v))  # noqa: E731
        return jax.jvp(f, (x, values), (dx, values))

    specs: Any = dict(in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
    sharded = jax.jit(jax.shard_map(along, mesh=mesh, **specs))
    got = sharded(x, dx, values_of(packed))
    close(got, (x @ w.T, x @ w.T + dx @ w.T))


def test_a_prepared_weight_moves_with_its_input_and_not_with_its_values():
    packed, w = packed_of()
    prepared = kernels.prepare(packed, "xla")
    got = jax.jvp(lambda x: fh.sparse_dot(x, prepared), (X,), (2 * X,))
    close(got, (X @ w.T, 2 * X @ w.T))
    f = lambda v: fh.sparse_dot(X, with_values(prepared, v))  # noqa: E731
    at = (values_of(prepared),)
    with pytest.raises(ValueError, match="call `kernels.prepare` after training"):
        jax.jvp(f, at, at)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("kind", [jnp.int8, jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_and_booleans_are_cast_to_the_dtype_of_the_result(backend, kind):
    for dtype in (jnp.float32, jnp.bfloat16):
        packed, w = packed_of(dtype=dtype)
        x = jax.random.randint(jax.random.key(2), (5, 32), 0, 99).astype(kind)
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        y = fh.sparse_dot(x, packed, backend=backend)
        assert y.dtype == dtype
        rtol = 1e-5 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol, atol=1e-3)
        # Above 256 bfloat16 has no odd numbers: cast to float32, not to the values.
        x = x.astype(jnp.int32) + 257
        y = fh.sparse_dot(x, packed, backend=backend, dtype=jnp.float32)
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("prepare", [lambda p: p, lambda p: kernels.prepare(p, "xla")])
def test_complex_inputs_and_values_are_multiplied_as_they_are(prepare):
    packed, w = packed_of()
    x = jax.lax.complex(X, jnp.flip(X, -1))
    cast = dataclasses.replace(
        packed,
        dense_values=(1 + 2j) * packed.dense_values,
        nm_values=(1 + 2j) * packed.nm_values,
    )
    for weight, full in ((packed, w), (cast, (1 + 2j) * w)):
        for rows in (x, x[0, 0]):
            y = fh.sparse_dot(rows, prepare(weight))
            np.testing.assert_allclose(y, rows @ full.T, rtol=1e-5, atol=1e-4)
    loss = lambda f: lambda x: jnp.abs(f(x)).sum()  # noqa: E731
    got = jax.grad(loss(lambda x: fh.sparse_dot(x, prepare(cast))))(x)
    want = jax.grad(loss(lambda x: x @ ((1 + 2j) * w).T))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepare", [lambda p: p, lambda p: kernels.prepare(p, "xla")])
@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_float64_is_multiplied_and_summed_in_float64(backend, prepare, rows):
    with jax.enable_x64(True):
        rng: Any = np.random.default_rng(0)
        packed, w = packed_of(dtype=jnp.float64)
        packed, exact = prepare(packed), np.asarray(w)
        x = rng.standard_normal((rows, 32))
        y = fh.sparse_dot(x, packed, backend=backend)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, x @ exact.T, rtol=0, atol=1e-13)
        g = rng.standard_normal((rows, 16))
        y = fh.sparse_dot(g, packed, backend=backend, transposed=True)
        np.testing.assert_allclose(y, g @ exact, rtol=0, atol=1e-13)
        dx = jax.grad(lambda x: (g * fh.sparse_dot(x, packed)).sum())(jnp.asarray(x))
        np.testing.assert_allclose(dx, g @ exact, rtol=0, atol=1e-13)


def test_float64_of_one_factor_or_of_the_result_is_kept():
    with jax.enable_x64(True):
        packed, w = packed_of(dtype=jnp.float32)
        exact = np.asarray(w, np.float64)
        x: Any = np.random.default_rng(0).standard_normal((5, 32))
        y = fh.sparse_dot(x, packed)
        np.testing.assert_allclose(y, x @ exact.T, rtol=0, atol=1e-13)
        x = x.astype(np.float32)
        y = fh.sparse_dot(x, packed, dtype=jnp.float64)
        np.testing.assert_allclose(
            y, x.astype(np.float64) @ exact.T, rtol=0, atol=1e-13
        )
        assert fh.sparse_dot(x, packed).dtype == jnp.float32


def test_float64_factors_are_multiplied_in_float64():
    from flexhinm_jax.types import BlockDiagonal

    with jax.enable_x64(True):
        packed, w = packed_of(dtype=jnp.float64)
        rng: Any = np.random.default_rng(0)
        a, b = rng.standard_normal((4, 4, 4)), rng.standard_normal((8, 4, 4))
        packed = dataclasses.replace(
            packed,
            left=BlockDiagonal(jnp.asarray(a)),
            right=BlockDiagonal(jnp.asarray(b)),
        )
        left, right = (np.asarray(jax.scipy.linalg.block_diag(*m)) for m in (a, b))
        full, x = left @ np.asarray(w) @ right, rng.standard_normal((5, 32))
        np.testing.assert_allclose(kernels.unpack(packed), full, rtol=0, atol=1e-12)
        y = fh.sparse_dot(x, packed)
        np.testing.assert_allclose(y, x @ full.T, rtol=0, atol=1e-11)
