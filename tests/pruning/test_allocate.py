import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from flexhinm_jax.pruning.allocate import allocate
from flexhinm_jax.pruning.gains import (
    MOST,
    NOTHING,
    Increments,
    condensed,
    increments,
)
from flexhinm_jax.pruning.owl import outlier_shares


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


def plain(**spans):
    """Layers without increments: path -> (size, low, high)."""
    return {
        p: Increments(NOTHING, NOTHING, n, (a, b)) for p, (n, a, b) in spans.items()
    }


@given(st.integers(0, 99), st.floats(0.55, 0.95))
def test_every_layer_stays_within_its_pattern_and_the_total_is_met(seed, sparsity):
    """HiNM(2:4) begins at a half, which a budget must not go below."""
    r = np.random.default_rng(seed)
    given_ = layers(seed)
    hinm = given_["b"]
    gain = 10.0 ** r.uniform(-3, 3, 48)
    given_["b"] = Increments(gain, np.full(48, 4.0), hinm.size, (0.5, 1.0))
    given_["fixed"] = Increments(NOTHING, NOTHING, 16, (0.5, 0.5))
    shares = {path: r.random() for path in given_}
    for mode in ("uniform", "global", "owl", fh.OWL(spread=0.5)):
        found = allocate(mode, given_, sparsity, normalise=False, outliers=shares)
        np.testing.assert_allclose(removed(found, given_), sparsity, atol=1e-9)
        for path, layer in given_.items():
            low, high = layer.span
            assert low - 1e-9 <= found[path] <= high + 1e-9, mode


def test_what_patterns_and_exceptions_cannot_meet_is_refused_with_numbers():
    half = plain(a=(10, 0.5, 1.0), b=(30, 0.5, 1.0))
    for mode in ("uniform", "global", "owl"):
        with pytest.raises(ValueError, match=r"need sparsity 0\.2, and .* \[0\.5, 1\]"):
            allocate(mode, half, 0.2, outliers={"a": 0.1, "b": 0.2})
    with pytest.raises(ValueError, match=r"target in \[0\.575, 0\.95\]"):
        allocate("uniform", half, 0.5, exceptions={"a": 0.8})
    with pytest.raises(ValueError, match=r"sparsity 0\.2 of a, .* \[0\.5, 1\]"):
        allocate("uniform", half, 0.6, exceptions={"a": 0.2})


@pytest.mark.parametrize("mode", ["uniform", "global", "owl"])
def test_exceptions_hold_in_every_mode_and_the_others_make_up_for_them(mode):
    given_ = layers()
    shares = {"a": 0.01, "b": 0.02, "c/d": 0.5}
    exceptions = {"^c/": 0.25, "c": 0.9}  # the first match counts
    with pytest.raises(ValueError, match=r"\['c'\] match no layer"):
        allocate(mode, given_, 0.7, exceptions=exceptions, outliers=shares)
    del exceptions["c"]
    found = allocate(mode, given_, 0.7, exceptions=exceptions, outliers=shares)
    assert found["c/d"] == 0.25 and list(found) == list(given_)
    np.testing.assert_allclose(removed(found, given_), 0.7)


def test_owl_follows_the_formula_of_the_paper_on_equal_blocks():
    r = np.random.default_rng(0)
    shares = dict(zip("abcde", r.random(5), strict=True))
    found = allocate(
        fh.OWL(spread=0.1),
        plain(**dict.fromkeys(shares, (64, 0.0, 1.0))),
        0.6,
        outliers=shares,
    )
    lod = np.array([*shares.values()])
    density = (lod - lod.min()) / (lod.max() - lod.min()) * 0.2
    density = density - density.mean() + 0.4
    np.testing.assert_allclose([*found.values()], 1 - density, rtol=1e-12)


