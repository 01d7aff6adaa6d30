"""The prepared CPU product on its own; test_backends runs it on every pattern."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.kernels import terms
from flexhinm_jax.types import Plan, Regions, Support
from tests.kernels.test_packing import ragged_plan


def pack(shape, pattern, dtype=jnp.float32, sparsity=None):
    w = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    method = fh.Magnitude(pattern)
    plan = method.decide(method.solve(jax.random.key(1), w, None, sparsity=sparsity), w)
    return kernels.pack(plan), plan.weight


@pytest.fixture(scope="module")
def layer():
    packed, w = pack((16, 72), fh.FlexHiNM(8), sparsity=0.6)
    assert packed.dense_index.size and packed.nm_index.size
    return packed, w, terms.terms_of(packed)


def scattered(given, shape):
    """The dense matrix that the terms describe, one addition per term."""
    w = np.zeros(shape, np.float32)
    rows = np.argsort(given.inverse)
    for values, columns in zip(given.values, given.columns, strict=True):
        np.add.at(w, (rows, np.asarray(columns)), np.asarray(values))
    return w


def test_terms_add_up_to_the_dense_matrix(layer):
    packed, w, given = layer
    np.testing.assert_array_equal(scattered(given, w.shape), w)
    assert given.columns.dtype == jnp.uint16
    kept = packed.dense_values.shape[2] + packed.nm_values.shape[2]
    assert given.values.shape == (kept + -kept % terms.BLOCK, 16)


def test_terms_of_ragged_tiles_add_up_to_the_dense_matrix():
    plan = ragged_plan()
    given = terms.terms_of(kernels.pack(plan))
    np.testing.assert_array_equal(scattered(given, plan.weight.shape), plan.weight)


def test_inputs_beyond_two_bytes_take_four():
    shapes = jax.eval_shape(
        lambda w: kernels.pack_to(_natural(w), 0, w.shape[1]),
        jax.ShapeDtypeStruct((1, 70000), jnp.float32),
    )
    assert jax.eval_shape(terms.terms_of, shapes).columns.dtype == jnp.uint32


def _natural(w):
    """A plan of 2:4 in natural order."""
    o, i = w.shape
    regions = Regions(
        jnp.arange(o, dtype=jnp.int32),
        jnp.arange(i, dtype=jnp.int32)[None],
        jnp.zeros(1, jnp.int32),
        jnp.full(1, i, jnp.int32),
        2,
        4,
    )
    return Plan(w, Support(w != 0, regions), jnp.float32(1))


@pytest.mark.parametrize(
    ("rows", "chunk"),
    [
        (1, 1),
        (6, 6),
        (7, 16),
        (9, 16),
        (17, 24),
        (64, 64),
        (128, 128),
        (129, 72),
        (1000, 128),
    ],
)
def test_chunks_are_equal_parts_in_whole_vectors(rows, chunk):
    assert terms.chunk_of(rows) == chunk


@pytest.mark.parametrize("rows", [1, 6, 7, 13])
def test_the_product_is_that_of_the_dense_matrix_and_nan_fills_its_row(layer, rows):
    packed, w, given = layer
    x = jax.random.normal(jax.random.key(3), (rows, w.shape[1]))
    multiply = jax.jit(terms.matmul, static_argnums=3)
    y = multiply(x, packed, given, jnp.float32)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-5, atol=1e-5)
    y = multiply(x.at[-1, 0].set(jnp.nan), packed, given, jnp.float32)
    assert np.isnan(y[-1]).all() and not np.isnan(y[:-1]).any()


def test_several_chunks_and_one_block_at_a_time(layer, monkeypatch):
    monkeypatch.setattr(terms, "SHORT", 0)
    monkeypatch.setattr(terms, "CHUNK", 8)
    _, w, given = layer
    x = jax.random.normal(jax.random.key(4), (13, w.shape[1]))
    y = terms.gather(x, given, jnp.float32)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 72), (3, 4, 28), (2, 5, 60)])
def test_selecting_is_gathering_for_every_group_and_every_tail(n, m, columns):
    packed, w = pack((8, columns), fh.NM(n, m))
    x = jax.random.normal(jax.random.key(3), (2, columns))

    @jax.jit
    def products(x, packed):
        given = terms.terms_of(packed)
        return (
            terms.select(x, packed.filled(), given),
            terms.gather(x, given, jnp.float32),
            terms.gather_canonical(x, packed, jnp.float32),
        )

    for y in products(x, packed):
        np.testing.assert_allclose(y, x @ w.T, rtol=1e-5, atol=1e-5)


def test_half_precision_is_multiplied_exactly_and_rounded_once():
    packed, w = pack((16, 32), fh.NM(2, 4), jnp.bfloat16)
    given = terms.terms_of(packed)
    for rows in (2, 9):
        x = jax.random.normal(jax.random.key(3), (rows, 32)).astype(jnp.bfloat16)
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        y = terms.matmul(x, packed, given, jnp.float32)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
        assert terms.matmul(x, packed, given, jnp.bfloat16).dtype == jnp.bfloat16


def test_a_prepared_stack_multiplies_like_its_members_and_passes_gradients(layer):
    packed, w, _ = layer
    other = dataclasses.replace(packed, nm_values=2 * packed.nm_values)
    stack = jax.tree.map(lambda *a: jnp.stack(a), packed, other)
    dense = jnp.stack([w, kernels.unpack(other)])
    x = jax.random.normal(jax.random.key(3), (2, 5, w.shape[1]))
    ready = kernels.prepare(stack, "xla")
    np.testing.assert_allclose(
        jax.vmap(fh.sparse_dot)(x, ready), x @ dense.mT, rtol=1e-4, atol=1e-4
    )
    loss = lambda x, f: jnp.sin(f(x)).sum()  # noqa: E731
    got = jax.grad(loss)(x, lambda x: jax.vmap(fh.sparse_dot)(x, ready))
    want = jax.grad(loss)(x, lambda x: x @ dense.mT)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
