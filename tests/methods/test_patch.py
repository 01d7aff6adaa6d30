import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from tests.cases import stats, weight
from tests.compiled import decide, solve

KEY = jax.random.key(0)
TILES = fh.Tiles((4, 8))


def solved(method, sparsity=0.25, seed=0):
    return solve(method, KEY, weight(seed), stats(seed), sparsity=sparsity)


def moved(state, seed=1, size=1.0):
    """The state with random logits."""
    leaves, tree = jax.tree.flatten(state.learned)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(state, learned=jax.tree.unflatten(tree, drawn))


@pytest.mark.parametrize("mode", ["joint", "tile"])
def test_the_density_follows_from_the_tile_probabilities(mode):
    method = fh.Patch(TILES, mode=mode, tile_temperature=(1.0, 1.0))
    state = moved(solved(method), size=0.05)
    ones = jnp.ones_like(weight())
    drawn = jax.vmap(lambda k: decide(method, state, ones, key=k).weight.mean())(
        jax.random.split(KEY, 4000)
    )
    # A logistic gate at temperature 1 has the mean of a uniform one only when fair, so
    # compare with the exact identity on each sample's own gates instead.
    p = jax.nn.sigmoid(state.fixed["tile_scale"] * state.learned["tiles"]).mean()
    np.testing.assert_allclose(method.density(state), 0.5 + 0.5 * p, atol=1e-6)
    assert abs(float(drawn.mean()) - float(method.density(state))) < 0.03


def test_all_groups_of_a_tile_have_the_sum_that_its_gate_gives():
    method = fh.Patch(TILES)
    mask = method.mask(moved(solved(method), size=0.05), KEY)
    sums = TILES.tiles(mask).reshape(4, 4, -1, 4).sum(-1)
    gate = sums[..., 0] / 2 - 1  # 2 + 2 g
    assert float(jnp.max(jnp.abs(sums - (2 + 2 * gate)[..., None]))) < 1e-5
    np.testing.assert_allclose(mask.mean(), 0.5 + 0.5 * gate.mean(), atol=1e-6)


def test_every_relaxed_mask_is_between_n_of_m_and_dense():
    method = fh.Patch(TILES)
    mask = method.mask(moved(solved(method), size=0.05), KEY)
    sums = mask.reshape(16, -1, 4).sum(-1)
    assert float(sums.min()) >= 2 - 1e-5 and float(sums.max()) <= 4 + 1e-5


def test_the_start_is_the_support_of_the_scores():
    method = fh.Patch(TILES, scores=fh.Magnitude())
    want = solve(fh.Magnitude(TILES), KEY, weight(), None, sparsity=0.25)
    plan = decide(method, solved(method), weight())
    np.testing.assert_array_equal(plan.support.keep, want.fixed["support"].keep)


@pytest.mark.parametrize("sparsity", [0.0, 0.125, 0.25, 0.375, 0.5])
def test_hardening_meets_the_budget_whatever_was_learned(sparsity):
    method = fh.Patch(TILES)
    state = method.harden(moved(solved(method, sparsity)), weight())
    plan = decide(method, state, weight())
    fh.verify(plan)
    np.testing.assert_allclose(plan.support.keep.mean(), 1 - sparsity)
    sample = decide(method, state, weight(), key=KEY).weight
    np.testing.assert_array_equal(sample, plan.weight)


def test_a_global_target_moves_dense_tiles_between_weights_and_keeps_their_number():
    method = fh.Patch(TILES)
    states = {name: moved(solved(method), seed) for seed, name in enumerate("ab")}
    top = states["a"].learned["tiles"] + 100
    learned = states["a"].learned | {"tiles": top}
    states["a"] = dataclasses.replace(states["a"], learned=learned)
    after = method.settle(states)
    counts = [int(after[name].fixed["dense_tiles"]) for name in "ab"]
    assert counts == [16, 0]
    layer = fh.Patch(TILES, target="layer").settle(states)
    assert [int(layer[name].fixed["dense_tiles"]) for name in "ab"] == [8, 8]


