from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods.permllm import PermLLM
from flexhinm_jax.training.fit import Stopped, fit
from flexhinm_jax.training.mask_optimizers import tied

KEY = jax.random.key(0)
METHOD: Any = PermLLM(fh.NM(2, 4), block=8, steps=0, mask_temperature=0.3)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) * (x @ params["b"]) @ params["c"]


@pytest.fixture(scope="module")
def task():
    keys = jax.random.split(KEY, 4)
    params = {n: jax.random.normal(k, (16, 16)) / 4 for n, k in zip("abc", keys)}  # noqa: B905
    x = jax.random.normal(keys[3], (64, 16)) * jnp.exp(jnp.linspace(-1, 1, 16))
    uses = fh.discover(apply_fn, params, x)
    stats = fh.calibrate(apply_fn, params, uses, [x])
    states = fh.solve(METHOD, KEY, params, uses, stats)
    return params, uses, states, [(x, apply_fn(params, x))]


def loss_fn(params, x, y):
    return jnp.mean((apply_fn(params, x) - y) ** 2) / jnp.mean(y**2)


def run(task, steps=30, **options):
    params, uses, states, batches = task
    tx = optax.adam(0.1)
    return fit(
        METHOD, states, loss_fn, params, uses, batches,
        key=KEY, tx=tx, steps=steps, every=5, **options,
    )  # fmt: skip


def test_a_loss_of_the_whole_model_finds_better_orders(task):
    params, uses, _, batches = task
    found, history = run(task)
    values = [h["value"] for h in history]
    assert min(values) < 0.9 * values[0]
    plans = fh.decide(METHOD, found, params, uses)
    for plan in plans.values():
        fh.verify(plan)
    kept = fh.densify(plans, params, uses)
    np.testing.assert_allclose(loss_fn(kept, *batches[0]), min(values), rtol=1e-4)


def test_learning_that_only_makes_it_worse_returns_the_start(task):
    params, uses, states, _ = task
    calls = []

    def evaluate(tree):
        calls.append(1)
        return len(calls)

    found, history = run(task, steps=6, evaluate=evaluate)
    assert [h["step"] for h in history] == [0, 5, 6]
    before = fh.decide(METHOD, states, params, uses)
    after = fh.decide(METHOD, found, params, uses)
    for path in before:
        np.testing.assert_array_equal(
            before[path].support.keep, after[path].support.keep
        )


def test_tied_leaves_keep_one_order(task):
    found, _ = run(task, ties={"b": "a"})
    np.testing.assert_array_equal(found["a"].fixed["order"], found["b"].fixed["order"])


def test_tied_updates_are_those_of_the_summed_gradient():
    tx = tied(optax.sgd(1.0), {"b": "a"})
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    grads = {"a": jnp.ones(2), "b": 2 * jnp.ones(2), "c": jnp.ones(2)}
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    assert {p: x.tolist() for p, x in updates.items()} == {
        "a": [-3, -3],
        "b": [-3, -3],
        "c": [-1, -1],
    }


