"""The cost model against what was measured, and the choices that follow from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.kernels import cost
from flexhinm_jax.kernels.cost import Place, Sizes

HALF = Sizes(1, 1536, 576, 1536 * 288, 576, True, True)  # 2:4
QUARTER = Sizes(1, 1536, 384, 1536 * 96, 24 * 192, True, True)  # FlexHiNM, 75 %
LARGE = Sizes(1, 4096, 4096, 4096 * 1024, 64 * 2048, True, False)
NARROW = Sizes(1, 192, 576, 192 * 288, 576, True, False)  # keys of SmolLM2, 2:4


@pytest.mark.parametrize(
    ("sizes", "rows", "cached", "microseconds"),
    [
        (HALF, 1, True, (109, 107)),
        (HALF, 8, True, (362, 715)),
        (HALF, 64, True, (2115, 1685)),
        (HALF, 1, False, (255, 210)),
        (HALF, 4, False, (631, 407)),
        (QUARTER, 1, True, (82, 70)),
        (QUARTER, 16, True, (453, 346)),
        (QUARTER, 64, True, (1329, 729)),
        (QUARTER, 8, False, (626, 362)),
        (LARGE, 1, False, (3235, 2295)),
        (LARGE, 8, False, (10744, 7719)),
        (LARGE, 64, False, (34000, 22107)),
    ],
)
def test_predictions_are_near_the_medians_they_were_fitted_to(
    sizes, rows, cached, microseconds
):
    sizes = dataclasses.replace(sizes, rows=rows, cached=cached)
    predicted = cost.dense(sizes), cost.prepared(sizes)
    for got, want in zip(predicted, microseconds, strict=True):
        assert 0.7 * want < got / 1e3 < 1.4 * want


@pytest.mark.parametrize(
    ("sizes", "cached", "threads", "dense"),
    [
        (HALF, True, 1, [1, 2, 4, 8, 16, 32]),
        (HALF, False, 1, [8]),
        (HALF, False, 2, [1, 2, 8]),
        (QUARTER, True, 1, [1, 4, 8]),
        (QUARTER, False, 1, []),
        (QUARTER, False, 2, [4, 8, 32]),
        (QUARTER, True, 2, [1, 2, 4, 8, 16, 32]),
        (LARGE, False, 1, []),
        (LARGE, False, 2, []),
        (NARROW, True, 1, [1, 2, 4, 8, 16, 32, 64, 128]),
    ],
)
def test_the_matrix_is_held_for_the_rows_where_no_packed_form_wins(
    sizes, cached, threads, dense
):
    sizes = dataclasses.replace(sizes, cached=cached, threads=threads)
    each = [dataclasses.replace(sizes, rows=rows) for rows in cost.ROWS]
    slower = [s.rows for s in each if cost.prepared(s) > cost.MARGIN * cost.dense(s)]
    assert slower == dense


def pack(shape, pattern, dtype=jnp.float32, sparsity=None):
    w = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    method = fh.Magnitude(pattern)
    plan = method.decide(method.solve(jax.random.key(1), w, None, sparsity=sparsity), w)
    return kernels.pack(plan), plan.weight


def test_sizes_count_what_a_stored_weight_holds():
    packed, w = pack((16, 32), fh.FlexHiNM(8, permute=None), sparsity=0.5)
    sizes = Sizes.of(3, packed, Place(True, 2))
    whole = packed.filled()
    stored = whole.dense_values.size + whole.nm_values.size
    assert (sizes.rows, sizes.outputs, sizes.inputs) == (3, 16, 32)
    assert sizes.stored == stored >= np.count_nonzero(w)
    assert sizes.columns == whole.dense_index.size + whole.nm_index.size
    assert sizes.selects and sizes.cached and sizes.threads == 2
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    assert Sizes.of(3, stack, Place(True, 2)) == sizes
    large = dataclasses.replace(packed, shape=(4096, 4096))
    assert not Sizes.of(3, large, Place(True)).cached


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_that_threads_share_reads_the_canonical_arrays(
    monkeypatch, threads, rows
):
    monkeypatch.setattr(cost, "threads", lambda: threads)
    packed, w = pack((16, 32), fh.NM(2, 4))
    ready, x = (
        kernels.prepare(packed, "xla"),
        jnp.asarray(np.ones((rows, 32), np.float32)),
    )
    np.testing.assert_allclose(fh.sparse_dot(x, ready), x @ w.T, rtol=1e-4, atol=1e-4)
    assert ready.nm_values is not None
    empty = dataclasses.replace(ready, nm_values=jnp.zeros_like(ready.nm_values))
    reads_them = not np.any(fh.sparse_dot(x, empty))
    assert reads_them == (rows == 1 and threads == 2)


@pytest.fixture
def both(monkeypatch):
    """A weight whose terms win from 8 rows on, the matrix below."""
    monkeypatch.setattr(cost, "holds", lambda rows, packed, place: rows < 8)
    packed, w = pack((16, 32), fh.NM(2, 4))
    return kernels.prepare(packed), w


def test_products_take_the_form_that_is_predicted_for_their_rows(both):
    ready, w = both
    assert list(ready.layouts) == ["xla", "dense"]
    np.testing.assert_array_equal(ready.layouts["dense"], w.T)
    product = jax.jit(fh.sparse_dot, static_argnames=("backend", "transposed"))
    for rows, dense in ((4, True), (9, False)):
        x = jax.random.normal(jax.random.key(2), (rows, 32))
        np.testing.assert_allclose(product(x, ready), x @ w.T, rtol=1e-4, atol=1e-4)
        assert ("dot_general" in product.lower(x, ready).as_text()) == dense
        forced = product.lower(x, ready, backend="xla").as_text()
        assert "dot_general" not in forced
    turned = product.lower(jnp.ones((9, 16)), ready, transposed=True).as_text()
    assert "dot_general" in turned and "gather" not in turned


def test_the_bytes_of_a_tree_say_whether_products_find_it_in_the_cache(both):
    bare = kernels.strip(both[0])
    one = 16 * 32 * 4
    for count in (1, cost.CACHE // one, cost.CACHE // one + 1):
        stack = jax.tree.map(
            lambda a, n=count: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), bare
        )
        ready = jax.eval_shape(lambda p: kernels.prepare({"w": p}), stack)["w"]
        assert ready.layouts["xla"].place.cached == (count * one <= cost.CACHE)


def test_small_weights_hold_their_matrix_and_those_of_other_dtypes_their_terms():
    small, _ = pack((16, 32), fh.NM(2, 4))
    assert list(kernels.prepare(small).layouts) == ["dense"]
    for other in (small.values_dtype, jnp.bfloat16):
        narrow = dataclasses.replace(small, nm_values=small.nm_values.astype(other))
        names = list(kernels.prepare(narrow).layouts)
        assert names == ["dense" if other == jnp.float32 else "xla"]
