import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.io.packed import read_packed, write_packed
from flexhinm_jax.ops import factorised, saliency
from flexhinm_jax.pruning.apply import dense_weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (16, 32)) * jnp.exp(
    0.3 * jax.random.normal(jax.random.key(1), (16, 1))
)
STATS = correlated()
SEARCHED = fh.NM(2, 4, permute=fh.ChannelSearch(sweeps=8))


@functools.cache
def solved(method, sparsity=None):
    state = method.solve(KEY, W, STATS, sparsity=sparsity)
    return state, method.decide(state, W)


def proxy_loss(w, stats=STATS):
    bar, r, c = saliency.normalise(W)
    return factorised.loss(
        w / r[:, None] / c, bar, saliency.channel_weights(stats.sq_norm)
    )


def output_loss(w, stats=STATS):
    lost = w - W
    return jnp.sum((lost @ stats.gram) * lost) / jnp.sum((W @ stats.gram) * W)


@pytest.mark.parametrize(
    "method",
    [
        fh.ARMOR(block=8, steps=6),
        fh.ARMOR(block=(4, 16), steps=6, updates=1),
        fh.ARMOR(SEARCHED, block=8, steps=6),
        fh.ARMOR(block=8, steps=6, weighting="gram", damp=1e-5),
    ],
    ids=["diagonal", "rectangular", "searched", "gram"],
)
def test_losses_fall_monotonically_and_are_those_of_the_plan(method):
    state, plan = solved(method)
    fh.verify(plan)
    trace = np.asarray(state.fixed["trace"])
    assert trace.shape == (7,) and (np.diff(trace) <= 0).all()
    assert trace[-1] < 0.8 * trace[0] and state.fixed["error"] == trace[-1]
    if method.weighting == "diagonal":
        got = proxy_loss(dense_weight(plan))
    else:
        got = output_loss(dense_weight(plan))
    np.testing.assert_allclose(got, trace[-1], rtol=0.02)


