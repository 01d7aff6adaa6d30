"""What gates promise beyond the conformance of every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import gates, groups, masks
from tests.cases import SHAPE, stats, weight

KEY = jax.random.key(3)
PATTERNS = {
    "flexhinm": fh.FlexHiNM(8, permute=None),
    "hinm": fh.HiNM(8, permute=None),
    "2:4": fh.NM(2, 4),
    "vector": fh.Vector(8),
    "unstructured": fh.Unstructured(),
}
STAGES = {
    "flexhinm": (0.3, 0.5, 0.7, 0.85),
    "hinm": (0.5, 0.65, 0.75, 0.9),
    "2:4": (0.5,) * 4,
    "vector": (0.2, 0.5, 0.7, 0.9),
    "unstructured": (0.2, 0.5, 0.7, 0.9),
}
slow = pytest.mark.slow
METHODS = [fh.HardConcrete, pytest.param(fh.GumbelPatterns, marks=slow)]
NAMES = [
    name if name in ("flexhinm", "2:4") else pytest.param(name, marks=slow)
    for name in PATTERNS
]


@functools.partial(jax.jit, static_argnums=0)
def solve(method, key, w, sparsity, prev):
    return method.solve(key, w, None, sparsity=sparsity, prev=prev)


@functools.partial(jax.jit, static_argnums=0)
def decide(method, state, w, key=None):
    return method.decide(state, w, key=key)


def moved(state, key, scale=3.0):
    """The state after an optimiser has done something wild."""
    noise = lambda x: x + scale * jax.random.normal(key, x.shape)  # noqa: E731
    return dataclasses.replace(state, learned=jax.tree.map(noise, state.learned))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("hardened", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", METHODS)
def test_over_four_stages_the_kept_set_only_shrinks(kind, name, hardened, seed):
    method, state, before = kind(PATTERNS[name]), None, None
    keys = jax.random.split(jax.random.key(seed), 12).reshape(4, 3)
    for sparsity, (solve_key, move_key, w_key) in zip(STAGES[name], keys, strict=True):
        w = jax.random.normal(w_key, SHAPE)
        state = solve(method, solve_key, w, jnp.float32(sparsity), state)
        for moment in (state, moved(state, move_key)):
            plan = decide(method, moment, w)
            fh.verify(plan)
            keep = np.asarray(plan.support.keep)
            assert before is None or not (keep & ~before).any()
            assert abs(1 - keep.mean() - sparsity) <= method.pattern.granularity(SHAPE)
        state, before = moment, keep
        if hardened:
            state = method.harden(state, w)
            again = decide(method, moved(state, w_key), w)
            np.testing.assert_array_equal(again.support.keep, keep)


@pytest.mark.parametrize("kind", METHODS)
def test_surviving_groups_keep_their_hardened_masks_and_new_ones_get_gates(kind):
    method = kind(PATTERNS["flexhinm"])
    state = solve(method, KEY, weight(), jnp.float32(0.4), None)
    state = method.harden(moved(state, KEY), weight())
    old = state.fixed["support"]
    new = solve(method, KEY, weight(), jnp.float32(0.6), state)
    fresh = np.asarray(new.fixed["open"])
    now = new.fixed["support"]
    nm = np.asarray(groups.nm_weights(now.regions))
    was_nm = np.asarray(groups.nm_weights(old.regions))
    assert fresh.any() and (nm & was_nm).any()
    np.testing.assert_array_equal(fresh, nm & ~was_nm)
    stay = nm & was_nm
    np.testing.assert_array_equal(
        np.asarray(now.keep)[stay], np.asarray(old.keep)[stay]
    )


@pytest.mark.parametrize("kind", METHODS)
def test_sampled_plans_leave_dense_and_pruned_columns_alone(kind):
    method, w = kind(PATTERNS["flexhinm"]), weight()
    state = solve(method, KEY, w, jnp.float32(0.4), None)
    plan = decide(method, state, w, KEY)
    r = state.fixed["support"].regions
    dense, nm = np.asarray(groups.dense_weights(r)), np.asarray(groups.nm_weights(r))
    got, w = np.asarray(plan.weight), np.asarray(w)
    np.testing.assert_array_equal(got[dense], w[dense])
    assert not got[~dense & ~nm].any()
    ratio = got[nm] / w[nm]
    assert ((ratio >= 0) & (ratio <= 1)).all() and len(np.unique(ratio)) > 10
    assert not got[~np.asarray(plan.support.keep)].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", METHODS)
def test_after_hardening_samples_are_the_hard_plan(kind, name):
    method, w = kind(PATTERNS[name]), weight(dtype=jnp.bfloat16)
    state = solve(method, KEY, w, jnp.float32(0.5), None)
    state = method.harden(moved(state, KEY), w)
    hard = decide(method, state, w)
    np.testing.assert_array_equal(decide(method, state, w, KEY).weight, hard.weight)
    assert hard.weight.dtype == jnp.bfloat16
    for term in method.penalty(state, w, key=KEY).values():
        assert float(term) == 0


def test_hard_choices_are_the_largest_gates_of_each_group():
    method = fh.HardConcrete(fh.NM(2, 4))
    state = moved(solve(method, KEY, weight(), None, None), KEY)
    log_alpha = state.learned["log_alpha"]
    want = masks.group_ranks(log_alpha.reshape(*SHAPE[:1], -1, 4)) < 2
    want = want.reshape(SHAPE)
    keep = method.decide(state, weight()).support.keep
    np.testing.assert_array_equal(keep, want)


def test_the_penalties_are_those_of_the_paper():
    method = fh.HardConcrete(fh.NM(2, 4), sparsity_weight=0.5, count_weight=3.0)
    state = method.anneal(solve(method, KEY, weight(), None, None), 0.25)
    temperature = float(state.fixed["temperature"])
    assert temperature == pytest.approx(2 / 3 * 0.15**0.25, rel=1e-5)
    log_alpha = state.learned["log_alpha"]
    noise = gates.logistic(KEY, log_alpha.shape)
    z = gates.stretch((noise + log_alpha) / temperature)
    terms = method.penalty(state, weight(), key=KEY)
    assert float(terms["gates"]) == pytest.approx(0.5 * float(z.mean()), rel=1e-5)
    off = jnp.abs(z.reshape(SHAPE[0], -1, 4).sum(-1) - 2).mean()
    assert float(terms["count"]) == pytest.approx(0.75 * float(off), rel=1e-5)
    plan = method.decide(state, weight(), key=KEY)
    np.testing.assert_allclose(plan.weight, weight() * z, rtol=1e-5, atol=1e-7)


def test_gates_learn_only_where_they_are_open():
    method = fh.HardConcrete(fh.FlexHiNM(8, permute=None))
    state = solve(method, KEY, weight(), jnp.float32(0.4), None)
    state = method.anneal(state, 0.5)

    def loss(learned, w):
        now = dataclasses.replace(state, learned=learned)
        plan, terms = method.sample(now, w, key=KEY)
        return jnp.sum(jnp.square(plan.weight - 1)) + sum(terms.values())

    grads, w_grads = jax.grad(loss, (0, 1))(state.learned, weight())
    free = np.asarray(state.fixed["open"])
    moving = np.asarray(grads["log_alpha"]) != 0
    assert moving[free].mean() > 0.05 and not moving[~free].any()
    r = state.fixed["support"].regions
    pruned = ~np.asarray(groups.dense_weights(r)) & ~free
    assert not np.asarray(w_grads)[pruned].any()


def gate_gradient(method, state, key=KEY):
    """Of the sum of the relaxed weights."""

    def total(learned):
        now = dataclasses.replace(state, learned=learned)
        return method.decide(now, weight(), key=key).weight.sum()

    return jax.grad(total)(state.learned)["log_alpha"]


@pytest.mark.parametrize("relaxation", ["straight_through", "decided"])
def test_hard_relaxations_forward_exactly_n_of_m(relaxation):
    options = {"start": 0.5, "temperature": (0.5, 0.5)}
    method = fh.HardConcrete(PATTERNS["hinm"], relaxation=relaxation, **options)
    state = solve(method, KEY, weight(), jnp.float32(0.75), None)
    state = method.anneal(state, 1.0)
    assert method.penalty(state, weight(), key=KEY)["count"] == 0
    plan = decide(method, state, weight(), KEY)
    kept = groups.to_groups((plan.weight != 0) * 1.0, state.fixed["support"].regions)
    live = np.asarray(groups.live_groups(state.fixed["support"].regions))
    np.testing.assert_array_equal(np.asarray(kept.sum(-1)).transpose(0, 2, 1)[live], 2)
    assert np.count_nonzero(gate_gradient(method, state)) > 10


def test_without_noise_gates_are_the_stretched_log_alpha_and_decide_as_without_a_key():
    options = {"start": 0.5, "temperature": (0.5, 0.5), "count_weight": 0.0}
    soft, hard = (
        fh.HardConcrete(PATTERNS["hinm"], relaxation=relaxation, **options)
        for relaxation in ("expected", "decided")
    )
    state = solve(soft, KEY, weight(), jnp.float32(0.75), None)
    free = np.asarray(state.fixed["open"])
    # 1.2 sigmoid(+-1) - 0.1, by hand
    want = np.where(state.fixed["support"].keep, 0.7772703, 0.2227297)
    got = np.asarray(decide(soft, state, weight(), KEY).weight) / np.asarray(weight())
    np.testing.assert_allclose(got[free], want[free], rtol=1e-5)
    closed = decide(hard, state, weight(), None)
    other = jax.random.key(99)
    for key in (KEY, other):
        np.testing.assert_array_equal(
            decide(hard, state, weight(), key).weight, closed.weight
        )
    np.testing.assert_array_equal(
        gate_gradient(soft, state), gate_gradient(hard, state, other)
    )


def test_scores_decide_the_start_and_what_is_needed():
    method = fh.HardConcrete(fh.NM(2, 4), scores=fh.Wanda())
    assert method.needs == "norms" and method.scores.pattern == fh.NM(2, 4)
    with pytest.raises(ValueError, match="needs input statistics"):
        method.solve(KEY, weight(), None)
    want = fh.Wanda(fh.NM(2, 4))
    state = want.solve(KEY, weight(), stats())
    mine = method.solve(KEY, weight(), stats())
    np.testing.assert_array_equal(
        method.decide(mine, weight()).support.keep, state.fixed["support"].keep
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": (0.1, 0.5)}, "first >= last"),
        ({"start": 6.0}, "limit=5.0"),
        ({"count_weight": -1.0}, "need numbers >= 0"),
        ({"relaxation": "hard"}, "choose one of soft, straight_through"),
        ({"relaxation": "decided"}, "no gate has a gradient from 1.6 on"),
        ({"scores": fh.ALPS()}, "use adopt"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fh.HardConcrete(fh.NM(2, 4), **options)


def test_groups_with_too_many_patterns_are_refused():
    with pytest.raises(ValueError, match="12870 patterns"):
        fh.GumbelPatterns(fh.NM(8, 16))