def test_what_does_not_fit_is_refused(task):
    params, uses, states, batches = task
    ask = lambda method=METHOD, given=batches, **o: fit(  # noqa: E731
        method, states, loss_fn, params, uses, given,
        key=KEY, tx=optax.sgd(0.1), steps=1, **o,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not learn with frozen weights"):
        ask(fh.Wanda())
    with pytest.raises(ValueError, match="batches is empty"):
        ask(given=[])
    with pytest.raises(ValueError, match="must be solved leaves"):
        ask(ties={"a": "z"})
    with pytest.raises(ValueError, match="needs the folder"):
        ask(resume=True)
    with pytest.raises(ValueError, match="save_every=0"):
        ask(save_every=0)


class Interrupted(Exception):
    pass


def linear(params, x):
    return x @ params["w"]


def linear_loss(params, x, y):
    return jnp.mean((linear(params, x) - y) ** 2)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A fit with everything that has a memory, whole and stopped after 8 updates.

    The method has a moving average, the optimiser moments, the losses a mean that
    checkpoints cut in two.
    """
    folder, method = tmp_path_factory.mktemp("fit") / "run", fh.MaskPro(start=3.0)
    x = jax.random.normal(KEY, (32, 8)) * jnp.exp(jnp.linspace(-1, 1, 8))
    params = {"w": jax.random.normal(jax.random.key(1), (8, 8))}
    uses = fh.discover(linear, params, x)
    stats = fh.calibrate(linear, params, uses, [x])
    states = fh.solve(method, KEY, params, uses, stats)
    seen = []

    def ask(
        stop=None, key=KEY, steps=17, params=params, x=x, loss=linear_loss, **options
    ):
        def progress(entry):
            seen.append(entry["step"])
            if entry["step"] == stop:
                raise Interrupted

        seen.clear()
        found = fit(
            method, states, loss, params, uses, [(x, linear(params, x))],
            key=key, tx=optax.adam(0.3), steps=steps, every=4, progress=progress,
            save_every=6, **options,
        )  # fmt: skip
        return *found, list(seen)

    whole = ask()
    with pytest.raises(Interrupted):
        ask(stop=8, checkpoints=folder)
    assert [p.name for p in folder.glob("step-*")] == ["step-00000006"]
    return ask, folder, params, whole


def test_a_checkpoint_of_another_fit_is_refused(interrupted):
    ask, folder, params, _ = interrupted
    with pytest.raises(FileExistsError, match="resume=True"):
        ask(checkpoints=folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ask(checkpoints=folder / "none", resume=True)
    for options, message in (
        ({"key": jax.random.key(9)}, "key: saved"),
        ({"steps": 18}, "steps: saved 17, now 18"),
        ({"config": {"rate": 0.1}}, "run: saved null"),
        ({"x": jnp.ones((32, 8))}, "batches: saved"),
        ({"loss": lambda *args: 2 * linear_loss(*args)}, "loss: saved"),
        ({"params": {"w": params["w"] + 1e-3}}, "start: saved"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(checkpoints=folder, resume=True, **options)


def test_a_fit_that_was_interrupted_ends_bit_for_bit_the_same(interrupted):
    ask, folder, _, (whole, history, _) = interrupted
    assert len({h["value"] for h in history}) > 1
    found, again, seen = ask(checkpoints=folder, resume="auto")
    assert seen == [8, 12, 16, 17]  # not from the beginning
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    np.testing.assert_equal(again, history)
    over, again, seen = ask(checkpoints=folder, resume=True)
    jax.tree.map(np.testing.assert_array_equal, over, whole)
    np.testing.assert_equal(again, history)
    assert seen == []


def test_nan_stops_with_the_step_named_and_the_best_states(task):
    params, uses, states, batches = task
    bad = (batches[0][0], batches[0][1].at[0, 0].set(jnp.nan))
    given = [batches[0]] * 7 + [bad]
    ask = lambda steps, given: fit(  # noqa: E731
        METHOD, states, loss_fn, params, uses, given, key=KEY, tx=optax.adam(0.1),
        steps=steps, every=5, evaluate=lambda p: loss_fn(p, *batches[0]),
    )  # fmt: skip
    with pytest.raises(Stopped, match="step 8: loss or gradient is not finite") as e:
        ask(10, given)
    best = min(e.value.history, key=lambda h: h["value"])
    assert best["step"] in (0, 5) and len(e.value.history) == 2
    plans = fh.decide(METHOD, e.value.states, params, uses)
    kept = fh.densify(plans, params, uses)
    np.testing.assert_allclose(loss_fn(kept, *batches[0]), best["value"], rtol=1e-5)
    with pytest.raises(ValueError, match="the start evaluates to nan"):
        run((params, uses, states, [bad]), steps=1)
