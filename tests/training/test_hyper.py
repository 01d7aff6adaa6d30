import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training.hyper import hyper_prune, name
from flexhinm_jax.training.run import NotFinite

KEY = jax.random.key(0)
METHOD = fh.HyperPrune(steps=60, checks=3, hidden=16, embedding=4, cache=64, prior=1.0)
PATHS = [f"layers/{j}/{n}" for j in range(2) for n in ("up", "down")]


def apply_fn(params, x):
    for j in range(2):
        up, down = (params[f"layers/{j}/{n}"] for n in ("up", "down"))
        x = x + jnp.tanh(x @ up) @ down
    return x


@pytest.fixture(scope="module")
def task():
    keys = jax.random.split(KEY, 5)
    params = {
        p: jax.random.normal(k, (16, 16)) / 4
        for p, k in zip(PATHS, keys[:4], strict=True)
    }
    x = jax.random.normal(keys[4], (64, 16)) * jnp.exp(jnp.linspace(-1, 1, 16))
    uses = fh.discover(apply_fn, params, x)
    return params, uses, fh.calibrate(apply_fn, params, uses, [x])


def errors(found):
    return [row["error"] for row in found.rows]


@pytest.fixture(scope="module")
def found(task):
    return hyper_prune(METHOD, KEY, *task)


def test_no_matrix_ends_worse_than_its_prior(task, found):
    params, uses, stats = task
    assert [row["path"] for row in found.rows] == PATHS
    assert all(row["error"] <= row["prior"] for row in found.rows)
    assert any(row["error"] < row["prior"] for row in found.rows)
    prior = fh.decide(
        fh.Wanda(), fh.solve(fh.Wanda(), KEY, params, uses, stats), params, uses
    )
    plans = fh.decide(METHOD, found.states, params, uses)
    for row in found.rows:
        path, h = row["path"], stats[row["path"]].gram
        fh.verify(plans[path])
        w = params[path].T
        # the library damps the Gram by one percent of its mean
        h = h + 0.01 * jnp.mean(jnp.diag(h)) * jnp.eye(16)
        energy = lambda d, h=h: float(jnp.sum((d @ h) * d))  # noqa: E731
        for plan, key in ((prior[path], "prior"), (plans[path], "error")):
            lost = energy(w - plan.weight) / energy(w)
            np.testing.assert_allclose(row[key], lost, rtol=1e-4)


def test_layers_and_components_come_from_the_paths(found):
    assert found.layers == ((0,), (1,))
    assert found.components == ("layers/*/up", "layers/*/down")
    assert found.theta["layers"].shape == (2, 4)
    assert name("h_11/attn/q2", ()) == ((11,), "h_*/attn/q2")
    assert name("head", (1, 2)) == ((1, 2), "head")


def test_the_first_matrix_has_nothing_to_keep_in_mind(task, found):
    other = hyper_prune(dataclasses.replace(METHOD, continual=0.0), KEY, *task)
    first = [x.states[PATHS[0]].fixed["support"].keep for x in (found, other)]
    np.testing.assert_array_equal(*first)
    ends = [np.asarray(x.theta["dense"][-1]["kernel"]) for x in (found, other)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4


def test_without_embeddings_the_net_does_not_know_where_it_is(task):
    plain = dataclasses.replace(METHOD, embedding=0)
    ways = (name, lambda path, at: (path, "one"))
    one, two = (hyper_prune(plain, KEY, *task, identify=way) for way in ways)
    assert set(one.theta) == {"dense"}
    assert one.theta["dense"][0]["kernel"].shape == (16, 16)
    jax.tree.map(np.testing.assert_array_equal, one.theta, two.theta)
    assert errors(one) == errors(two)


@pytest.mark.slow
def test_the_layers_of_a_stack_are_visited_in_turn():
    params = {n: jax.random.normal(KEY, (3, 8, 8)) for n in ("a", "b")}
    x = jax.random.normal(jax.random.key(1), (32, 8))

    def scanned(params, x):
        layer = lambda x, w: (jnp.tanh(x @ w["a"]) @ w["b"], None)  # noqa: E731
        return jax.lax.scan(layer, x, params)[0]

    uses = fh.discover(scanned, params, x)
    stats = fh.calibrate(scanned, params, uses, [x])
    seen = []
    found = hyper_prune(METHOD, KEY, params, uses, stats, progress=seen.append)
    assert [(r["path"], r["at"]) for r in seen] == [
        (n, (j,)) for j in range(3) for n in ("a", "b")
    ]
    assert found.layers == ((0,), (1,), (2,)) and found.components == ("a", "b")
    plans = fh.decide(METHOD, found.states, params, uses)
    assert plans["a"].weight.shape == (3, 8, 8)
    for plan in plans.values():
        np.testing.assert_array_equal((plan.weight != 0).reshape(3, 8, 2, 4).sum(-1), 2)


def test_what_does_not_fit_is_refused(task):
    params, uses, stats = task
    norms = {
        path: dataclasses.replace(given, gram=None) for path, given in stats.items()
    }
    with pytest.raises(ValueError, match="layers/0/up: .*needs the Gram"):
        hyper_prune(METHOD, KEY, params, uses, norms)
    rule: Any = {"layers/1/down": fh.NM(1, 4)}
    ruled = fh.discover(apply_fn, params, jnp.ones((2, 16)), rules=rule)
    with pytest.raises(ValueError, match="layers/1/down: a rule asks for"):
        hyper_prune(METHOD, KEY, params, ruled, stats)
    wild = dataclasses.replace(METHOD, learning_rate=float("inf"))
    with pytest.raises(NotFinite, match="layers/0/up: the net is not finite"):
        hyper_prune(wild, KEY, *task)


def test_a_matrix_that_no_input_reached_keeps_its_largest_weights(caplog):
    def seen(params, x):
        both = jnp.stack([x, 0 * x])
        return x @ params["0"]["w"] + jnp.einsum(
            "sti,sio->sto", both, params["1"]["w"]
        ).sum(0)

    keys = jax.random.split(KEY, 3)
    w = jax.random.normal(keys[0], (2, 16, 16))
    params = {"0": {"w": 2.0**80 * w[0]}, "1": {"w": w}}
    x = jax.random.normal(keys[1], (64, 16))
    uses = fh.discover(seen, params, x)
    stats = fh.calibrate(seen, params, uses, [x])
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        states = hyper_prune(METHOD, keys[2], params, uses, stats).states
    assert "1/w: no calibration input reached matrices 1 of" in caplog.text
    dense = fh.densify(fh.decide(METHOD, states, params, uses), params, uses)
    groups = np.abs(np.asarray(w[1]).T).reshape(-1, 4)
    largest = np.argsort(-groups, -1)[:, :2]
    kept = np.asarray(dense["1"]["w"][1]).T.reshape(-1, 4) != 0
    assert np.take_along_axis(kept, largest, -1).all() and kept.sum() == 128
    top = np.abs(np.asarray(dense["0"]["w"]) / 2.0**80)
    assert 0 < top.max() < 1e3 and (top == 0).mean() == 0.5
