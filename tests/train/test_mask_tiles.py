"""The start of PATCH on a model of two layers, one of which the loss does not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from train import mask_tiles
from train.mask_learner import started_at

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)
METHOD = fh.Patch(
    fh.Tiles(8), relaxation="decided", tile_prior="shares", tile_start=1.0
)


def apply(params, x):
    return x @ params["seen"].T + 1e-3 * (x @ params["hidden"].T)


@pytest.fixture(scope="module")
def start():
    """(states, masks, parameters, uses, statistics, loss, batches)."""
    keys = jax.random.split(KEY, 3)
    names = ("seen", "hidden")
    made = zip(names, keys, strict=False)
    params = {name: jax.random.normal(k, (16, 16)) for name, k in made}
    x = jax.random.normal(keys[2], (64, 16))
    uses = fh.discover(apply, params, x)
    stats = fh.calibrate(apply, params, uses, [(x,)])
    solved = fh.solve(
        fh.RefineMask(fh.NM(2, 4), weights="dense"), KEY, params, uses, stats
    )
    keeps = {path: s.fixed["support"].keep for path, s in solved.items()}
    states = fh.solve(METHOD, KEY, params, uses, stats, 0.25)
    states = started_at(METHOD, states, keeps)

    def loss(now, x):
        return jnp.mean((apply(now, x) - apply(params, x)) ** 2), {}

    return states, keeps, params, uses, stats, loss, lambda step: (x,)


def test_dense_tiles_go_where_the_loss_is_and_the_rest_stays_n_of_m(start):
    states, keeps, params, uses, stats, loss, batch_at = start
    given = params, uses, loss, batch_at
    found = mask_tiles.gains(METHOD, states, *given, key=KEY, steps=1)
    assert found["seen"] > 100 * abs(found["hidden"])
    given = params, uses, stats, loss, batch_at
    after = mask_tiles.dealt(METHOD, states, keeps, *given, key=KEY, steps=1)
    assert [int(after[p].fixed["dense_tiles"]) for p in ("seen", "hidden")] == [4, 0]
    plans = fh.decide(METHOD, after, params, uses)
    assert bool(plans["seen"].support.keep.all())
    np.testing.assert_array_equal(plans["hidden"].support.keep, keeps["hidden"])


def test_patterns_beside_dense_tiles_are_chosen_anew_and_err_less(start):
    states, keeps, params, uses, stats, loss, batch_at = start
    some = {
        path: dataclasses.replace(s, fixed=s.fixed | {"target": jnp.float32(0.5625)})
        for path, s in states.items()
    }
    given = params, uses, stats, loss, batch_at
    after = mask_tiles.dealt(METHOD, some, keeps, *given, key=KEY, steps=1)
    assert int(after["seen"].fixed["dense_tiles"]) == 1
    plan = fh.decide(METHOD, after, params, uses)["seen"]
    fh.verify(plan)
    inner = after["seen"].fixed["inner"].reshape(16, -1, 4).sum(-1)
    np.testing.assert_array_equal(inner, 2)
    dense = METHOD.tiles.tiles(plan.support.keep).all(-1)
    before = keeps["seen"] | METHOD.tiles.spread(dense)
    x = batch_at(0)[0]

    def error(keep):
        return float(jnp.sum(jnp.square(x @ jnp.where(keep, 0, params["seen"]).T)))

    assert error(plan.support.keep) < error(before)
