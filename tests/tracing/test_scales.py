"""Leaves in eight bits, pruned with the scale that the program multiplies them with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.io import packed as files
from flexhinm_jax.kernels.quantised import to_grid

KEY = jax.random.key(0)
NAMES = ["int8", "float8_e4m3fn"]


def on_grid(w, axis=0, dtype="int8"):
    """(steps, scale) of a weight, one scale per position of all axes but `axis`."""
    scale = jnp.max(jnp.abs(w), axis, keepdims=True)
    scale = scale * (1 / 127 if dtype == "int8" else 1 / 448)
    return to_grid(w, scale, jnp.dtype(dtype)), jnp.squeeze(scale, axis)


def normal(*shape, seed=1):
    # Rows of very different sizes: scales matter.
    sizes = jnp.exp(jax.random.normal(jax.random.key(seed + 1), shape[-1:]))
    return jax.random.normal(jax.random.key(seed), shape) * sizes


def dense_layer(p, x):
    return x @ (p["kernel"].astype(jnp.float32) * p["scale"])


def transposed_layer(p, x):
    w = (
        p["kernel"].T.astype(jnp.bfloat16) * p["scale"][:, None].astype(jnp.bfloat16)
    ).T
    return (x.astype(jnp.bfloat16) @ w).astype(jnp.float32)


def headed_layer(p, x):
    w = p["kernel"].reshape(16, 4, 8).astype(jnp.float32) * p["scale"].reshape(4, 8)
    return jnp.einsum("bi,ihd->bhd", x, w)


def after_layer(p, x):
    return (x @ p["kernel"].astype(jnp.float32)) * p["scale"]


LAYERS = [dense_layer, transposed_layer, headed_layer, after_layer]
X = jax.random.normal(jax.random.key(5), (6, 16))


def params_of(dtype="int8"):
    kernel, scale = on_grid(normal(16, 32), 0, dtype)
    return {"kernel": kernel, "scale": scale}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_leaf_is_pruned_with_its_scale(layer, dtype, tmp_path):
    params = params_of(dtype)
    method = fh.Magnitude(fh.NM(2, 4))
    result = fh.prune(layer, params, [X], method, key=KEY)
    kernel = result.params["kernel"]
    assert kernel.dtype == params["kernel"].dtype
    np.testing.assert_array_equal(result.params["scale"], params["scale"])
    kept = np.asarray(kernel, np.float32) != 0
    before = np.asarray(params["kernel"], np.float32)
    np.testing.assert_array_equal(np.asarray(kernel, np.float32)[kept], before[kept])
    # The mask of the weights that the steps stand for.
    w = (before * np.asarray(params["scale"])).T
    want = fh.Magnitude(fh.NM(2, 4)).solve(KEY, jnp.asarray(w), None)
    keep = method.decide(want, jnp.asarray(w)).support.keep
    np.testing.assert_array_equal(result.plans["kernel"].support.keep, keep)
    fh.verify(result.plans["kernel"])
    # Packed: the same steps, the same function, through a file.
    leaf = result.packed["kernel"]
    assert leaf.values_dtype == leaf.dtype == kernel.dtype and leaf.scale is None
    path = files.write_packed(tmp_path / "p", result.packed)
    packed = files.read_packed(path, like=params)
    got = jax.jit(fh.sparsify(layer))(packed, X)
    tolerance = 3e-2 if layer is transposed_layer else 1e-5
    want = layer(result.params, X)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 30)
    (row,) = result.report.rows
    assert row.dense_bytes == 16 * 32 and row.packed_bytes == leaf.nbytes
    assert row.rounding == 0 and row.zeros >= 0.5


def test_products_run_on_the_steps(monkeypatch):
    params = params_of()
    result = fh.prune(dense_layer, params, [X], fh.Magnitude(fh.NM(2, 4)), key=KEY)
    seen = []
    dot = kernels.sparse_dot
    monkeypatch.setattr(
        "flexhinm_jax.tracing.sparsify.sparse_dot",
        lambda x, packed, **how: seen.append(packed) or dot(x, packed, **how),
    )
    fh.sparsify(dense_layer)(result.packed, X)
    (packed,) = seen
    assert packed.values_dtype == jnp.int8 and packed.scale is not None


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_are_judged_by_what_their_steps_stand_for(layer):
    """Whole vectors of rows compete: the steps alone would keep others."""
    params = params_of()
    pattern = fh.Unstructured()
    plain = {"kernel": params["kernel"].astype(jnp.float32)}
    scored = {"kernel": plain["kernel"] * params["scale"]}
    method = fh.Magnitude(pattern)
    prune = lambda f, p: fh.prune(f, p, [X], method, sparsity=0.5, key=KEY)  # noqa: E731
    keep = prune(layer, params).plans["kernel"].support.keep
    product = lambda p, x: x @ p["kernel"]  # noqa: E731
    want = prune(product, scored).plans["kernel"].support.keep
    other = prune(product, plain).plans["kernel"].support.keep
    np.testing.assert_array_equal(keep, want)
    assert (keep != other).any()


def test_moved_weights_are_rounded_to_the_grid_and_it_is_said(caplog):
    params = params_of()
    method = fh.SparseGPT(fh.NM(2, 4))
    x = jax.random.normal(jax.random.key(3), (64, 16))
    result = fh.prune(dense_layer, params, [x], method, key=KEY)
    assert "1 leaves in eight bits): the method moved weights" in caplog.text
    plan = result.plans["kernel"]
    fh.verify(plan)
    steps = np.asarray(plan.weight) / np.asarray(params["scale"])[:, None]
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    got = np.asarray(result.params["kernel"], np.float32)
    np.testing.assert_allclose(got.T, np.round(steps), atol=1e-3)
    # No weight is further from what the method gave than half a step.
    scored = {"kernel": dense_layer(params, jnp.eye(16))}
    free = fh.prune(lambda p, x: x @ p["kernel"], scored, [x], method, key=KEY)
    lost = np.abs(np.asarray(free.params["kernel"]) / np.asarray(params["scale"]) - got)
    assert (lost[np.abs(got) < 127] <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("loop", ["scan", "slices", "batch", "after"])
def test_a_stack_has_the_scales_of_its_layers(loop):
    w = normal(3, 16, 16)
    kernel, scale = on_grid(w, 1)  # scale [3, 16]
    params = {"kernel": kernel, "scale": scale}

    def apply_fn(p, x):
        def layer(x, one):
            w = one["kernel"].astype(jnp.float32) * one["scale"]
            return jnp.tanh(x @ w), None

        def after(x, one):
            y = x @ one["kernel"].astype(jnp.float32)
            return jnp.tanh(y * one["scale"]), None

        if loop in ("scan", "after"):
            return jax.lax.scan(layer if loop == "scan" else after, x, p)[0]
        if loop == "slices":
            for k in range(3):
                x, _ = layer(x, {name: leaf[k] for name, leaf in p.items()})
            return x
        whole = p["kernel"].astype(jnp.float32) * p["scale"][:, None]
        return jnp.einsum("lbi,lio->lbo", jnp.stack([x, x + 1, -x]), whole)

    result = fh.prune(apply_fn, params, [X], fh.Wanda(fh.NM(2, 4)), key=KEY)
    plan = result.plans["kernel"]
    kept = np.asarray(plan.support.keep)
    want = np.swapaxes(np.asarray(kernel * scale[:, None], np.float32), 1, 2)
    np.testing.assert_allclose(plan.weight, np.where(kept, want, 0), rtol=1e-6)
    assert kept.mean() == 0.5
    got = jax.jit(fh.sparsify(apply_fn))(result.packed, X)
    np.testing.assert_allclose(got, apply_fn(result.params, X), rtol=1e-4, atol=1e-4)


def test_scales_of_blocks_of_inputs_are_read_too():
    w = normal(32, 8).reshape(2, 16, 8)
    kernel, scale = on_grid(w, 1)
    params = {"kernel": kernel.reshape(32, 8), "scale": scale}

    def apply_fn(p, x):
        blocks = p["kernel"].reshape(2, 16, 8).astype(jnp.float32)
        return x @ (blocks * p["scale"][:, None]).reshape(32, 8)

    x = jax.random.normal(jax.random.key(5), (6, 32))
    result = fh.prune(apply_fn, params, [x], fh.Magnitude(fh.NM(2, 4)), key=KEY)
    plan = result.plans["kernel"]
    want = np.asarray(apply_fn(params, jnp.eye(32))).T
    np.testing.assert_allclose(plan.weight, np.where(plan.support.keep, want, 0))
    got = fh.sparsify(apply_fn)(result.packed, x)  # not a factor of outputs: unpacked
    np.testing.assert_allclose(got, apply_fn(result.params, x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_pruned_says_why():
    params = params_of()
    params["zero"] = jnp.ones(32)

    def shifted(p, x):
        w = (p["kernel"].astype(jnp.float32) - p["zero"]) * p["scale"]
        return x @ w

    uses = fh.discover(shifted, params, X)
    assert "kernel" in uses.skipped and "sub" in uses.skipped["kernel"]
    uses = fh.discover(dense_layer, params, X)
    assert uses.skipped["scale"] == "1-D; the scale of 'kernel'"
    later = lambda p, x: after_layer(p, x) + p["zero"]  # noqa: E731
    uses = fh.discover(later, params, X)
    assert uses.skipped["scale"] == "1-D; the scale of 'kernel'"
    assert uses.leaves["kernel"].bias == "zero"
    found = fh.prune_sequential(
        lambda p, x: dense_layer(p, x) @ p["head"],
        params | {"head": normal(32, 8)},
        [X],
        fh.Magnitude(fh.NM(2, 4)),
        key=KEY,
    )
    assert "eight bits" in found.uses.skipped["kernel"] and "head" in found.plans
    method = fh.MaskLLM(fh.NM(2, 4))
    stats = fh.calibrate(dense_layer, params, uses, [X])
    states = fh.solve(method, KEY, params_of(), uses, stats)

    def loss(states):
        plans = fh.decide(method, states, params_of(), uses)
        return jnp.sum(plans["kernel"].weight)

    with pytest.raises(ValueError, match="kernel: is stored in eight bits.*learned"):
        jax.grad(loss, allow_int=True)(states)
    with pytest.raises(ValueError, match="kernel: is stored in eight bits.*factors"):
        fh.prune(dense_layer, params, [X], fh.ARMOR(fh.NM(2, 4), block=4), key=KEY)
