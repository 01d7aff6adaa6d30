import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.pruning.solve import keys_for

KEY = jax.random.key(0)
TX = optax.adamw(1e-2)
METHODS = {
    "hard concrete": fh.HardConcrete(fh.FlexHiNM(8, permute=None)),
    "wanda": fh.Wanda(fh.FlexHiNM(8, permute=None)),
}


def model(params, x):
    h = jnp.tanh(x @ params["in"] + params["bias"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    return h @ params["out"]


def loss_fn(params, x, y):
    loss = jnp.mean(jnp.square(model(params, x) - y).astype(jnp.float32))
    zeros = jnp.mean((params["in"] == 0).astype(jnp.float32))
    return loss, {"zeros": zeros}


@functools.cache
def setup(dtype=jnp.float32):
    k = jax.random.split(KEY, 5)
    params = {
        "in": jax.random.normal(k[0], (16, 24)) / 4,
        "bias": jnp.zeros(24),
        "stack": jax.random.normal(k[1], (2, 24, 24)) / 5,
        "out": jax.random.normal(k[2], (24, 3)) / 5,
    }
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    x = jax.random.normal(k[3], (32, 16)).astype(dtype)
    y = jnp.sin(3 * x[:, :3])
    uses = fh.discover(model, params, x, rules={"out": "skip"})
    return params, uses, (x, y)


@functools.cache
def prepared(method, dtype, tx):
    """States and step, which are compiled once for all tests."""
    params, uses, batch = setup(dtype)
    stats = fh.calibrate(model, params, uses, [batch[:1]])
    states = fh.solve(method, KEY, params, uses, stats, 0.4)
    return states, fh.make_step(method, loss_fn, tx, uses)


def start(method, dtype=jnp.float32, tx=TX):
    params, uses, batch = setup(dtype)
    states, step = prepared(method, dtype, tx)
    training = fh.init_training(method, params, uses, states, tx, key=KEY)
    return training, step, uses, batch


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n == "wanda" else [])
        for n in METHODS
    ],
)
def test_four_stages_trace_once_and_end_with_exact_zeros(name):
    method = METHODS[name]
    training, step, uses, batch = start(method)
    calls = []
    losses, sparsities = [], []
    for sparsity in (0.4, 0.5, 0.7, 0.85):
        if calls:
            stats = fh.calibrate(model, training.params, uses, [batch[:1]])
            training = fh.next_stage(
                method, training, uses, key=KEY, stats=stats, sparsity=sparsity
            )
        for j in range(5):
            training, metrics = step(training.at(j / 4), *batch)
            losses.append(float(metrics["loss"]))
        training = fh.harden(method, training, uses)
        calls.append(1)
        sparsities.append(float(metrics["sparsity"]))
        plans = fh.decide(method, training.states, training.params, uses)
        for path, plan in plans.items():
            stack = uses.leaves[path].layout.stack
            one = jax.tree.map(lambda x: x[0], plan) if stack else plan  # noqa: B023
            fh.verify(one)
        zeros = jax.tree.map(lambda x: x == 0, training.params)
        keep = fh.keep_tree(plans, training.params, uses)
        for leaf in ("in", "stack"):
            np.testing.assert_array_equal(zeros[leaf], ~keep[leaf])
    assert step._cache_size() == 1
    np.testing.assert_allclose(sparsities, (0.4, 0.5, 0.7, 0.85), atol=0.05)
    assert losses[4] < losses[0]
    assert {"loss", "grad_norm", "finite", "sparsity", "zeros"} <= set(metrics)
    if name == "hard concrete":
        more = {"penalty/gates", "penalty/count", "total", "temperature"}
        assert more | {"expected_sparsity", "open"} <= set(metrics)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, momentum=0.9),
        pytest.param(optax.adafactor(0.01), marks=pytest.mark.slow),
    ],
    ids=["sgd", "adafactor"],
)
def test_hardened_zeros_stay_with_any_optimiser(tx, dtype):
    method = METHODS["hard concrete"]
    training, step, uses, batch = start(method, dtype, tx)
    for j in range(3):
        training, metrics = step(training.at(j / 2), *batch)
    assert 0 < metrics["zeros"] < 1
    training = fh.harden(method, training, uses)
    zeros = np.asarray(training.params["in"] == 0)
    for _ in range(3):
        training, metrics = step(training, *batch)
    np.testing.assert_array_equal(training.params["in"] == 0, zeros)
    assert float(metrics["zeros"]) == pytest.approx(zeros.mean())
    assert training.params["in"].dtype == dtype