def test_the_start_is_nowag():
    state, _ = solved(fh.ARMOR(block=8, steps=6))
    nowag = fh.NoWagP()
    plan = nowag.decide(nowag.solve(KEY, W, STATS), W)
    np.testing.assert_allclose(
        state.fixed["trace"][0], proxy_loss(plan.weight), rtol=1e-4
    )
    _, none = solved(fh.ARMOR(block=8, steps=0))
    np.testing.assert_allclose(dense_weight(none), plan.weight, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_change_nothing():
    state, plan = solved(fh.ARMOR(block=1, steps=4))
    np.testing.assert_allclose(state.fixed["trace"], state.fixed["trace"][0], rtol=1e-4)
    nowag = fh.NoWagP()
    want = nowag.decide(nowag.solve(KEY, W, STATS), W)
    np.testing.assert_array_equal(plan.support.keep, want.support.keep)
    np.testing.assert_allclose(dense_weight(plan), want.weight, rtol=1e-2, atol=1e-3)


def test_choosing_groups_again_is_worth_it_and_the_support_is_kept_without():
    moving, _ = solved(fh.ARMOR(block=8, steps=6))
    fixed, plan = solved(fh.ARMOR(block=8, steps=6, updates=0))
    assert moving.fixed["error"] < fixed.fixed["error"] < fixed.fixed["trace"][0]
    start = fh.NoWagP().solve(KEY, W, STATS).fixed["support"].keep
    np.testing.assert_array_equal(plan.support.keep, start)


@pytest.mark.slow
def test_a_start_is_never_made_worse():
    alps = fh.ALPS(fh.NM(2, 4))
    start = alps.solve(KEY, W, STATS)
    state, _ = solved(fh.ARMOR(block=8, steps=4, weighting="gram", start=alps))
    first, last = state.fixed["trace"][0], state.fixed["error"]
    np.testing.assert_allclose(first, start.fixed["error"], rtol=1e-3)
    assert last < first


@pytest.mark.slow
def test_the_gram_weighting_fits_the_outputs_better_than_the_diagonal():
    _, diagonal = solved(fh.ARMOR(block=8, steps=6))
    _, full = solved(fh.ARMOR(block=8, steps=6, weighting="gram"))
    assert output_loss(dense_weight(full)) < output_loss(dense_weight(diagonal))


@pytest.mark.slow
def test_other_targets_are_fitted_with_the_gram():
    target = W + 0.2 * jax.random.normal(jax.random.key(5), W.shape)
    stats = dataclasses.replace(STATS, cross=target @ STATS.gram)
    method = fh.ARMOR(block=8, steps=4, weighting="gram", damp=1e-4)
    plan = method.decide(method.solve(KEY, W, stats), W)
    near, far = dense_weight(plan) - target, dense_weight(plan) - W
    size = lambda x: jnp.sum((x @ STATS.gram) * x)  # noqa: E731
    assert size(near) < size(far)


@pytest.mark.slow
def test_centring_refits_the_bias():
    stats = dataclasses.replace(STATS, mean=STATS.mean + 0.3)
    for weighting in ("diagonal", "gram"):
        method = fh.ARMOR(block=8, steps=2, weighting=weighting, center=True)
        plan = method.decide(method.solve(KEY, W, stats), W)
        want = (W - dense_weight(plan)) @ stats.mean
        np.testing.assert_allclose(plan.bias, want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_published_loop_keeps_its_best():
    method = fh.ARMOR(block=8, solver="adam", steps=40, rate=1e-3)
    state, plan = solved(method)
    fh.verify(plan)
    assert state.fixed["error"] == state.fixed["trace"].min()
    assert state.fixed["error"] < 0.9 * state.fixed["trace"][0]
    np.testing.assert_allclose(
        proxy_loss(dense_weight(plan)), state.fixed["error"], rtol=1e-3
    )


def test_factors_have_unit_columns_and_rows_for_export():
    _, plan = solved(fh.ARMOR(block=8, steps=6))
    np.testing.assert_allclose(jnp.linalg.norm(plan.left.blocks, axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(plan.right.blocks, axis=2), 1, rtol=1e-4)
    short = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, plan
    )
    lost = proxy_loss(dense_weight(short).astype(jnp.float32))
    np.testing.assert_allclose(lost, proxy_loss(dense_weight(plan)), rtol=0.02)


def test_the_overhead_is_that_of_the_factors():
    state, plan = solved(fh.ARMOR(block=(4, 16), steps=6, updates=1))
    want = (16 * 4 + 32 * 16) / (16 * 32)
    np.testing.assert_allclose(state.fixed["overhead"], want)
    assert plan.left.blocks.size + plan.right.blocks.size == want * W.size


def test_blocks_follow_the_searched_order_through_packing_and_files(tmp_path):
    _, plan = solved(fh.ARMOR(SEARCHED, block=8, steps=6))
    order = np.asarray(plan.support.regions.in_order[0])
    assert (order != np.arange(32)).any()
    np.testing.assert_array_equal(plan.right.order, order)
    full = jax.scipy.linalg.block_diag(*plan.left.blocks) @ plan.weight[:, order]
    full = full @ jax.scipy.linalg.block_diag(*plan.right.blocks)
    np.testing.assert_allclose(dense_weight(plan)[:, order], full, rtol=1e-4, atol=1e-5)
    packed = fh.kernels.pack(plan)
    np.testing.assert_allclose(
        fh.kernels.unpack(packed), dense_weight(plan), rtol=1e-4, atol=1e-5
    )
    write_packed(tmp_path / "x.safetensors", {"w": packed})
    again = read_packed(tmp_path / "x.safetensors")["w"]
    x = jax.random.normal(KEY, (5, 32))
    want = x @ dense_weight(plan).T
    np.testing.assert_allclose(fh.sparse_dot(x, again), want, rtol=1e-4, atol=1e-4)
    y = jax.random.normal(KEY, (5, 16))
    want = y @ dense_weight(plan)
    got = fh.sparse_dot(y, again, transposed=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "permute",
    [None, pytest.param(fh.ChannelSearch(sweeps=4), marks=pytest.mark.slow)],
)
def test_a_model_with_kernels_and_with_rows_of_outputs_goes_the_whole_way(permute):
    def model(params, x):
        x = jnp.tanh(x @ params["kernel"] + params["bias"])  # [in, out]
        return x @ params["rows"].T  # [out, in]

    keys = jax.random.split(KEY, 3)
    params = {
        "kernel": jax.random.normal(keys[0], (16, 16)),
        "bias": jnp.zeros(16),
        "rows": jax.random.normal(keys[1], (16, 16)),
    }
    x = jax.random.normal(keys[2], (64, 16))
    method = fh.ARMOR(fh.NM(2, 4, permute=permute), block=8, steps=2)
    result = fh.prune(model, params, [x], method, key=KEY)
    y = model(result.params, x)
    got = fh.sparsify(model)(result.packed, x)
    np.testing.assert_allclose(got, y, rtol=1e-3, atol=1e-3)
    short = jax.tree.map(lambda a: a.astype(jnp.bfloat16), result.params)
    assert jnp.isfinite(model(short, x.astype(jnp.bfloat16))).all()
    cast = lambda p, x: model(jax.tree.map(lambda a: a.astype(x.dtype), p), x)  # noqa: E731
    half = fh.sparsify(cast)(result.packed, x.astype(jnp.bfloat16))
    np.testing.assert_allclose(half.astype(jnp.float32), y, rtol=0.1, atol=0.3)
    with pytest.raises(ValueError, match="kernel: .* only the core has zeros"):
        fh.keep_tree(result.plans, params, result.uses)
    assert "factors" in str(result.report)
    row = result.report.rows[0]
    np.testing.assert_allclose(row.overhead, (16 * 8 + 16 * 8) / (16 * 16))


@pytest.mark.slow
def test_dead_inputs_empty_weights_and_ties_give_finite_plans():
    dead = STATS.gram.at[:5].set(0).at[:, :5].set(0)
    stats = dataclasses.replace(STATS, gram=dead, sq_norm=jnp.diag(dead))
    rank_one = jnp.ones((32, 32))
    flat = dataclasses.replace(STATS, gram=rank_one, sq_norm=jnp.ones(32))
    weights = W, jnp.zeros_like(W), jnp.ones_like(W), W.at[:, 7].set(0).at[3].set(0)
    for weighting in ("diagonal", "gram"):
        method = fh.ARMOR(block=8, steps=2, weighting=weighting)
        for w in weights:
            for s in (stats, flat):
                state = method.solve(KEY, w, s)
                fh.verify(method.decide(state, w))
                assert jnp.isfinite(state.fixed["trace"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "positive number, a pair"),
        ({"block": (4, 8, 8)}, "positive number, a pair"),
        ({"solver": "sgd"}, "choose exact or adam"),
        ({"weighting": "full"}, "choose diagonal or gram"),
        ({"steps": -1}, "counts of 0 or more"),
        ({"start": "alps"}, "need a method"),
        ({"start": fh.ARMOR()}, "no factors"),
        ({"pattern": fh.NM(8, 16)}, "12870 patterns per group"),
        ({"precision": "float64"}, "float32"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fh.ARMOR(**options)


def test_blocks_that_do_not_fit_are_refused_by_number():
    with pytest.raises(ValueError, match=r"out=16 is not a multiple of block=12"):
        fh.ARMOR(block=12).solve(KEY, W, STATS)
    with pytest.raises(ValueError, match=r"in=32 is not a multiple of block=6"):
        fh.ARMOR(block=(4, 6)).solve(KEY, W, STATS)
    with pytest.raises(ValueError, match="cut through groups of m=4"):
        fh.ARMOR(block=2).solve(KEY, W, STATS)
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        norms = dataclasses.replace(STATS, gram=None)
        fh.ARMOR(weighting="gram").solve(KEY, W, norms)
