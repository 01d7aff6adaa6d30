from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.pruning import solve
from flexhinm_jax.tracing.discover import Finder, Traced
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import BlockDiagonal, PackedWeight, Plan

KEY = jax.random.key(3)


def model(params, x):
    """Two [in, out] layers, a scanned stack of [out, in] layers, a bias, a norm."""
    x = jnp.tanh(x @ params["first"] + params["bias"])

    def layer(h, w):
        return jnp.tanh(h @ w.T), None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    return (x * params["norm"]) @ params["last"]


def make(dtype=jnp.float32):
    shapes = {
        "first": (16, 32),
        "bias": (32,),
        "stack": (3, 32, 32),
        "norm": (32,),
        "last": (32, 8),
    }
    keys = jax.random.split(KEY, len(shapes))
    return {
        name: (0.4 * jax.random.normal(k, s)).astype(dtype)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


X = jax.random.normal(jax.random.key(4), (12, 16))
PATTERNS = [
    fh.NM(2, 4),
    fh.FlexHiNM(8, permute=None),
    fh.HiNM(4, permute=None),
    fh.Vector(8),
]


def pruned(method, sparsity, **options):
    params = make()
    return params, fh.prune(
        model, params, [X], method, sparsity=sparsity, key=KEY, **options
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_packed_model_computes_what_the_densified_one_computes(pattern):
    sparsity = 0.5 if isinstance(pattern, fh.NM) else 0.6
    params, result = pruned(fh.Wanda(pattern), sparsity)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    want = model(result.params, X)
    got = jax.jit(fh.sparsify(model))(result.packed, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    leaves = jax.tree.leaves(
        result.packed, is_leaf=lambda p: isinstance(p, PackedWeight)
    )
    assert sum(isinstance(p, PackedWeight) for p in leaves) == 3


def test_groups_run_along_the_contracted_axis_of_every_layout():
    _, result = pruned(fh.Magnitude(fh.NM(2, 4)), None)
    for name, axis in (("first", 0), ("last", 0), ("stack", 2)):
        zeros = np.moveaxis(np.asarray(result.params[name]) == 0, axis, -1)
        assert (zeros.reshape(*zeros.shape[:-1], -1, 4).sum(-1) == 2).all()


def test_biases_and_norms_stay_and_are_listed_with_a_reason():
    params, result = pruned(fh.Magnitude(fh.NM(2, 4)), None)
    for name in ("bias", "norm"):
        np.testing.assert_array_equal(result.params[name], params[name])
        assert result.uses.skipped[name]


def test_every_matrix_of_a_stack_is_solved_like_a_single_one():
    method = fh.Magnitude(fh.FlexHiNM(8, permute=None))
    params, result = pruned(method, 0.6)
    for layer in range(3):
        w = params["stack"][layer]
        state = method.solve(KEY, w, None, sparsity=0.6)
        np.testing.assert_array_equal(
            result.plans["stack"].support.keep[layer], state.fixed["support"].keep
        )


def test_results_do_not_depend_on_the_other_leaves():
    method = fh.Magnitude(fh.FlexHiNM(8, permute=None))
    _, together = pruned(method, 0.6)
    _, alone = pruned(method, 0.6, rules={"first|last": "skip"})
    np.testing.assert_array_equal(
        together.plans["stack"].support.keep, alone.plans["stack"].support.keep
    )


def test_equal_shapes_are_solved_in_one_call(monkeypatch):
    calls = []
    run = solve._solve

    def counted(method, w, *rest):
        calls.append(w.shape[0])
        return run(method, w, *rest)

    monkeypatch.setattr(solve, "_solve", counted)

    def apply(params, x):
        return x @ params["a"] + x @ params["b"] + x @ params["c"]

    params = {name: make()["stack"][j] for j, name in enumerate("abc")}
    fh.prune(apply, params, [jnp.ones((2, 32))], fh.Magnitude(fh.NM(2, 4)), key=KEY)
    assert calls == [3]


def test_a_stack_over_the_memory_limit_is_split_without_changing_results(monkeypatch):
    method = fh.Magnitude(fh.FlexHiNM(8, permute=None))
    _, whole = pruned(method, 0.6)
    monkeypatch.setattr(solve, "MAX_STACK_WEIGHTS", 1)
    _, split = pruned(method, 0.6)
    for path, plan in whole.plans.items():
        np.testing.assert_array_equal(plan.support.keep, split.plans[path].support.keep)


def equal_matrices(count):
    def apply(params, x):
        return sum(x @ w for w in params)

    params = list(jax.random.normal(jax.random.key(5), (6, 8, 16)))[:count]
    method = fh.Magnitude(fh.FlexHiNM(4))
    return fh.prune(
        apply, params, [jnp.ones((2, 8))], method, sparsity=0.5, key=KEY
    ).plans


@pytest.mark.parametrize("limit", [1, 1 << 15], ids=["alone", "stacked"])
def test_models_with_other_numbers_of_equal_matrices_share_programs(monkeypatch, limit):
    monkeypatch.setattr(solve, "MAX_STACK_WEIGHTS_ON_CPU", limit)
    six = equal_matrices(6)
    programs: Any = solve._solve
    before = programs._cache_size()
    five = equal_matrices(5)
    assert programs._cache_size() == before
    chex.assert_trees_all_equal(five, {path: six[path] for path in five})


def test_round_counts_repeat_at_most_a_third():
    rounded = [solve.round_count(count) for count in range(1, 18)]
    assert rounded == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]


def test_a_rule_gives_a_leaf_its_own_pattern_and_sparsity():
    rules = {"^last$": fh.NM(1, 4), "first": "skip"}
    params, result = pruned(fh.Magnitude(fh.HiNM(8, permute=None)), 0.75, rules=rules)
    np.testing.assert_array_equal(result.params["first"], params["first"])
    assert (np.asarray(result.params["last"]) == 0).mean() == 0.75
    assert result.plans["last"].support.regions.n == 1
    assert result.plans["stack"].support.regions.n == 2


def test_sparsity_can_be_given_per_path():
    wanted = {"first": 0.5, "stack": 0.75, "last": 0.25}
    _, result = pruned(fh.Magnitude(fh.Vector(8)), wanted)
    for path, plan in result.plans.items():
        assert abs(float((~plan.support.keep).mean()) - wanted[path]) < 0.04
    with pytest.raises(ValueError, match="stack: no sparsity given"):
        pruned(fh.Magnitude(fh.Vector(8)), {"first": 0.5})


def test_solving_again_with_the_states_only_removes():
    params, method = make(), fh.Magnitude(fh.FlexHiNM(8, permute=None))
    uses = fh.discover(model, params, X)
    low = fh.solve(method, KEY, params, uses, None, 0.5)
    high = fh.solve(method, KEY, params, uses, None, 0.75, prev=low)
    before, after = (fh.decide(method, s, params, uses) for s in (low, high))
    for path in before:
        assert not np.any(after[path].support.keep & ~before[path].support.keep)


def test_keep_tree_has_the_shapes_of_the_leaves_and_none_elsewhere():
    params, result = pruned(fh.Magnitude(fh.NM(2, 4)), None)
    keep = fh.keep_tree(result.plans, params, result.uses)
    assert keep["bias"] is None and keep["norm"] is None
    for name in ("first", "stack", "last"):
        np.testing.assert_array_equal(keep[name], result.params[name] != 0)


def test_densify_is_pure_and_works_under_jit():
    params, result = pruned(fh.Wanda(fh.FlexHiNM(8, permute=None)), 0.6)
    dense = jax.jit(lambda plans, params: fh.densify(plans, params, result.uses))
    got = dense(result.plans, params)
    jax.tree.map(np.testing.assert_array_equal, got, result.params)


def test_a_refitted_bias_reaches_its_leaf_and_block_wrappers_multiply_in():
    params, method = make(), fh.Magnitude(fh.NM(2, 4))
    uses = fh.discover(model, params, X)
    plans = fh.decide(method, fh.solve(method, KEY, params, uses), params, uses)
    old = plans["first"]
    a = jax.random.normal(KEY, (8, 4, 4))
    b = jax.random.normal(KEY, (4, 4, 4))
    plans["first"] = Plan(
        weight=old.weight,
        support=old.support,
        retained=old.retained,
        bias=jnp.arange(32.0),
        left=BlockDiagonal(a),
        right=BlockDiagonal(b),
    )
    dense = fh.densify(plans, params, uses)
    np.testing.assert_array_equal(dense["bias"], params["bias"] + jnp.arange(32.0))
    full = (
        jax.scipy.linalg.block_diag(*a) @ old.weight @ jax.scipy.linalg.block_diag(*b)
    )
    np.testing.assert_allclose(dense["first"].T, full, rtol=1e-4, atol=1e-4)
    got = fh.sparsify(model)(fh.pack(plans, params, uses), X)
    np.testing.assert_allclose(got, model(dense, X), rtol=1e-4, atol=1e-4)


def test_a_refitted_bias_without_a_bias_leaf_is_refused():
    params, method = make(), fh.Magnitude(fh.NM(2, 4))
    uses = fh.discover(model, params, X)
    plans = fh.decide(method, fh.solve(method, KEY, params, uses), params, uses)
    last = plans["last"]
    plans["last"] = Plan(last.weight, last.support, last.retained, bias=jnp.zeros(8))
    with pytest.raises(ValueError, match="last: .* no bias parameter"):
        fh.densify(plans, params, uses)


def test_bfloat16_parameters_stay_bfloat16():
    params = make(jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    result = fh.prune(model, params, [x], fh.Wanda(fh.NM(2, 4)), key=KEY)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(result.params))
    assert result.packed["first"].dtype == jnp.bfloat16


def test_an_axis_that_does_not_divide_names_the_leaf_and_the_remedy():
    with pytest.raises(ValueError, match=r"last: out=8 .* vector_size=16.*\"skip\""):
        pruned(fh.Magnitude(fh.FlexHiNM(16, permute=None)), 0.75)


def test_nan_weights_are_refused_by_name():
    params = make()
    params["last"] = params["last"].at[3, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"last: weight has 1 NaN .* at \(2, 3\)"):
        fh.prune(model, params, [X], fh.Magnitude(fh.NM(2, 4)), key=KEY)


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        fh.prune(model, make(), [], fh.Magnitude(fh.NM(2, 4)), key=KEY)


def test_uses_of_other_params_are_refused():
    params = make()
    uses = fh.discover(model, params, X)
    other = {**params, "first": jnp.zeros((16, 64))}
    with pytest.raises(ValueError, match="run discover"):
        fh.solve(fh.Magnitude(fh.NM(2, 4)), KEY, other, uses)
    with pytest.raises(ValueError, match="first: in uses but not in params"):
        fh.solve(fh.Magnitude(fh.NM(2, 4)), KEY, {"x": jnp.zeros(3)}, uses)


def test_missing_statistics_name_the_leaf():
    params = make()
    uses = fh.discover(model, params, X)
    with pytest.raises(ValueError, match="first: this method needs input statistics"):
        fh.solve(fh.Wanda(fh.NM(2, 4)), KEY, params, uses)


def test_progress_counts_leaves():
    params, seen = make(), []
    uses = fh.discover(model, params, X)
    fh.solve(
        fh.Magnitude(fh.NM(2, 4)),
        KEY,
        params,
        uses,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (3, 3)


@pytest.mark.parametrize("w, b", [(0.25, 1.0), (1.0, -0.125), (-8.0, 4.0)])
@pytest.mark.parametrize("method", [fh.SparseGPT, fh.ALPS])
def test_a_centred_fit_minds_the_constants_of_the_program(method, w, b):
    plain = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    scaled = lambda p, x: x @ (p["w"] * w) + p["b"] * b  # noqa: E731
    keys = jax.random.split(jax.random.key(7), 3)
    params = {"w": jax.random.normal(keys[0], (16, 8))}
    params["b"] = jax.random.normal(keys[1], (8,))
    x = 2 + jax.random.normal(keys[2], (64, 16))
    own = {"w": params["w"] / w, "b": params["b"] / b}
    how = method(fh.NM(2, 4), center=True)
    want = plain(fh.prune(plain, params, [x], how, key=keys[0]).params, x)
    got = scaled(fh.prune(scaled, own, [x], how, key=keys[0]).params, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_windows_of_the_inputs_with_one_bias_keep_the_mean_of_all_results():
    """Each window is a token with zeros elsewhere: so means and counts belong."""

    def apply_fn(p, x, y):
        parts = x @ p["w"][:8] + p["b"], y @ p["w"][8:] + p["b"]
        return jnp.concatenate(parts)

    keys = jax.random.split(jax.random.key(8), 4)
    params = {"w": jax.random.normal(keys[0], (16, 8))}
    params["b"] = jax.random.normal(keys[1], (8,))
    batch = (
        (2 + jax.random.normal(keys[2], (64, 8))),
        jax.random.normal(keys[3], (9, 8)),
    )
    how = fh.SparseGPT(fh.NM(2, 4), center=True)
    pruned = fh.prune(apply_fn, params, [batch], how, key=keys[0]).params
    lost = apply_fn(pruned, *batch) - apply_fn(params, *batch)
    assert jnp.abs(lost).max() > 0.1
    np.testing.assert_allclose(lost.mean(0), 0, atol=1e-5)


def test_a_centred_fit_keeps_the_mean_output_of_a_layer_with_a_bias():
    params = make()
    x = X + 2.0
    uses = fh.discover(model, params, x, rules={"stack|last": "skip"})
    stats = fh.calibrate(model, params, uses, [x])
    method = fh.ALPS(fh.NM(2, 4), center=True)
    states = fh.solve(method, KEY, params, uses, stats)
    dense = fh.densify(fh.decide(method, states, params, uses), params, uses)
    want = (x @ params["first"] + params["bias"]).mean(0)
    got = (x @ dense["first"] + dense["bias"]).mean(0)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_prune_names_a_leaf_whose_gram_needed_more_damping(caplog):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    x = jnp.ones((16, 8))  # a Gram of rank one
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        fh.prune(
            lambda p, x: x @ p["w"], params, [x], fh.SparseGPT(fh.NM(2, 4), damp=1e-8),
            key=jax.random.key(1),
        )  # fmt: skip
    assert any(r.getMessage().startswith("w: ") for r in caplog.records)


def test_prune_traces_and_searches_the_function_once_per_shape(monkeypatch):
    traces, searches = [], []
    find = Finder.__init__

    def counted(finder, *args):
        searches.append(1)
        find(finder, *args)

    monkeypatch.setattr(Finder, "__init__", counted)

    def apply(params, x):
        traces.append(x.shape)
        return x @ params["w"]

    params = {"w": jax.random.normal(KEY, (8, 4))}
    batches = [jnp.ones((2, 8)), jnp.ones((2, 8)), jnp.ones((3, 8))]
    fh.prune(apply, params, batches, fh.Wanda(fh.NM(2, 4)), key=KEY)
    assert traces == [(2, 8), (3, 8)] and len(searches) == 2
    traces.clear()
    fh.prune_sequential(apply, params, batches, fh.Wanda(fh.NM(2, 4)), key=KEY)
    assert traces == [(2, 8), (3, 8)]


def test_arguments_that_cannot_be_compared_are_traced_every_time():
    traced = Traced(lambda params, x, names: x @ params["w"])
    leaves, x = Leaves.of({"w": jnp.ones((8, 4))}), jnp.ones((2, 8))
    first = traced.find(leaves, (x, frozenset("a")))
    assert traced.find(leaves, (x, frozenset("a"))) is first
    assert traced.find(leaves, (x, frozenset("b"))) is not first
    assert traced.find(leaves, (x, {1, 2})) is not traced.find(leaves, (x, {1, 2}))
    assert traced.find(leaves, (x, True)) is not traced.find(leaves, (x, 1))


def odd(params, x):
    return jnp.tanh(x @ params["even"]) @ params["odd"]


def test_sizes_that_do_not_divide_are_refused_before_anything_is_calibrated():
    def batches():
        yield jnp.ones((2, 16))
        raise AssertionError("a second batch was read")

    params = {"even": jnp.ones((16, 30)), "odd": jnp.ones((30, 8))}
    with pytest.raises(ValueError, match="odd: in=30 is not a multiple of m=4"):
        fh.prune(odd, params, batches(), fh.Wanda(fh.NM(2, 4)), key=KEY)


@pytest.mark.parametrize("run", [fh.prune, fh.prune_sequential])
def test_sizes_that_do_not_divide_are_refused_or_skipped_with_the_reason(run, caplog):
    params = {"even": jax.random.normal(KEY, (16, 30)), "odd": jnp.ones((30, 8))}
    method, x = fh.Magnitude(fh.NM(2, 4)), jnp.ones((2, 16))
    with pytest.raises(ValueError, match="odd: in=30 is not a multiple of m=4"):
        run(odd, params, [x], method, key=KEY)
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        result = run(odd, params, [x], method, key=KEY, on_mismatch="skip")
    np.testing.assert_array_equal(result.params["odd"], params["odd"])
    assert (np.asarray(result.params["even"]) == 0).mean() == 0.5
    reason = "does not fit NM(n=2, m=4): in=30 is not a multiple of m=4"
    assert result.report.skipped["odd"] == reason and result.report.dense["odd"] == 240
    assert any(r.getMessage().startswith("odd: skipped") for r in caplog.records)
    with pytest.raises(ValueError, match="none of the .* leaves can be pruned"):
        run(odd, params, [x], fh.Magnitude(fh.NM(2, 7)), key=KEY, on_mismatch="skip")
    with pytest.raises(ValueError, match="on_mismatch='pad': choose 'error' or 'skip'"):
        run(odd, params, [x], method, key=KEY, on_mismatch="pad")


@pytest.mark.parametrize("run", [fh.prune, fh.prune_sequential])
def test_a_model_in_which_nothing_can_be_pruned_comes_back_with_the_reasons(
    run, caplog
):
    params = {"w": jax.random.normal(KEY, (12, 8))}

    def gated(p, x):
        return (x @ p["w"][:8]) * jnp.exp(p["w"][8])

    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        result = run(gated, params, [X[:, :8]], fh.Magnitude(fh.NM(2, 4)), key=KEY)
    for tree in (result.params, result.packed):
        np.testing.assert_array_equal(tree["w"], params["w"])
    assert not result.plans and result.report.coverage == 0
    assert result.report.dense == {"w": 96}
    assert "stopped at 'exp'" in result.report.skipped["w"]
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("none of the 1 leaves can be pruned (w: contracted, but")
    assert text.endswith("params come back as they are")
    with pytest.raises(ValueError, match="none of the 1 leaves can be pruned"):
        run(
            gated,
            params,
            [X[:, :8]],
            fh.Wanda(fh.NM(2, 4)),
            key=KEY,
            rules={"w": "skip"},
        )


def test_absurd_pattern_sizes_are_refused_at_once():
    for text in ("flexhinm:v=99999999999", "2:99999999999"):
        pattern = fh.patterns.parse(text)
        with pytest.raises(ValueError, match="is not a multiple of .*=99999999999"):
            fh.solve(
                fh.Magnitude(pattern),
                KEY,
                make(),
                fh.discover(model, make(), X),
                sparsity=None if text[0] == "2" else 0.75,
            )
