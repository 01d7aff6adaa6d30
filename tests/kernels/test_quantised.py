"""Packed values in eight bits: the grid, the products, the file, the report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.gpu import registry
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.io import packed as files
from flexhinm_jax.kernels import packing
from flexhinm_jax.types import BlockDiagonal
from tests.kernels.test_packing import plan_of

DTYPES = ["int8", "float8_e4m3fn", "float8_e5m2"]


@pytest.fixture(scope="module")
def plan():
    return plan_of(fh.FlexHiNM(8), sparsity=0.6)


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(7), shape, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_weight_moves_by_more_than_half_a_step_of_its_row(dtype):
    plan = plan_of(fh.HiNM(4), sparsity=0.75, dtype=dtype)
    packed = kernels.pack(plan, values="int8")
    assert packed.values_dtype == jnp.int8 and packed.dtype == dtype
    step = np.asarray(packing.scales(packed))[:, None]
    before = np.asarray(plan.weight, np.float32)
    # The matrix itself, not rounded to the dtype of the weight once more.
    whole = kernels.unpack(
        dataclasses.replace(packed, scale=packed.scale.astype(float))
    )
    assert (np.abs(whole - before) <= step * 0.5 * (1 + 1e-6)).all()
    assert (np.asarray(whole)[before == 0] == 0).all()
    top = np.abs(before).max(1, keepdims=True)
    np.testing.assert_allclose(step * 127, np.where(top > 0, top, 127), rtol=0.005)


def test_a_weight_on_the_grid_comes_back_exactly():
    steps = jax.random.randint(jax.random.key(0), (4, 16), -127, 128).at[:, 0].set(127)
    weight = steps * jnp.array([[0.5], [2.0], [0.25], [1.0]])
    method = fh.Magnitude(fh.NM(2, 4))
    plan = method.decide(method.solve(jax.random.key(0), weight, None), weight)
    packed = kernels.pack(plan, values="int8")
    np.testing.assert_array_equal(kernels.unpack(packed), plan.weight)


def test_rows_of_zeros_and_of_tiny_values_are_stored():
    weight = jnp.stack([jnp.zeros(8), jnp.full(8, 2e-7), jnp.ones(8)])
    weight = weight.astype(jnp.float16)
    method = fh.Magnitude(fh.NM(2, 4))
    plan = method.decide(method.solve(jax.random.key(0), weight, None), weight)
    packed = kernels.pack(plan, values="int8")
    got = np.asarray(kernels.unpack(packed), np.float32)
    step = np.asarray(packing.scales(packed))[:, None]
    assert np.isfinite(got).all() and (step > 0).all()
    assert (np.abs(got - np.asarray(plan.weight, np.float32)) <= step / 2).all()


@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "xla", "dense"])
def test_products_are_those_of_the_rounded_matrix(plan, values, backend):
    packed = kernels.pack(plan, values=values)
    w, x, y = kernels.unpack(packed), normal(3, 32), normal(3, 16)
    product = jax.jit(fh.sparse_dot, static_argnames=("transposed", "backend"))
    for ready in (packed, kernels.prepare(packed, backend)):
        got = product(x, ready, backend=backend)
        np.testing.assert_allclose(got, x @ w.T, rtol=1e-4, atol=1e-4)
    got = product(y, packed, transposed=True, backend=backend)
    np.testing.assert_allclose(got, y @ w, rtol=1e-4, atol=1e-4)


def test_many_and_few_rows_of_every_form():
    plan = plan_of(fh.NM(2, 4))
    packed = kernels.pack(plan, values="int8")
    w = kernels.unpack(packed)
    for rows in (1, 5, 70):
        x = normal(rows, 32)
        np.testing.assert_allclose(
            fh.sparse_dot(x, packed), x @ w.T, rtol=1e-4, atol=1e-4
        )


def test_half_precision_and_whole_inputs_keep_their_dtypes(plan):
    packed = kernels.pack(plan, values="int8")
    half = dataclasses.replace(packed, scale=packed.scale.astype(jnp.bfloat16))
    x = normal(3, 32).astype(jnp.bfloat16)
    y = fh.sparse_dot(x, half)
    assert y.dtype == jnp.bfloat16
    want = x.astype(jnp.float32) @ kernels.unpack(half).astype(jnp.float32).T
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-6, atol=5e-2)
    whole = jnp.arange(32, dtype=jnp.int32)
    assert fh.sparse_dot(whole, packed).dtype == jnp.float32


def test_block_factors_are_outside_of_the_scale(plan):
    packed = kernels.pack(plan, values="int8")
    factors = {
        "left": BlockDiagonal(normal(4, 4, 4)),
        "right": BlockDiagonal(normal(8, 4, 4)),
    }
    packed = dataclasses.replace(packed, **factors)
    w, x, y = kernels.unpack(packed), normal(3, 32), normal(3, 16)
    np.testing.assert_allclose(fh.sparse_dot(x, packed), x @ w.T, rtol=1e-3, atol=1e-3)
    got = fh.sparse_dot(y, packed, transposed=True)
    np.testing.assert_allclose(got, y @ w, rtol=1e-3, atol=1e-3)


def test_derivatives_reach_the_input_and_the_scale(plan):
    packed = kernels.pack(plan, values="int8")
    x = normal(3, 32)

    def loss(x, scale, packed=packed):
        y = fh.sparse_dot(x, dataclasses.replace(packed, scale=scale))
        return jnp.sum(jnp.square(y))

    def dense(x, scale, packed=packed):
        w = packing._unpack(dataclasses.replace(packed, scale=scale))
        return jnp.sum(jnp.square(x @ w.T))

    got = jax.grad(loss, (0, 1))(x, packed.scale)
    want = jax.grad(dense, (0, 1))(x, packed.scale)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_stack_is_rounded_as_its_matrices(plan):
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), plan)
    packed, one = (kernels.pack(p, values="int8") for p in (stack, plan))
    np.testing.assert_array_equal(packed.scale[1], one.scale)
    np.testing.assert_array_equal(packed.nm_values[1], one.nm_values)
    x = normal(3, 32)
    got = jax.vmap(lambda p: fh.sparse_dot(x, p))(packed)
    np.testing.assert_allclose(got[1], fh.sparse_dot(x, one), rtol=1e-5, atol=1e-5)


def test_folding_moves_scales_with_their_rows(plan):
    first = kernels.pack(plan_of(fh.HiNM(8), (32, 32), 0.75), values="int8")
    reader = kernels.pack(plan, values="int8")
    x = normal(3, 32)
    want = fh.sparse_dot(fh.sparse_dot(x, first), reader)
    folded, (moved,), _ = kernels.fold(first, reader)
    got = fh.sparse_dot(fh.sparse_dot(x, folded), moved)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    last, producer = (
        kernels.pack(plan_of(fh.NM(2, 4), shape), values="int8")
        for shape in ((8, 32), (32, 32))
    )
    turned = last.nm_index[:, ::-1]  # an order that is not the natural one
    last = dataclasses.replace(last, nm_index=turned)
    want = fh.sparse_dot(fh.sparse_dot(x, producer), last)
    producer, (last,), _ = kernels.fold_inputs(producer, last)
    got = fh.sparse_dot(fh.sparse_dot(x, producer), last)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", DTYPES)
def test_the_file_gives_back_every_bit(plan, tmp_path, values):
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), plan)
    half = plan_of(fh.NM(4, 8), dtype=jnp.bfloat16)
    tree = {"a": plan, "b": stack, "c": half}
    tree = {name: kernels.pack(p, values=values) for name, p in tree.items()}
    path = files.write_packed(tmp_path / "p", tree)
    for name, leaf in files.read_packed(path).items():
        assert leaf.dtype == tree[name].dtype
        for got, want in zip(*map(jax.tree.leaves, (leaf, tree[name])), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(
                np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8)
            )


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (lambda s: s[:, :1], r"scale is float32\[2, 1\], expected float32\[2, 8\]"),
        (lambda s: s * jnp.nan, "scale has NaN"),
        (lambda s: s.astype(jnp.int32), "scale is int32; need a floating dtype"),
    ],
)
def test_a_scale_that_does_not_fit_is_named(plan, tmp_path, scale, message):
    packed = kernels.pack(plan, values="int8")
    bad = dataclasses.replace(packed, scale=scale(packed.scale))
    with pytest.raises(ValueError, match=f"w: {message}"):
        files.write_packed(tmp_path / "p", {"w": bad})


def test_kernels_for_sparse_tensor_cores_refuse_eight_bits(monkeypatch):
    """By the dtype of the stored values, not by that of the weight."""
    fake = Kernel("fake", lambda packed: {}, lambda *_: None, (9,), since=(0, 1))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(registry, "KERNELS", {"fake": fake})
    plan = plan_of(fh.NM(2, 4), dtype=jnp.bfloat16)
    x = normal(3, 32).astype(jnp.bfloat16)
    with kernels.assume(9, 0):
        for values, why in (
            (None, "its layout is missing"),
            ("int8", "int8 has no 2:4"),
        ):
            packed = kernels.pack(plan, values=values)
            with pytest.raises(NotImplementedError, match=why):
                fh.sparse_dot(x, packed, backend="fake")


def test_another_dtype_is_refused(plan):
    with pytest.raises(ValueError, match="values='int4': choose one of int8, float8"):
        kernels.pack(plan, values="int4")
    packed = kernels.pack(plan, values="int8")
    assert kernels.quantise(packed, "float8_e4m3fn") is packed


def test_a_model_runs_and_the_report_tells_bytes_and_error():
    params = {"w": normal(32, 16, dtype=jnp.bfloat16), "b": jnp.zeros(16)}

    def apply_fn(p, x):
        w = (p["w"].astype(jnp.float32) * 2.0).astype(jnp.bfloat16)
        return x @ w.astype(jnp.float32) + p["b"]

    x = normal(3, 32)
    result = fh.prune(
        apply_fn, params, [x], fh.Wanda(fh.NM(2, 4)), key=jax.random.key(0)
    )
    packed = fh.pack(result.plans, params, result.uses, values="int8")
    dense = packed | {"w": kernels.unpack(packed["w"]).T}
    got = jax.jit(fh.sparsify(apply_fn))(packed, x)
    # The program casts to bfloat16: the weight here, its scale there.
    np.testing.assert_allclose(got, apply_fn(dense, x), rtol=2e-2, atol=0.15)
    told = fh.report(result.plans, packed, result.uses)
    (row,) = told.rows
    lost = np.asarray(dense["w"] - result.params["w"], np.float32)
    want = np.linalg.norm(lost) / np.linalg.norm(np.asarray(result.params["w"], float))
    np.testing.assert_allclose(row.rounding, want, rtol=1e-3)
    assert 0 < row.rounding < 0.01 and "rounding" in str(told)
    assert row.dense_bytes == 32 * 16 * 2 and row.packed_bytes == packed["w"].nbytes
    assert result.report.rows[0].rounding == 0
    assert "rounding" not in str(result.report)
