from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from flexhinm_jax.training.pulling import original_under_2_4, prox_sparse

KEY = jax.random.key(0)


def apply_fn(params, x):
    hidden = x @ params["a"] + params["bias"]
    return jnp.einsum("sbi,sio->sbo", jnp.stack([hidden, -hidden]), params["s"])


@pytest.fixture(scope="module")
def task():
    params = {
        "a": jax.random.normal(KEY, (8, 12)),
        "bias": jnp.ones(12),
        "s": jnp.array([1.0, 0.01])[:, None, None]
        * jax.random.normal(jax.random.key(1), (2, 12, 4)),
    }
    return params, fh.discover(apply_fn, params, jnp.ones((3, 8)))


def test_a_step_is_that_of_the_method_on_every_matrix(task):
    params, uses = task
    grads = jax.tree.map(lambda p: jnp.cos(p), params)
    tx = prox_sparse(optax.sgd(0.1), uses, strength=0.3)
    updates, _ = tx.update(grads, tx.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    method = fh.ProxSparse(strength=0.3)
    plain = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    np.testing.assert_array_equal(after["bias"], plain["bias"])
    for old, moved, found in (
        (params["a"], plain["a"], after["a"]),
        (params["s"][0], plain["s"][0], after["s"][0]),
        (params["s"][1], plain["s"][1], after["s"][1]),
    ):
        state = method.solve(KEY, old.T, None)
        state = fh.State({"weight": moved.T}, state.fixed)
        want = method.constrain(state).learned["weight"].T
        np.testing.assert_allclose(found, want, atol=1e-6)
        np.testing.assert_array_equal(found == 0, want == 0)


def test_groups_become_2_4_and_the_original_weights_come_back(task):
    params, uses = task
    tx = prox_sparse(optax.adam(1e-3), uses, strength=0.3)

    @jax.jit
    def step(carry, _):
        moved, opt = carry
        updates, opt = tx.update(jax.tree.map(jnp.zeros_like, moved), opt, moved)
        return (optax.apply_updates(moved, updates), opt), None

    (moved, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=40)
    alive = jnp.sum(moved["a"].T.reshape(12, 2, 4) != 0, -1)
    assert float(jnp.mean(alive <= 2)) > 0.9
    found = original_under_2_4(moved, params, uses)
    keep = masks.n_of_m(jnp.abs(params["a"].T), n=2, m=4).T  # nothing pulled back
    np.testing.assert_array_equal(found["a"], jnp.where(keep, params["a"], 0))
    np.testing.assert_array_equal(found["bias"], params["bias"])


def test_what_does_not_fit_is_refused(task):
    params, uses = task
    with pytest.raises(ValueError, match="strength=-1"):
        prox_sparse(optax.sgd(0.1), uses, strength=-1)
    tx = prox_sparse(optax.sgd(0.1), uses)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    odd = {"w": jnp.ones((6, 2))}
    narrow = fh.discover(lambda p, x: x @ p["w"], odd, jnp.ones((1, 6)))
    with pytest.raises(ValueError, match="w: in=6 is not a multiple of m=4"):
        prox_sparse(optax.sgd(0.1), narrow).init(odd)
