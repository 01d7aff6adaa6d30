"""AdamS of CAST: Adam for the weights that stay, a growing decay for the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from flexhinm_jax.training.pulling import original_under_2_4, scale_by_adam_s

KEY = jax.random.key(0)


def apply_fn(params, x):
    return x @ params["w"] + params["b"]


@pytest.fixture(scope="module")
def uses():
    return fh.discover(
        apply_fn, {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}, jnp.ones((2, 8))
    )


def start() -> Any:
    return {"w": jax.random.normal(KEY, (8, 4)), "b": jnp.ones(4)}


def gradients(step) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.fold_in(KEY, step), 2)
    return {
        "w": jax.random.normal(keys[0], (8, 4)),
        "b": jax.random.normal(keys[1], (4,)),
    }


def test_it_is_adam_but_for_the_weights_to_be_pruned(uses):
    """Against the published formulas in NumPy, mask refreshed every second step."""
    tx = scale_by_adam_s(uses, steps=4, decay=0.3, refresh=2)
    adam = optax.scale_by_adam()
    params: Any = start()
    state, plain = tx.init(params), adam.init(params)
    mu = nu = np.zeros((4, 8))
    keep = np.ones((4, 8), bool)
    for step in range(6):
        w = np.asarray(params["w"].T, np.float64)
        if step % 2 == 0:
            keep = np.asarray(masks.n_of_m(jnp.abs(params["w"].T), n=2, m=4))
        g = np.asarray(gradients(step)["w"].T, np.float64)
        a = min(step / 4, 1)
        mu = 0.9 * mu + 0.1 * g
        mixed = lambda x: np.where(keep, x, (1 - a) * x + a * 0.3 * np.sign(w))  # noqa: E731, B023
        nu = 0.999 * nu + 0.001 * mixed(g) ** 2
        square = np.sqrt(nu / (1 - 0.999 ** (step + 1))) + 1e-8
        updates: Any
        theirs: Any
        updates, state = tx.update(gradients(step), state, params)
        theirs, plain = adam.update(gradients(step), plain, params)
        want = mixed(mu) / (1 - 0.9 ** (step + 1)) / square
        np.testing.assert_allclose(updates["w"].T, want, rtol=2e-4)
        np.testing.assert_allclose(updates["b"], theirs["b"], rtol=1e-6)
        if step == 0:
            np.testing.assert_allclose(updates["w"], theirs["w"], rtol=1e-6)
        move = jax.tree.map(lambda u: -0.05 * u, updates)
        params = optax.apply_updates(params, move)


def test_the_mask_costs_nothing_at_the_end_and_less_than_of_adam(uses):
    """A regression on correlated inputs: dense Adam then 2:4, and AdamS then 2:4."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (256, 8)) @ (
        jnp.eye(8) + 0.5 * jax.random.normal(keys[1], (8, 8))
    )
    y = x @ jax.random.normal(keys[2], (8, 4))
    steps = 400

    @jax.jit
    def loss(params):
        return jnp.mean(jnp.square(apply_fn(params, x) - y))

    def train(rule):
        rate = optax.linear_schedule(0.02, 0.0, steps)
        tx = optax.chain(rule, optax.scale_by_learning_rate(rate))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0][0])
        params = run((start(), tx.init(start())))
        return loss(params), loss(original_under_2_4(params, params, uses))

    _, plain = train(optax.scale_by_adam())
    before, after = train(scale_by_adam_s(uses, steps=steps, decay=1.0, b2=0.95))
    assert after < 1.001 * before
    assert after < 0.6 * plain


def test_numbers_that_make_no_sense_are_refused(uses):
    with pytest.raises(ValueError, match="a decay > 0"):
        scale_by_adam_s(uses, steps=5, decay=0.0)
    with pytest.raises(ValueError, match="0 < n < m"):
        scale_by_adam_s(uses, steps=5, decay=0.1, nm=(4, 4))
    with pytest.raises(ValueError, match="means in"):
        scale_by_adam_s(uses, steps=5, decay=0.1, b2=1.0)
    with pytest.raises(ValueError, match="steps=0"):
        scale_by_adam_s(uses, steps=0, decay=0.1)
    tx = scale_by_adam_s(uses, steps=5, decay=0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(start(), tx.init(start()))
