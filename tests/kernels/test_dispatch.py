"""Every program of a product against the dense matrix, under every transformation."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.gpu import registry, selfcheck, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.kernels import cost, dispatch, reference, xla
from flexhinm_jax.kernels.dense import WIDE
from tests.cases import MORE_PATTERNS, PATTERNS, targets

ALL = {
    k: p for k, p in (PATTERNS | MORE_PATTERNS).items() if "unstructured" not in k
} | {"16:32": fh.NM(16, 32)}


@functools.partial(jax.jit, static_argnums=0)
def plan_of(method, w, sparsity):
    state = method.solve(jax.random.key(1), w, None, sparsity=sparsity)
    return method.decide(state, w)


@functools.cache
def pack(pattern, shape=(16, 32), dtype=jnp.float32, sparsity=None, seed=0):
    w = normal(*shape, seed=seed, dtype=dtype)
    sparsity = targets(pattern)[1] if sparsity is None else sparsity
    plan = plan_of(fh.Magnitude(pattern), w, sparsity)
    return kernels.pack(plan), plan.weight


@functools.cache
def normal(*shape, seed=3, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def ready(packed):
    return kernels.prepare(packed, "xla")


def held(packed):
    return kernels.prepare(packed, "dense")


@pytest.fixture(scope="module")
def weights():
    return {name: pack(pattern) for name, pattern in ALL.items()}


@jax.jit
def in_every_form(x, packed):
    packed = packed.filled()
    selects = cost.selects(packed)
    names = xla.FORMS if selects else ["terms", "tiles"]
    return {
        **{name: xla.FORMS[name](x, packed) for name in names},
        "reference": reference.matmul(x, packed, jnp.float32),
    }


@pytest.mark.once
@pytest.mark.parametrize("name", ALL)
def test_every_form_computes_the_product_of_every_pattern(weights, name):
    packed, w = weights[name]
    x = normal(5, 32)
    for form, got in in_every_form(x, packed).items():
        np.testing.assert_allclose(got, x @ w.T, rtol=1e-4, atol=1e-4, err_msg=form)


@pytest.mark.parametrize("rows", [1, 2, 3, 63, 64, 129, 300])
@pytest.mark.parametrize("form", [kernels.strip, ready, held])
def test_any_number_of_rows_gives_the_dense_product(weights, rows, form):
    packed, w = weights["flexhinm"]
    x = normal(rows, 32)
    got = fh.sparse_dot(x, form(packed))
    np.testing.assert_allclose(got, x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [kernels.strip, ready, held])
def test_tiles_with_different_regions_give_the_dense_product(form):
    from tests.kernels.test_packing import ragged_plan

    plan = ragged_plan()
    packed = form(kernels.pack(plan))
    x = normal(4, plan.weight.shape[1])
    want = x @ plan.weight.T
    for rows in (1, 4):
        got = fh.sparse_dot(x[:rows], packed)
        np.testing.assert_allclose(got, want[:rows], rtol=1e-5, atol=1e-5)
    y = normal(4, plan.weight.shape[0])
    got = fh.sparse_dot(y, packed, transposed=True)
    np.testing.assert_allclose(got, y @ plan.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_half_precision_accumulates_in_float32(dtype, backend):
    packed, w = pack(fh.FlexHiNM(8), dtype=dtype)
    exact = lambda a: np.asarray(a, np.float64)  # noqa: E731
    for lead in ((), (2,), (2, 3), (70,)):
        x = normal(*lead, 32, dtype=dtype)
        got = fh.sparse_dot(x, packed, backend=backend, dtype=jnp.float32)
        np.testing.assert_allclose(got, exact(x) @ exact(w).T, rtol=1e-5, atol=1e-5)
        assert fh.sparse_dot(x, packed, backend=backend).dtype == dtype


@pytest.mark.parametrize("shape", [(6, 12), (21, 20), (3, 4), (40, 36)])
def test_sizes_that_no_tile_divides(shape):
    packed, w = pack(fh.NM(2, 4), shape)
    x = normal(7, shape[1])
    for rows in (1, 7):
        got = fh.sparse_dot(x[:rows], packed)
        np.testing.assert_allclose(got, x[:rows] @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(backend, lead):
    packed, _ = pack(fh.FlexHiNM(8))
    f = lambda x, p: fh.sparse_dot(x, p, backend=backend).sum()  # noqa: E731
    x = jnp.zeros((*lead, 32))
    assert fh.sparse_dot(x, packed, backend=backend).shape == (*lead, 16)
    g = jax.grad(f, 1, allow_int=True)(x, packed)
    assert not np.asarray(g.nm_values).any()


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_nan_reaches_every_output_of_its_row_as_in_the_dense_product(
    backend, transposed
):
    packed, w = pack(fh.FlexHiNM(8), sparsity=0.75)
    x = normal(3, 16 if transposed else 32).at[1, 5].set(jnp.nan)
    got = fh.sparse_dot(x, packed, backend=backend, transposed=transposed)
    want = x @ (w if transposed else w.T)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got[1]).all() and not np.isnan(got[0]).any()


@pytest.mark.parametrize("name", ["2:4", "flexhinm", "5:8", "vector", "hinm-1:4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_reference(weights, name, transposed):
    packed, _ = weights[name]
    x = normal(5, 16 if transposed else 32)

    def gradients(backend):
        def loss(x, p):
            y = fh.sparse_dot(x, p, transposed=transposed, backend=backend)
            return jnp.sin(y).sum()

        return jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, packed)

    (dx, dp), (want_x, want_p) = gradients("xla"), gradients("reference")
    np.testing.assert_allclose(dx, want_x, rtol=1e-4, atol=1e-4)
    assert (dp.nm_values is None) == (packed.nm_values is None)
    dp, want_p = dp.filled(), want_p.filled()
    for field in ("dense_values", "nm_values"):
        got, want = getattr(dp, field), getattr(want_p, field)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=field)


def test_second_derivatives_in_reverse_mode():
    packed, w = pack(fh.FlexHiNM(8))
    f = lambda x: jnp.sin(fh.sparse_dot(x, packed)).sum()  # noqa: E731
    dense = lambda x: jnp.sin(x @ w.T).sum()  # noqa: E731
    x = normal(2, 32)
    twice = lambda f: jax.grad(lambda x: jnp.square(jax.grad(f)(x)).sum())  # noqa: E731
    np.testing.assert_allclose(twice(f)(x), twice(dense)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepare", [kernels.strip, ready, held])
def test_vmap_over_inputs_weights_both_and_gradients(prepare):
    pairs = [pack(fh.FlexHiNM(8), seed=s, sparsity=0.6) for s in (0, 1)]
    indices = [p.filled() for p, _ in pairs]
    size = max(p.dense_index.shape[1] for p in indices)
    wide = max(p.nm_index.shape[1] for p in indices)
    w = jnp.stack([w for _, w in pairs])
    stack = jax.tree.map(
        lambda *a: jnp.stack(a), *(prepare(_padded(p, size, wide)) for p, _ in pairs)
    )
    x = normal(2, 3, 32)
    f = fh.sparse_dot
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    first = jax.tree.map(lambda a: a[0], stack)
    close(jax.vmap(f, (0, None))(x, first), x @ w[0].T)
    close(jax.vmap(f)(x, stack), x @ w.mT)
    close(jax.vmap(f, (None, 0))(x[0], stack), x[0] @ w.mT)
    close(jax.vmap(jax.vmap(f, (0, None)))(x, stack), x @ w.mT)
    grad = jax.grad(lambda x, p: jnp.sin(f(x, p)).sum())
    want = jax.grad(lambda x, w: jnp.sin(x @ w.T).sum())
    close(jax.vmap(grad)(x, stack), jax.vmap(want)(x, w))
    close(jax.vmap(grad, (0, None))(x, first), jax.vmap(want, (0, None))(x, w[0]))


def _padded(packed, dense, nm):
    """The same matrix with given numbers of columns per tile."""
    from flexhinm_jax.types import Plan, Regions, Support

    w, packed = kernels.unpack(packed), packed.filled()
    t, o, i = packed.dense_index.shape[0], *packed.shape
    d, h = packed.dense_index.shape[1], packed.nm_index.shape[1]
    used = np.concatenate([packed.dense_index, packed.nm_index], 1)
    rest = [np.setdiff1d(np.arange(i), row) for row in used]
    order = np.concatenate([used, np.stack(rest)], 1).astype(np.int32)
    regions = Regions(
        packed.out_order,
        jnp.asarray(order),
        jnp.full(t, d, jnp.int32),
        jnp.full(t, d + h, jnp.int32),
        packed.n,
        packed.m,
    )
    plan = Plan(w, Support(w != 0, regions), jnp.float32(1))
    del o
    return kernels.pack_to(plan, dense, nm)


def test_shard_map_over_the_batch_sums_the_gradients_of_the_weights():
    packed, w = pack(fh.FlexHiNM(8))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    x = normal(4, 32)

    def loss(x, values):
        p = dataclasses.replace(packed, nm_values=values)
        return jax.lax.psum(jnp.sin(fh.sparse_dot(x, p)).sum(), "data")

    f = jax.shard_map(
        lambda x: fh.sparse_dot(x, ready(packed)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    np.testing.assert_allclose(jax.jit(f)(x), x @ w.T, rtol=1e-4, atol=1e-4)
    f = jax.shard_map(loss, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    dx, dv = jax.jit(jax.grad(f, (0, 1)))(x, packed.nm_values)
    want = jax.grad(lambda x, w: jnp.sin(x @ w.T).sum())(x, w)
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-4)
    plain = jax.grad(
        lambda v: jnp.sin(
            fh.sparse_dot(x, dataclasses.replace(packed, nm_values=v))
        ).sum()
    )(packed.nm_values)
    np.testing.assert_allclose(dv, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepare", [kernels.strip, ready])
def test_an_exported_product_computes_the_same(prepare):
    packed, w = pack(fh.FlexHiNM(8))
    packed = prepare(packed)
    x = normal(4, 32)
    arrays, structure = jax.tree.flatten(packed)
    f = lambda x, *arrays: fh.sparse_dot(x, jax.tree.unflatten(structure, arrays))  # noqa: E731
    exported = jax.export.export(jax.jit(f), platforms=["cpu"])(x, *arrays)
    np.testing.assert_allclose(exported.call(x, *arrays), x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inputs", "rows"), [(32, 5), (WIDE + 8, 1), (WIDE + 8, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_holds_its_matrix_runs_one_dense_product(
    transposed, inputs, rows
):
    packed, w = pack(fh.FlexHiNM(8), (16, inputs))
    weight, x = held(packed), normal(rows, 16 if transposed else inputs)
    wide = inputs > WIDE
    derivatives = (jax.grad,) if wide else (jax.grad, jax.hessian)
    np.testing.assert_array_equal(weight.layouts["dense"], w if wide else w.T)

    def run(x, weight, backend="auto"):
        return fh.sparse_dot(x, weight, transposed=transposed, backend=backend)

    want = x @ (w if transposed else w.T)
    for got in (run(x, weight), run(x, packed, "dense")):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    loss = lambda x: jnp.sin(run(x, weight)).sum()  # noqa: E731
    dense = lambda x: jnp.sin(x @ (w if transposed else w.T)).sum()  # noqa: E731
    for f in derivatives:
        np.testing.assert_allclose(f(loss)(x), f(dense)(x), rtol=1e-4, atol=1e-4)
    for f, products in ((run, 1), (lambda x, p: jax.grad(loss)(x), 2)):
        text = jax.jit(f).lower(x, weight).as_text()
        assert text.count("dot_general") == products
        assert "gather" not in text and "while" not in text


def test_preparing_keeps_the_weight_and_adds_the_layout():
    packed, w = pack(fh.FlexHiNM(8))
    tree = {"w": packed, "b": jnp.zeros(3)}
    ready = kernels.prepare(tree)
    assert list(ready["w"].layouts) == ["dense"]  # nothing wins on so small a weight
    assert ready["w"].nbytes > packed.nbytes
    np.testing.assert_array_equal(kernels.unpack(ready["w"]), w)
    bare = kernels.strip(ready)
    assert jax.tree.structure(bare) == jax.tree.structure(tree)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    x = normal(2, 5, 32)
    got = jax.vmap(fh.sparse_dot)(x, kernels.prepare(stack))
    np.testing.assert_allclose(got, x @ w.T, rtol=1e-4, atol=1e-4)


def test_the_compact_layout_takes_no_more_bytes_than_the_canonical_one():
    packed, _ = pack(fh.FlexHiNM(64, permute=None), (128, 1024), sparsity=0.75)
    dense = 128 * 1024 * 4
    assert packed.nbytes <= 0.32 * dense
    slots = xla.slots_of(packed)
    layout = sum(a.nbytes for a in jax.tree.leaves(slots))
    assert layout + packed.filled().dense_values.nbytes <= 0.32 * dense
    # A value, a column of 2 bytes and a position of 2 bits for every fourth weight.
    added = kernels.prepare(packed, "xla").nbytes - packed.nbytes
    assert added <= 0.393 * dense


def test_the_form_follows_from_the_rows_and_the_size_of_the_weight(monkeypatch):
    small, _ = pack(fh.FlexHiNM(8))
    form = lambda *rows: [xla.form_of(n, small) for n in rows]  # noqa: E731
    assert form(1, 4, 5, 63, 64, 512) == [
        *["select"] * 2,
        *["tiles"] * 2,
        *["terms"] * 2,
    ]
    wide, _ = pack(fh.NM(6, 8))
    assert [xla.form_of(n, wide) for n in (1, 5, 64)] == ["terms"] * 3
    monkeypatch.setattr(xla, "CACHED_VALUES", 0)
    assert form(2, 3, 512) == ["select", "tiles", "terms"]
    assert xla.form_of(5, wide) == "tiles"
    monkeypatch.setattr(xla, "CACHED_TILE", 0)
    assert form(2, 3, 512) == ["select", "terms", "terms"]


def test_values_of_a_prepared_weight_are_not_differentiated():
    packed, w = pack(fh.FlexHiNM(8))
    ready = kernels.prepare(packed)
    f = lambda x, p: fh.sparse_dot(x, p).sum()  # noqa: E731
    with pytest.raises(ValueError, match="call `kernels.prepare` after training"):
        jax.grad(f, 1, allow_int=True)(normal(3, 32), ready)
    dx = jax.jit(jax.grad(f))(normal(3, 32), ready)
    np.testing.assert_allclose(dx, jnp.broadcast_to(w.sum(0), (3, 32)), atol=1e-4)


def test_unknown_and_unavailable_backends_say_why():
    packed, _ = pack(fh.NM(2, 4))
    x = normal(3, 32)
    with pytest.raises(ValueError, match="backend='fast' is unknown; choose one of"):
        fh.sparse_dot(x, packed, backend="fast")
    with pytest.raises(ValueError, match="is unknown"):
        kernels.prepare(packed, "fast")
    if dispatch.capability() is None:
        with pytest.raises(NotImplementedError, match="no NVIDIA GPU is visible"):
            fh.sparse_dot(x, packed, backend="gpu")
        for name in registry.KERNELS:
            with pytest.raises(NotImplementedError, match="no NVIDIA GPU is visible"):
                fh.sparse_dot(x, packed, backend=name)
    with kernels.assume(9, 0), pytest.raises(NotImplementedError, match="transposed"):
        fh.sparse_dot(x[:, :16], packed, transposed=True, backend="gpu")


def seven(x, packed, dtype):
    """Stands for a GPU kernel."""
    return jnp.full((x.shape[0], packed.shape[0]), 7, dtype)


FAKE = Kernel("fake", reference.prepare, seven, (9,), since=(0, 1))


@pytest.fixture
def register(monkeypatch):
    """Puts one fake kernel in the place of the GPU kernels; every dtype is served."""

    def run(**changes):
        kernel = dataclasses.replace(FAKE, **changes)
        monkeypatch.setattr(registry, "KERNELS", {"fake": kernel})
        monkeypatch.setenv(dispatch.OPT_IN, "1")
        monkeypatch.setattr(support, "HALF", (jnp.dtype(jnp.float32),))
        dispatch._warn.cache_clear()

    yield run
    jax.clear_caches()


def laid_out(packed):
    return dataclasses.replace(packed, layouts={"fake": {}})


def test_a_gpu_kernel_is_part_of_the_cuda_program_alone(register):
    register()
    packed, w = pack(fh.NM(2, 4))
    packed, x = laid_out(packed), normal(3, 32)
    with kernels.assume(9, 0):
        f = jax.jit(lambda x: fh.sparse_dot(x, packed))
        np.testing.assert_allclose(f(x), x @ w.T, rtol=1e-4, atol=1e-4)
        texts = {
            p: f.trace(x).lower(lowering_platforms=(p,)).as_text()
            for p in ("cpu", "cuda")
        }
        forced = fh.sparse_dot(x, packed, backend="fake")
    assert "7.0" in texts["cuda"] and "dot_general" not in texts["cuda"]
    assert "7.0" not in texts["cpu"] and "dot_general" in texts["cpu"]
    np.testing.assert_array_equal(forced, np.full((3, 16), 7.0))


@pytest.mark.parametrize(
    ("changes", "form", "message"),
    [
        ({"since": (99, 0)}, laid_out, "needs jax 99.0 or newer"),
        ({"majors": (8,)}, laid_out, "this chip has 9.0"),
        ({}, kernels.strip, r"call kernels.prepare\(packed, 'fake'\)"),
        (
            {"module": "wrong"},
            laid_out,
            "it gave a wrong result",
        ),
    ],
)
def test_a_machine_without_the_kernel_falls_back_with_one_warning(
    register, monkeypatch, recwarn, changes, form, message
):
    monkeypatch.setattr(selfcheck, "failure", lambda _: "it gave a wrong result")
    register(**changes)
    packed, w = pack(fh.NM(2, 4))
    packed, x = form(packed), normal(3, 32)
    with kernels.assume(9, 0):
        for _ in range(2):
            got = fh.sparse_dot(x, packed)
        with pytest.raises(NotImplementedError, match=message):
            fh.sparse_dot(x, packed, backend="gpu")
    np.testing.assert_allclose(got, x @ w.T, rtol=1e-4, atol=1e-4)
    ours = [str(w.message) for w in recwarn if "run dense" in str(w.message)]
    assert len(ours) == 1 and re.search(message, ours[0])


def test_a_product_that_a_kernel_does_not_serve_falls_back_in_silence(
    register, recwarn
):
    register()
    packed, _ = pack(fh.NM(2, 4), dtype=jnp.bfloat16)
    packed, x = laid_out(packed), normal(3, 32, dtype=jnp.bfloat16)
    with kernels.assume(9, 0):
        fh.sparse_dot(x, packed)
        with pytest.raises(NotImplementedError, match="bfloat16 has no"):
            fh.sparse_dot(x, packed, backend="fake")
    assert not [w for w in recwarn if "run dense" in str(w.message)]


def test_a_kernel_is_not_part_of_a_program_for_any_number_of_rows(register):
    register()
    packed = laid_out(pack(fh.NM(2, 4))[0])
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 32"), jnp.float32)
    with kernels.assume(9, 0):
        f = jax.jit(lambda x: fh.sparse_dot(x, packed))
        text = jax.export.export(f, platforms=["cuda"])(rows).mlir_module()
    assert "7.0" not in text and "dot_general" in text


def test_operators_are_those_of_the_dense_matrix():
    packed, w = pack(fh.FlexHiNM(8))
    x, y = normal(3, 32), normal(3, 16)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    close(x @ packed.T, x @ w.T)
    close(np.asarray(x) @ packed.T, x @ w.T)
    close(y @ packed, y @ w)
    close(packed @ x.T, w @ x.T)
    close(packed @ x[0], w @ x[0])
    close(packed.T @ y.T, w.T @ y.T)
    close(jax.jit(lambda x, p: x @ p.T)(x, packed), x @ w.T)
    close(jax.jit(lambda x, t: x @ t)(x, packed.T), x @ w.T)
    np.testing.assert_array_equal(packed.todense(), w)
    np.testing.assert_array_equal(packed.T.todense(), w.T)
    assert packed.T.shape == (32, 16) and packed.T.T is packed
    assert packed.ndim == packed.T.ndim == 2 and packed.T.dtype == w.dtype