def test_a_loss_that_is_not_finite_changes_nothing_but_the_count():
    method = METHODS["hard concrete"]
    training, step, _, (x, y) = start(method)
    training, _ = step(training, x, y)
    before = jax.tree.map(np.array, (training.params, training.opt_state.inner))
    gates = {p: np.array(s.learned["log_alpha"]) for p, s in training.states.items()}
    training, metrics = step(training, x.at[0, 0].set(jnp.nan), y)
    chex.assert_trees_all_equal((training.params, training.opt_state.inner), before)
    for path, state in training.states.items():
        np.testing.assert_array_equal(state.learned["log_alpha"], gates[path])
    assert metrics["finite"] == 0 and training.skipped == 1 and training.step == 2
    training, metrics = step(training, x, y)
    assert metrics["finite"] == 1 and np.isfinite(metrics["loss"])


def test_the_parameters_given_are_not_consumed_and_runs_repeat():
    method = METHODS["hard concrete"]
    first, step, _, batch = start(method)
    second, _, _, _ = start(method)
    for _ in range(2):
        first, _ = step(first, *batch)
        second, _ = step(second, *batch)
    chex.assert_trees_all_equal(first.params, second.params)


def test_the_first_loss_under_fixed_supports_is_that_of_the_sparse_weights():
    params, uses, batch = setup()
    method, tx = fh.Magnitude(fh.NM(2, 4)), optax.sgd(0.1)
    states = fh.solve(method, KEY, params, uses)
    plans = fh.decide(method, states, params, uses)
    keep, sparse = fh.keep_tree(plans, params, uses), fh.densify(plans, params, uses)
    training = fh.Training.under(keep, params, tx, key=KEY)
    chex.assert_trees_all_equal(training.params, sparse)
    _, metrics = fh.make_step(None, loss_fn, tx, None)(training, *batch)
    np.testing.assert_allclose(metrics["loss"], loss_fn(sparse, *batch)[0], rtol=1e-6)
    grads = jax.grad(lambda p: loss_fn(p, *batch)[0])(sparse)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    both = optax.LookaheadParams.init_synced(params)
    slow = fh.Training.under(keep, both, optax.lookahead(tx, 5, 0.5), key=KEY)
    chex.assert_trees_all_equal(slow.params.slow, sparse)
    chex.assert_tree_all_finite(params)  # not consumed


def test_frozen_weights_stay_and_gates_learn():
    @dataclasses.dataclass(frozen=True)
    class Frozen(fh.HardConcrete):
        frozen_weights = True

    method = Frozen(fh.NM(2, 4))
    params, uses, batch = setup()
    states = fh.solve(method, KEY, params, uses)
    training = fh.init_training(method, params, uses, states, None, key=KEY)
    step = fh.make_step(method, loss_fn, None, uses)
    for _ in range(2):
        training, _ = step(training, *batch)
    chex.assert_trees_all_equal(training.params, params)
    now, was = (s["in"].learned["log_alpha"] for s in (training.states, states))
    assert np.any(np.asarray(now != was))
    hard = fh.harden(method, training, uses)
    assert float((hard.params["in"] == 0).mean()) == 0.5


def test_ordinary_methods_need_an_optimiser():
    params, uses, _ = setup()
    method = fh.Magnitude(fh.NM(2, 4))
    states = fh.solve(method, KEY, params, uses)
    with pytest.raises(ValueError, match="trains the weights; give an optax"):
        fh.init_training(method, params, uses, states, None, key=KEY)


