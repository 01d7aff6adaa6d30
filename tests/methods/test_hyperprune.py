import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from bench.masks import layer_of, lost
from flexhinm_jax.ops import gram, hypernet
from tests.cases import stats, weight

KEY = jax.random.key(0)
PATTERNS = {"nm": fh.NM(2, 4), "flexhinm": fh.FlexHiNM(8, permute=None)}


def prepared(pattern, **options):
    """Method, problem, prior support and the layer that the net sees."""
    method = fh.HyperPrune(fh.Wanda(pattern), **options)
    state = method.inner.solve(KEY, weight(), stats(), sparsity=0.5)
    support = method.inner.decide(state, weight()).support
    task = method.problem(weight(), stats())
    return method, task, support, hypernet.build_layer(task, support)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_start_is_the_prior_and_its_error_that_of_the_outputs(name):
    method, task, support, seen = prepared(PATTERNS[name])
    net = method.net(KEY)
    keep, lost = method._better(net, seen, None, seen.keep, jnp.float32(jnp.inf))
    original = hypernet.original(keep, support.regions)
    np.testing.assert_array_equal(original, support.keep)
    want = gram.error(jnp.where(support.keep, task.weight, 0), task)
    np.testing.assert_allclose(lost / seen.total, want, rtol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_parts_of_a_matrix_add_up_to_it(name):
    method, _, _, seen = prepared(PATTERNS[name], prior=1e6)  # no noise is left
    parts = seen.weight.shape[0]
    every = [
        method.terms(method.net(KEY), hypernet.take_parts(seen, at), None, KEY, 1.0)
        for at in (jnp.arange(parts), *jnp.split(jnp.arange(parts), 2))
    ]
    whole, *halves = (float(x["reconstruction"]) for x in every)
    np.testing.assert_allclose(np.mean(halves), whole, rtol=1e-5)
    kept = jnp.where(seen.keep, seen.weight, 0)
    share = jnp.sum(kept**2 * seen.energy[:, None])
    share /= jnp.sum(seen.weight**2 * seen.energy[:, None])
    np.testing.assert_allclose(every[0]["outlier"], share, rtol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_price_of_a_weight_is_what_removing_it_adds_to_the_error(name):
    _, task, support, seen = prepared(PATTERNS[name])
    kept = jnp.where(support.keep, task.weight, 0)
    price = hypernet.original(seen.price, support.regions)
    own = jnp.square(task.weight) * jnp.diag(task.gram)
    for at in ((0, 1), (3, 6), (7, 2)):
        ends = [kept.at[at].set(x) for x in (task.weight[at], 0)]
        kept_error, removed = (float(gram.error(x, task)) for x in ends)
        want = (removed - kept_error) * float(seen.total) / float(jnp.mean(own))
        np.testing.assert_allclose(price[at], want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_on_the_published_layer_it_is_between_wanda_and_coordinate_descent():
    w, s = layer_of(0)
    found = {}
    for method in (
        fh.Wanda(),
        fh.HyperPrune(),
        fh.RefineMask(weights="dense"),
    ):
        plan = method.decide(method.solve(KEY, w, s), w)
        fh.verify(plan)
        np.testing.assert_array_equal(plan.weight, jnp.where(plan.support.keep, w, 0))
        found[type(method).__name__] = float(lost(w, plan.weight, s.gram))
    assert found["HyperPrune"] < 0.9 * found["Wanda"]
    assert found["RefineMask"] < found["HyperPrune"]


def test_a_net_that_runs_away_ends_with_the_prior_at_worst():
    method = fh.HyperPrune(fh.SparseGPT(), learning_rate=1e6, steps=5)
    state = method.solve(KEY, weight(), stats())
    assert float(state.fixed["error"]) <= float(state.fixed["prior_error"])
    plan = method.decide(state, weight())
    fh.verify(plan)
    np.testing.assert_array_equal(
        plan.weight, jnp.where(plan.support.keep, weight(), 0)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden=0: need at least 1"),
        ({"steps": 0}, "steps=0: need at least 1"),
        ({"outlier": -1.0}, "outlier=-1.0: need a number >= 0"),
        ({"temperature": (4.0, 0.0)}, "both above 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fh.HyperPrune(**options)


def test_patterns_with_too_many_choices_are_refused():
    with pytest.raises(ValueError, match="works with NM or HiNM"):
        fh.HyperPrune(fh.NM(8, 16))  # type: ignore[arg-type]
    assert fh.HyperPrune.fits(fh.NM(4, 8))
