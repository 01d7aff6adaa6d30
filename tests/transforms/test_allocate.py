import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from flexhinm_jax.transforms.allocate import Increments, allocate, increments


def layers(seed=0):
    r = np.random.default_rng(seed)
    found = {}
    for path, count in {"a": 24, "b": 48, "c/d": 12}.items():
        found[path] = Increments(r.random(count), np.full(count, 8.0), 8 * count)
    return found


def removed(found, given):
    return sum(given[p].size * found[p] for p in given) / sum(
        x.size for x in given.values()
    )


@given(st.integers(0, 99), st.floats(0.2, 0.9))
def test_the_total_is_exact_and_the_bounds_hold(seed, sparsity):
    given_ = layers(seed)
    found = allocate("global", given_, sparsity, bounds=(0.1, 0.95))
    np.testing.assert_allclose(removed(found, given_), sparsity, atol=1e-9)
    assert all(0.1 - 1e-9 <= s <= 0.95 + 1e-9 for s in found.values())


def test_global_is_the_best_choice_of_increments():
    r = np.random.default_rng(1)
    given_ = {p: Increments(r.random(5), np.ones(5), 5) for p in "ab"}
    found = allocate("global", given_, 0.6, normalise=False)
    count = {p: round(5 * (1 - found[p])) for p in "ab"}
    score = lambda c: sum(np.sort(given_[p].gain)[::-1][: c[p]].sum() for p in "ab")  # noqa: E731
    best = max(
        score({"a": a, "b": b})
        for a, b in itertools.product(range(6), repeat=2)
        if a + b == 4
    )
    np.testing.assert_allclose(score(count), best)


def test_increments_of_vectors_pick_the_exact_levels():
    """With fixed r_v in [s/2, s], the best 2k half-units are the optimum."""
    r = np.random.default_rng(2)
    whole = r.random(5)
    part = whole * r.uniform(0.5, 1, 5)
    one = Increments(np.concatenate([part, whole - part]), np.full(10, 0.5), 5)
    kept = 2
    order = np.argsort(-one.gain)[: 2 * kept]
    best = max(
        sum((0, part[v], whole[v])[level] for v, level in enumerate(levels))
        for levels in itertools.product(range(3), repeat=5)
        if sum(levels) == 2 * kept
    )
    np.testing.assert_allclose(one.gain[order].sum(), best)


def test_uniform_is_uniform():
    assert set(allocate("uniform", layers(), 0.75).values()) == {0.75}


def test_scale_does_not_matter_when_normalised():
    given_ = layers()
    loud = {
        p: Increments(x.gain * (100 if p == "b" else 1), x.cost, x.size)
        for p, x in given_.items()
    }
    one, two = allocate("global", given_, 0.5), allocate("global", loud, 0.5)
    np.testing.assert_allclose(list(one.values()), list(two.values()), atol=1e-9)


def test_rules_fix_their_layers_and_the_rest_meets_the_total():
    given_ = layers()
    found = allocate({"^c/": 0.25}, given_, 0.7)
    assert found["c/d"] == 0.25
    assert found["a"] == found["b"] > 0.7
    np.testing.assert_allclose(removed(found, given_), 0.7)


@pytest.mark.parametrize(
    ("mode", "sparsity", "match"),
    [
        ("best", 0.5, "unknown mode"),
        ("global", 1.5, "outside"),
        ({"x": 0.5}, 0.5, "match no layer"),
        ({"a": 1.0, "b": 1.0}, 0.1, "would need sparsity"),
        ({".": 0.5}, 0.7, "cover every layer"),
    ],
)
def test_bad_allocations_are_named(mode, sparsity, match):
    with pytest.raises(ValueError, match=match):
        allocate(mode, layers(), sparsity)


def test_targets_outside_the_bounds_and_no_layer_are_named():
    with pytest.raises(ValueError, match="cannot be met"):
        allocate("global", layers(), 0.5, bounds=(0.6, 1.0))
    with pytest.raises(ValueError, match="no layer"):
        allocate("uniform", {}, 0.5)
    with pytest.raises(ValueError, match="nothing to allocate"):
        increments(jnp.ones((4, 4)), fh.NM(2, 4))


@pytest.mark.parametrize(
    "pattern",
    [
        fh.FlexHiNM(4, permute=None),
        fh.HiNM(4, permute=None),
        fh.Vector(4),
        fh.Unstructured(),
    ],
    ids=str,
)
def test_a_global_budget_retains_more_of_unequal_layers(pattern):
    key = jax.random.key(0)
    spread = {"flat": 0.1, "skewed": 2.0}
    scores = {}
    for index, (path, sigma) in enumerate(spread.items()):
        keys = jax.random.split(jax.random.key(index))
        scale = jnp.exp(sigma * jax.random.normal(keys[0], (1, 64)))
        s = jnp.abs(jax.random.normal(keys[1], (16, 64))) * scale
        scores[path] = s / jnp.mean(s)
    given_ = {path: increments(s, pattern) for path, s in scores.items()}
    found = allocate("global", given_, 0.75, bounds=(0.5, 1.0))
    assert found["skewed"] > found["flat"]

    def share(sparsity):
        return np.mean(
            [
                float(masks.retained(s, pattern.project(key, s, sparsity[p]).keep))
                for p, s in scores.items()
            ]
        )

    assert share(found) > share(allocate("uniform", given_, 0.75))


def two_layers(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def test_budgets_of_a_model_meet_the_total_and_spare_the_skewed_layer():
    key = jax.random.key(0)
    skew = jnp.exp(2 * jax.random.normal(key, (32, 1)))
    params = {
        "first": jax.random.normal(key, (32, 32)) * skew,
        "second": jax.random.normal(key, (32, 32)),
    }
    x = jnp.ones((4, 32))
    uses = fh.discover(two_layers, params, x)
    stats = fh.calibrate(two_layers, params, uses, [x])
    method = fh.Wanda(fh.FlexHiNM(8, permute=None))
    found = fh.budgets(method, params, uses, stats, 0.6)
    np.testing.assert_allclose(sum(found.values()) / 2, 0.6, atol=1e-9)
    # A few columns hold nearly all of the first layer: it can give more away.
    assert found["first"] > found["second"]
    states = fh.solve(method, key, params, uses, stats, found)
    plans = fh.decide(method, states, params, uses)
    for path, plan in plans.items():
        gap = abs(float((~plan.support.keep).mean()) - found[path])
        assert gap <= method.pattern.granularity((32, 32))


def test_budgets_refuse_a_pattern_with_one_sparsity():
    params = {"first": jnp.ones((32, 32)), "second": jnp.ones((32, 32))}
    uses = fh.discover(two_layers, params, jnp.ones((4, 32)))
    with pytest.raises(ValueError, match="nothing to allocate"):
        fh.budgets(fh.Magnitude(fh.NM(2, 4)), params, uses, None, 0.5)