def test_gradients_are_those_of_the_loss_under_the_sampled_weights():
    """One step of plain gradient descent against the same written out."""
    method = fh.HardConcrete(fh.NM(2, 4), count_weight=2.0)
    params, uses, batch = setup()
    tx, mask_tx = optax.sgd(0.1), optax.sgd(0.5)
    states = fh.solve(method, KEY, params, uses)
    training = fh.init_training(
        method, params, uses, states, tx, key=KEY, mask_tx=mask_tx
    )
    step = fh.make_step(method, loss_fn, tx, uses, mask_tx=mask_tx)
    _, sample_key = jax.random.split(KEY)
    states = {
        p: jax.vmap(lambda s: method.anneal(s, 0.5))(s)
        if p == "stack"
        else method.anneal(s, 0.5)
        for p, s in states.items()
    }

    def total(log_alpha, params):
        now = dict(states)
        now["in"] = type(now["in"])({"log_alpha": log_alpha}, now["in"].fixed)
        plans = fh.decide(method, now, params, uses, key=sample_key)
        loss = loss_fn(fh.densify(plans, params, uses), *batch)[0]
        keys = {p: keys_for(sample_key, u) for p, u in uses.leaves.items()}
        terms = []
        for path in ("in", "stack"):
            w = params[path]
            if path == "in":
                found = method.penalty(now[path], w.T, key=keys[path])
                terms.append((w.size, sum(found.values())))
                continue
            for j in range(2):
                s = jax.tree.map(lambda x: x[j], now[path])  # noqa: B023
                found = method.penalty(s, w[j].T, key=keys[path][j])
                terms.append((w[j].size, sum(found.values())))
        sizes = sum(size for size, _ in terms)
        return loss + sum(size * term for size, term in terms) / sizes

    total = jax.jit(jax.value_and_grad(total, (0, 1)))
    value, (g_gates, g_params) = total(states["in"].learned["log_alpha"], params)
    after, metrics = step(training.at(0.5), *batch)
    assert float(metrics["total"]) == pytest.approx(float(value), rel=1e-5)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, params, g_params)
    chex.assert_trees_all_close(after.params, want, rtol=1e-4, atol=1e-6)
    gates = states["in"].learned["log_alpha"] - 0.5 * g_gates
    got = after.states["in"].learned["log_alpha"]
    np.testing.assert_allclose(got, gates, rtol=1e-4, atol=1e-6)


def under_magnitude(tx):
    """The training and the step of one small matrix."""
    params, x = {"w": jax.random.normal(KEY, (8, 4))}, jnp.ones((2, 8))
    loss = lambda p, x: jnp.mean((x @ p["w"] - 1) ** 2)  # noqa: E731
    uses, method = fh.discover(loss, params, x), fh.Magnitude(fh.NM(2, 4))
    states = fh.solve(method, KEY, params, uses)
    training = fh.init_training(method, params, uses, states, tx, key=KEY)
    return training, fh.make_step(method, loss, tx, uses), x


def stingy():
    """An optimiser that should take further arguments, and does not."""
    inner = optax.sgd(0.1)

    def update(updates, state, params=None):
        return inner.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.parametrize(
    "tx", [optax.lbfgs(0.1, linesearch=None), stingy()], ids=["one zero", "stingy"]
)
def test_what_an_optimiser_repeats_in_its_state_or_does_not_take_is_no_obstacle(tx):
    training, step, x = under_magnitude(tx)
    before = np.asarray(training.params["w"])
    training, _ = step(training, x)
    training, _ = step(training, x)
    after = np.asarray(training.params["w"])
    np.testing.assert_array_equal(after == 0, before == 0)
    assert np.any(after != before)


def test_an_error_of_the_optimiser_says_what_it_was_given():
    training, step, x = under_magnitude(optax.lookahead(optax.sgd(0.1), 2, 0.5))
    with pytest.raises(AttributeError) as caught:
        step(training, x)
    assert "raised by the optimiser: it gets" in "".join(caught.value.__notes__)


def test_progress_is_copied_and_transferred_in_so_many_words():
    training, step, x = under_magnitude(optax.sgd(0.1))
    half = jnp.float32(0.5)
    for _ in range(2):
        training, _ = step(training.at(half), x)
    with jax.transfer_guard("disallow"):
        training, _ = step(training.at(0.5), x)
    assert float(half) == float(training.progress) == 0.5


def test_what_a_leaf_remembers_is_no_business_of_a_pruned_one_with_the_same_last_name():
    one = jnp.ones((4, 4))
    params = {"w": one, "head": {"w": one}}
    every, none = jnp.ones((4, 4), bool), jnp.zeros((4, 4), bool)
    tx = fh.keep_sparse(optax.sgd(0.1, 0.9), {"w": every, "head": {"w": None}})
    state: Any = tx.update(params, tx.init(params), params)[1]
    state = state.under({"w": none, "head": {"w": None}})
    trace: Any = optax.tree.get(state, "trace")
    np.testing.assert_array_equal(trace["w"], 0 * one)
    np.testing.assert_array_equal(trace["head"]["w"], one)