def test_the_density_term_is_zero_on_target_and_pulls_towards_it():
    method = fh.Patch(TILES, reward=0.0)
    state = solved(method, 0.25)

    def term(tiles):
        now = dataclasses.replace(state, learned=state.learned | {"tiles": tiles})
        return method.combine(method.penalty(now, weight(), key=KEY))["density"]

    fair = jnp.zeros((4, 4))
    np.testing.assert_allclose(term(fair), 0, atol=1e-6)
    assert bool(jnp.all(jax.grad(term)(fair + 0.01) > 0))
    assert bool(jnp.all(jax.grad(term)(fair - 0.01) < 0))


def test_in_tile_mode_the_patterns_stay_those_of_the_scores():
    method = fh.Patch(TILES, mode="tile", scores=fh.Magnitude())
    state = moved(solved(method))
    assert set(state.learned) == {"tiles"}
    keep = decide(method, state, weight()).support.keep
    dense = TILES.spread(TILES.tiles(keep).all(-1))
    want = masks.n_of_m(jnp.abs(weight()), n=2, m=4)
    np.testing.assert_array_equal(keep, dense | want)


def test_without_noise_the_gates_are_their_probabilities_or_the_dense_tiles():
    state = moved(solved(fh.Patch(TILES)), size=0.05)
    ones = jnp.ones_like(weight())
    even = fh.Patch(TILES, relaxation="expected", tile_temperature=(1.0, 1.0))
    expected = decide(even, even.anneal(state, 0.0), ones, key=KEY).weight.mean()
    np.testing.assert_allclose(expected, even.density(state), atol=1e-6)
    decided = fh.Patch(TILES, relaxation="decided")
    hard = decide(decided, state, ones).weight
    np.testing.assert_array_equal(decide(decided, state, ones, key=KEY).weight, hard)

    def kept(tiles):
        now = dataclasses.replace(state, learned=state.learned | {"tiles": tiles})
        return decide(decided, now, ones, key=KEY).weight.sum()

    assert bool(jnp.all(jax.grad(kept)(state.learned["tiles"]) > 0))


def test_a_prior_of_shares_ranks_tiles_as_the_scores_do_whatever_their_unit():
    method = fh.Patch(TILES, tile_prior="shares", tile_start=1.0)
    state = solved(method)
    scores = np.asarray(method.scores.score(weight(), stats()), np.float64)
    dropped = np.where(state.fixed["inner"], 0, scores)
    dropped = dropped.reshape(4, 4, -1, 8).sum((1, 3))
    logits = np.log(dropped / scores.sum()) / method.tile_scale[0]
    np.testing.assert_allclose(state.learned["tiles"], logits, rtol=1e-5)
    double = solve(method, KEY, 2 * weight(), stats(), sparsity=0.25)
    tiles = double.learned["tiles"]
    np.testing.assert_allclose(tiles, state.learned["tiles"], rtol=1e-5)


@pytest.mark.parametrize("sparsity", [0.25, 0.3, 0.45])
def test_a_global_budget_is_rounded_once_for_the_model(sparsity):
    method = fh.Patch(fh.Tiles((8, 8)), tile_prior="shares")
    states = {name: solved(method, sparsity, k) for k, name in enumerate("abc")}
    each = states["a"].learned["tiles"].size
    dense = sum(int(s.fixed["dense_tiles"]) for s in method.settle(states).values())
    assert dense == round(3 * each * (1 - 2 * sparsity))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode='both'"),
        ({"target": "model"}, "target='model'"),
        ({"tile_prior": "wanda"}, "tile_prior='wanda'"),
        ({"tile_temperature": (2.0, 0.0)}, "above 0"),
        ({"reward": -1.0}, "numbers >= 0"),
        ({"scores": "wanda"}, "need a method that scores"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fh.Patch(TILES, **options)


def test_targets_and_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"outside \[0, 0.5\]"):
        fh.Patch(TILES).solve(KEY, weight(), stats(), sparsity=0.75)
    with pytest.raises(ValueError, match="not a multiple of"):
        fh.Patch().solve(KEY, weight(), stats(), sparsity=0.25)