def test_outliers_are_counted_per_block_of_the_model():
    r = np.random.default_rng(0)
    shapes = {"layers.0.a": (4, 8), "layers.0.b": (8, 8), "layers.1.a": (4, 8)}
    params = {p: r.standard_t(2, shape) for p, shape in shapes.items()}
    params = {p: jnp.asarray(w, jnp.float32) for p, w in params.items()}

    def apply_fn(params, x):
        return [x @ w.T for w in params.values()]

    x = jnp.asarray(r.normal(size=(5, 8)), jnp.float32)
    uses = fh.discover(apply_fn, params, x)
    stats = fh.calibrate(apply_fn, params, uses, [x], gram=False)
    norms = np.linalg.norm(x, axis=0)
    want = {}
    for block in ("layers.0", "layers.1"):
        mine = [p for p in params if p.startswith(block)]
        scores = np.concatenate([(np.abs(params[p]) * norms).ravel() for p in mine])
        want |= dict.fromkeys(mine, np.mean(scores > 3 * scores.mean()))
    found = outlier_shares(fh.OWL(multiple=3), params, uses, stats)
    assert found == pytest.approx(want) and want["layers.0.a"] != want["layers.1.a"]
    method = fh.Wanda(fh.Unstructured())
    budgets = fh.budgets(method, params, uses, stats, 0.5, mode=fh.OWL(multiple=3))
    assert budgets["layers.0.a"] == budgets["layers.0.b"]
    assert (want["layers.0.a"] > want["layers.1.a"]) == (
        budgets["layers.0.a"] < budgets["layers.1.a"]
    )
    sizes = {p: w.size for p, w in params.items()}
    mean = sum(budgets[p] * n for p, n in sizes.items()) / sum(sizes.values())
    np.testing.assert_allclose(mean, 0.5)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("encoder/layers_3/attention/kernel", "encoder/layers_3"),
        ("head/kernel", "head/kernel"),
        ("conv2d/kernel", "conv2d/kernel"),
    ],
)
def test_a_block_ends_with_the_first_number_of_a_path(path, block):
    assert fh.OWL().name(path) == block


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"multiple": 0}, "multiple=0"),
        ({"spread": 0.7}, r"spread=0\.7"),
        ({"spread": "wide"}, "spread='wide': need a number"),
        ({"block": "("}, "no regular expression"),
        ({"block": 3}, "block=3: need a regular expression"),
    ],
)
def test_bad_owl_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        fh.OWL(**options)


def test_owl_refuses_a_single_block_and_missing_outliers():
    one = plain(**{"layers.0.a": (8, 0.0, 1.0), "layers.0.b": (8, 0.0, 1.0)})
    with pytest.raises(ValueError, match=r"all weights are of one, 'layers\.0'"):
        allocate("owl", one, 0.5, outliers=dict.fromkeys(one, 0.1))
    with pytest.raises(ValueError, match="needs outliers="):
        allocate("owl", one, 0.5)


def test_many_increments_become_few_with_the_same_sums():
    r = np.random.default_rng(0)
    many = Increments(r.random(3 * MOST), r.choice([4.0, 8.0], 3 * MOST), 1 << 20)
    few = condensed(many)
    assert len(few.gain) == MOST
    np.testing.assert_allclose(few.gain.sum(), many.gain.sum())
    assert few.cost.sum() == many.cost.sum()
    other = Increments(r.random(9) / 2, np.full(9, 8.0), 72)
    exact = allocate("global", {"a": many, "b": other}, 0.6, normalise=False)
    close = allocate("global", {"a": few, "b": other}, 0.6, normalise=False)
    assert close["a"] == pytest.approx(exact["a"], abs=1e-4)


def test_budgets_refuse_a_pattern_with_one_sparsity():
    params = {"first": jnp.ones((32, 32)), "second": jnp.ones((32, 32))}
    uses = fh.discover(two_layers, params, jnp.ones((4, 32)))
    with pytest.raises(ValueError, match="nothing to allocate"):
        fh.budgets(fh.Magnitude(fh.NM(2, 4)), params, uses, None, 0.5)
