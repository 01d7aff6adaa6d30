"""The start of PATCH on a model of two layers, one of which the loss does not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from train.lab.masks import tiles
from train.lab.masks.learner import started_at
from train.lab.masks.problems import Problem

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)
METHOD = fh.Patch(
    fh.Tiles(8), relaxation="decided", tile_prior="shares", tile_start=1.0
)


def apply(params, x):
    return x @ params["seen"].T + 1e-3 * (x @ params["hidden"].T)


@pytest.fixture(scope="module")
def start():
    """(states, masks, problem)."""
    keys = jax.random.split(KEY, 3)
    names = ("seen", "hidden")
    made = zip(names, keys, strict=False)
    params = {name: jax.random.normal(k, (16, 16)) for name, k in made}
    x = jax.random.normal(keys[2], (64, 16))

    def loss(now, x):
        return jnp.mean((apply(now, x) - apply(params, x)) ** 2), {}

    nothing = lambda params: pytest.fail("not asked")  # noqa: E731
    problem = Problem(
        name="two layers",
        params=params,
        apply_fn=apply,
        calibration=[(x,)],
        loss_fn=loss,
        batch_at=lambda step: (x,),
        validate=nothing,
        evaluate=nothing,
        score="",
        side=8,
        facts={},
    )
    given = params, problem.uses, problem.stats
    solved = fh.solve(
        fh.RefineMask(fh.Wanda(fh.NM(2, 4)), weights="dense"), KEY, *given
    )
    keeps = {path: s.fixed["support"].keep for path, s in solved.items()}
    states = started_at(METHOD, fh.solve(METHOD, KEY, *given, 0.25), keeps)
    return states, keeps, problem


def test_dense_tiles_go_where_the_loss_is_and_the_rest_stays_n_of_m(start):
    states, keeps, problem = start
    found = tiles.gains(METHOD, states, problem, key=KEY, steps=1)
    assert found["seen"] > 100 * abs(found["hidden"])
    after = tiles.dealt(METHOD, states, keeps, problem, key=KEY, steps=1)
    assert [int(after[p].fixed["dense_tiles"]) for p in ("seen", "hidden")] == [4, 0]
    plans = fh.decide(METHOD, after, problem.params, problem.uses)
    assert bool(plans["seen"].support.keep.all())
    np.testing.assert_array_equal(plans["hidden"].support.keep, keeps["hidden"])


def test_patterns_beside_dense_tiles_are_chosen_anew_and_err_less(start):
    states, keeps, problem = start
    some = {
        path: dataclasses.replace(s, fixed=s.fixed | {"target": jnp.float32(0.5625)})
        for path, s in states.items()
    }
    after = tiles.dealt(METHOD, some, keeps, problem, key=KEY, steps=1)
    assert int(after["seen"].fixed["dense_tiles"]) == 1
    plan = fh.decide(METHOD, after, problem.params, problem.uses)["seen"]
    fh.verify(plan)
    inner = after["seen"].fixed["inner"].reshape(16, -1, 4).sum(-1)
    np.testing.assert_array_equal(inner, 2)
    dense = METHOD.tiles.tiles(plan.support.keep).all(-1)
    before = keeps["seen"] | METHOD.tiles.spread(dense)
    x = problem.batch_at(0)[0]

    def error(keep):
        weight = jnp.where(keep, 0, problem.params["seen"])
        return float(jnp.sum(jnp.square(x @ weight.T)))

    assert error(plan.support.keep) < error(before)
