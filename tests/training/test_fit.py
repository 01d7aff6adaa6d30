import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods.permllm import PermLLM
from flexhinm_jax.training.fit import fit, tied

KEY = jax.random.key(0)
METHOD = PermLLM(fh.NM(2, 4), block=8, steps=0, mask_temperature=0.3)


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
    updates, _ = tx.update(grads, tx.init(params), params)
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
    with pytest.raises(ValueError, match="0 batches"):
        ask(given=[])
    with pytest.raises(ValueError, match="must be solved leaves"):
        ask(ties={"a": "z"})
