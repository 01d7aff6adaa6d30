import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods.permllm import PermLLM, output_error
from flexhinm_jax.patterns import ChannelSearch
from tests.cases import stats, weight
from tests.methods.cases import correlated

KEY = jax.random.key(1)
SEARCHED = fh.NM(2, 4, permute=ChannelSearch(sweeps=8))
START = PermLLM(fh.NM(2, 4), block=16, steps=0)
FITTED = dataclasses.replace(START, steps=30, learning_rate=0.2)
COST = PermLLM(SEARCHED, groups=2, variant="cost", steps=12, learning_rate=0.2)


@functools.partial(jax.jit, static_argnums=0)
def decide(method, state, w, key=None):
    return method.decide(state, w, key=key)


def solved(method, seed=0, s=None):
    w, s = weight(seed), s or correlated()
    return method.solve(KEY, w, s), w, s


def error_of(plan, w, s):
    return float(output_error(w, s)(plan.support.keep))


@pytest.mark.parametrize("method", [FITTED, COST], ids=["sinkhorn", "cost"])
def test_the_fit_never_ends_worse_than_its_order(method):
    state, w, s = solved(method)
    first, last = state.fixed["error"]
    plain = fh.Wanda(method.pattern)
    start = plain.decide(plain.solve(KEY, w, s), w)
    np.testing.assert_allclose(first, error_of(start, w, s), rtol=1e-4)
    assert last <= first
    plan = decide(method, state, w)
    fh.verify(plan)
    np.testing.assert_allclose(last, error_of(plan, w, s), rtol=1e-4)


def test_learning_from_the_natural_order_lowers_the_error():
    first, last = solved(FITTED)[0].fixed["error"]
    assert last < 0.95 * first


def test_channels_stay_in_the_blocks_of_their_start():
    state, w, _ = solved(FITTED)
    order = decide(FITTED, state, w).support.regions.in_order[0]
    assert order.tolist() != list(range(32))
    np.testing.assert_array_equal(order // 16, jnp.arange(32) // 16)


def moved(state, scale=2.0):
    logits = state.learned["logits"]
    noise = scale * jax.random.normal(KEY, logits.shape)
    return dataclasses.replace(state, learned={"logits": noise})


@pytest.mark.parametrize("variant", ["sinkhorn", "cost"])
def test_hardened_states_sample_what_they_decide(variant):
    method = dataclasses.replace(START, groups=2, variant=variant)
    state, w, _ = solved(START)
    state = method.anneal(moved(state), 0.5)
    hard = jax.jit(method.harden)(state, w)
    wanted = decide(method, state, w)
    for plan in (decide(method, hard, w), decide(method, hard, w, KEY)):
        np.testing.assert_array_equal(plan.support.keep, wanted.support.keep)
        np.testing.assert_array_equal(plan.weight, wanted.weight)


def test_the_straight_through_weight_is_the_hard_weight_with_a_gradient():
    state, w, _ = solved(START)
    state = moved(state)
    np.testing.assert_array_equal(
        decide(START, state, w, KEY).weight, decide(START, state, w).weight
    )
    target = weight(3)

    def loss(learned):
        now = dataclasses.replace(state, learned=learned)
        return jnp.mean((START.decide(now, w, key=KEY).weight - target) ** 2)

    slope = jax.jit(jax.grad(loss))(state.learned)["logits"]
    assert np.isfinite(slope).all() and float(jnp.abs(slope).max()) > 0


def test_the_relaxation_does_not_depend_on_the_unit_of_the_scores():
    state, *_ = solved(START)
    state = moved(state)

    @jax.jit
    def slope(unit):
        def total(learned):
            fixed = state.fixed | {"scores": unit * state.fixed["scores"]}
            now = dataclasses.replace(state, learned=learned, fixed=fixed)
            return jnp.sum(START.relaxed(now)[0] * weight(5))

        return jax.grad(total)(state.learned)["logits"]

    np.testing.assert_allclose(slope(1.0), slope(1e-3), rtol=1e-3, atol=1e-5)


def test_temperatures_run_from_one_to_the_last():
    for variant, half, last in (("sinkhorn", 0.55, 0.1), ("cost", 0.05**0.5, 0.05)):
        method = dataclasses.replace(START, variant=variant)
        state = solved(START)[0]
        for progress, wanted in ((0.0, 1.0), (0.5, half), (1.0, last)):
            found = method.anneal(state, progress).fixed["temperature"]
            np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("scores", ["wanda", "ria", "squared"])
def test_scores_are_those_of_the_methods_of_that_name(scores):
    method = dataclasses.replace(START, scores=scores)
    plain = fh.RIA() if scores == "ria" else fh.Wanda()
    w, s = weight(), stats()
    found, wanted = method.score(w, s), plain.score(w, s)
    wanted = wanted**2 if scores == "squared" else wanted
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_equal_scores_and_dead_inputs_are_handled():
    ones, s = jnp.ones((16, 32)), correlated()
    live = jnp.arange(32) > 5
    dead = dataclasses.replace(
        s,
        sq_norm=s.sq_norm * live,
        gram=s.gram * live * live[:, None],
    )
    for given in (s, dead, dataclasses.replace(s, gram=jnp.zeros((32, 32)))):
        state = FITTED.solve(KEY, ones, given)
        assert np.isfinite(state.fixed["error"]).all()
        fh.verify(decide(FITTED, state, ones))


def test_blocks_that_do_not_fit_are_refused_by_name():
    w, s = weight(), stats()
    with pytest.raises(ValueError, match=r"in=32 is not a multiple of block=12"):
        PermLLM(block=12).solve(KEY, w, s)
    with pytest.raises(ValueError, match="no multiple of the groups"):
        PermLLM(fh.NM(5, 8), block=4).solve(KEY, w, s)
    with pytest.raises(ValueError, match=r"in=32 is not a multiple of groups=5"):
        PermLLM(variant="cost", groups=5).solve(KEY, w, s)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "size"}, "choose one of wanda"),
        ({"variant": "soft"}, "sinkhorn, cost"),
        ({"block": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "numbers > 0"),
        ({"mask_temperature": -1.0}, "numbers > 0"),
    ],
)
def test_configurations_are_validated(options, message):
    with pytest.raises(ValueError, match=message):
        PermLLM(**options)
