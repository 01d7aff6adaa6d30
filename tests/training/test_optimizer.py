import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training.optimizer import KeepSparseState

KEY = jax.random.key(0)
INNER = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clipped lion": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)),
    "adafactor": optax.adafactor(0.1),
}


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def make(dtype=jnp.float32):
    return {
        "w": jax.random.normal(KEY, (16, 8)).astype(dtype),
        "b": jnp.zeros(8, dtype),
        "v": jax.random.normal(KEY, (8, 4)).astype(dtype),
    }


def pruned(dtype=jnp.float32):
    params, x = make(dtype), jnp.ones((4, 16), dtype)
    method = fh.Magnitude(fh.NM(2, 4))
    result = fh.prune(model, params, [x], method, key=KEY, rules={"^v$": "skip"})
    return result, fh.keep_tree(result.plans, params, result.uses)


def loss(params, x):
    return jnp.mean((model(params, x) - 1) ** 2).astype(jnp.float32)


def train(tx, params, state, steps, dtype=jnp.float32):
    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for k in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, jax.random.normal(k, (8, 16)).astype(dtype))
    return params, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", INNER)
def test_pruned_weights_stay_exactly_zero_and_the_rest_learns(name, dtype):
    result, keep = pruned(dtype)
    tx = fh.keep_sparse(INNER[name], keep)
    params, _ = train(tx, result.params, tx.init(result.params), 12, dtype)
    np.testing.assert_array_equal(np.asarray(params["w"] == 0), ~np.asarray(keep["w"]))
    assert params["w"].dtype == dtype
    for leaf in ("b", "v", "w"):
        assert np.any(np.asarray(params[leaf] != result.params[leaf]))


def test_momentum_from_dense_steps_cannot_revive_a_weight():
    params, tx = make(), optax.adamw(0.1)
    params, dense_state = train(tx, params, tx.init(params), 3)
    keep = {"w": params["w"] > 0, "b": None, "v": None}
    wrapped = fh.keep_sparse(tx, keep)
    params, _ = train(wrapped, params, KeepSparseState(keep, dense_state), 7)
    np.testing.assert_array_equal(np.asarray(params["w"] == 0), ~np.asarray(keep["w"]))


def test_kept_weights_move_as_without_the_wrapper_when_nothing_is_pruned():
    params, tx = make(), optax.adam(0.1)
    all_kept = {"w": jnp.ones((16, 8), bool), "b": None, "v": None}
    wrapped = fh.keep_sparse(tx, all_kept)
    want, _ = train(tx, params, tx.init(params), 5)
    got, _ = train(wrapped, params, wrapped.init(params), 5)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_smaller_support_in_the_state_does_not_retrace():
    _, keep = pruned()
    tx, traces = fh.keep_sparse(optax.adam(0.1), keep), []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = make()
    params, state = step(params, tx.init(params))
    smaller = {**keep, "w": keep["w"] & (jnp.arange(8) < 4)}
    params, state = step(params, state._replace(keep=smaller))
    assert len(traces) == 1
    assert not np.any(params["w"][:, 4:])


def test_the_supports_are_found_in_a_checkpoint_with_zeros():
    result, keep = pruned()
    found = fh.keep_from_zeros(result.params, result.uses)
    np.testing.assert_array_equal(found["w"], keep["w"])
    assert found["b"] is None and found["v"] is None


def test_the_supports_travel_in_the_optimiser_state():
    result, keep = pruned()
    state = fh.keep_sparse(optax.adam(0.1), keep).init(result.params)
    np.testing.assert_array_equal(optax.tree.get(state, "keep")["w"], keep["w"])


def test_misfits_are_refused_with_the_leaf():
    result, keep = pruned()
    with pytest.raises(ValueError, match="another tree structure"):
        fh.keep_sparse(optax.sgd(0.1), {"w": keep["w"]}).init(result.params)
    bad = {**keep, "w": keep["w"].T}
    with pytest.raises(ValueError, match=r"w: keep is bool\[8, 16\], expected bool"):
        fh.keep_sparse(optax.sgd(0.1), bad).init(result.params)
    tx = fh.keep_sparse(optax.sgd(0.1), keep)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(result.params, tx.init(result.params))
