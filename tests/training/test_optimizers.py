import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training.optimizers import KeepSparseState

KEY = jax.random.key(0)
INNER = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clipped lion": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)),
    "adafactor": optax.adafactor(0.1),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1, weight_decay=0.1),
    "madgrad": optax.contrib.madgrad(0.1),
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
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
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


def test_what_an_optimiser_remembers_of_the_weights_has_zeros_too():
    _, keep = pruned()
    tx = fh.keep_sparse(INNER["schedule-free"], keep)
    dense = make()
    params, state = train(tx, dense, tx.init(dense), 3)
    averaged = optax.contrib.schedule_free_eval_params(state.inner, params)
    np.testing.assert_array_equal(averaged["w"] == 0, ~keep["w"])
    assert jnp.all(state.inner.base_optimizer_state[0].nu["w"][~keep["w"]] == 0)
    smaller = {**keep, "w": keep["w"] & (jnp.arange(8) < 4)}
    params, state = train(tx, params, state.under(smaller), 1)
    averaged = optax.contrib.schedule_free_eval_params(state.inner, params)
    np.testing.assert_array_equal(averaged["w"] == 0, ~smaller["w"])


def test_fast_and_slow_parameters_stay_zero():
    result, keep = pruned()
    tx = fh.keep_sparse(optax.lookahead(optax.adam(0.1), 2, 0.5), keep)
    both = optax.LookaheadParams(make(), jax.tree.map(jnp.copy, make()))
    state = tx.init(both)
    for _ in range(3):
        grads = jax.grad(loss)(both.fast, jnp.ones((4, 16)))
        updates, state = tx.update(grads, state, both)
        both = optax.apply_updates(both, updates)
    for params in both:
        np.testing.assert_array_equal(params["w"] == 0, ~keep["w"])
        assert jnp.any(params["v"] != result.params["v"])


def test_supports_and_plans_survive_a_step_that_is_donated_the_state():
    def apply_fn(params, x):
        return x @ params["w"].T

    params, x = {"w": jax.random.normal(KEY, (8, 8))}, jnp.ones((4, 8))
    found = fh.prune(apply_fn, params, [x], fh.Magnitude(fh.NM(2, 4)), key=KEY)
    keep = fh.keep_tree(found.plans, found.params, found.uses)
    tx = fh.keep_sparse(INNER["schedule-free"], keep)
    state = tx.init(found.params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    now = state.under(keep)
    step({"w": jnp.copy(found.params["w"])}, now)
    assert now.inner.z["w"].is_deleted()
    for tree in (keep, found.plans, found.params, params):
        assert not any(x.is_deleted() for x in jax.tree.leaves(tree))


def partitioned():
    """An Equinox model with None where there is no array, pruned."""
    model = eqx.nn.MLP(8, 4, width_size=8, depth=1, use_bias=False, key=KEY)
    params, static = eqx.partition(model, eqx.is_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = jax.random.normal(KEY, (16, 8))
    rules = {"layers/1": "skip"}
    method = fh.Magnitude(fh.NM(2, 4))
    found = fh.prune(apply_fn, params, [x], method, key=KEY, rules=rules)
    assert None in jax.tree.leaves(params, is_leaf=lambda leaf: leaf is None)
    return found, lambda p: jnp.mean(apply_fn(p, x) ** 2)


@pytest.mark.parametrize("kind", ["plans", "zeros"])
def test_trees_with_none_in_place_of_leaves_keep_their_zeros(kind):
    found, loss_fn = partitioned()
    if kind == "plans":
        keep = fh.keep_tree(found.plans, found.params, found.uses)
    else:
        keep = fh.keep_from_zeros(found.params, found.uses)
    tx = fh.keep_sparse(optax.adamw(0.1), keep)
    state = tx.init(found.params)
    updates, state = tx.update(jax.grad(loss_fn)(found.params), state, found.params)
    params = optax.apply_updates(found.params, updates)
    first, second = params.layers
    assert jnp.all((first.weight == 0) == ~keep.layers[0].weight)
    assert jnp.all(
        first.weight != found.params.layers[0].weight, where=first.weight != 0
    )
    assert keep.layers[1].weight is None and jnp.all(second.weight != 0)
    with pytest.raises(ValueError, match="keep is bool.*, expected None"):
        bad = eqx.tree_at(
            lambda t: t.layers[0].bias,
            keep,
            jnp.ones(8, bool),
            is_leaf=lambda leaf: leaf is None,
        )
        tx = fh.keep_sparse(optax.sgd(0.1), bad)
        tx.init(found.params)


def test_a_leaf_without_a_gradient_loses_its_pruned_weights_and_nothing_else():
    _, keep = pruned()
    params, tx = make(), fh.keep_sparse(optax.sgd(0.1), keep)
    grads = {"w": None, "b": jnp.ones(8), "v": None}
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(
        params, jax.tree.map(lambda p, u: 0 * p if u is None else u, params, updates)
    )
    np.testing.assert_array_equal(moved["w"], jnp.where(keep["w"], params["w"], 0))
    np.testing.assert_array_equal(moved["v"], params["v"])


def test_momentum_from_dense_steps_cannot_revive_a_weight():
    params, tx = make(), optax.adamw(0.1)
    params, dense_state = train(tx, params, tx.init(params), 3)
    keep = {"w": params["w"] > 0, "b": None, "v": None}
    wrapped = fh.keep_sparse(tx, keep)
    params, _ = train(
        wrapped, params, KeepSparseState(None, dense_state).under(keep), 7
    )
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


@pytest.mark.parametrize(
    "around",
    [
        lambda tx, own: optax.masked(tx, own),
        lambda tx, own: optax.multi_transform({True: tx, False: optax.sgd(0.1)}, own),
    ],
    ids=["masked", "multi_transform"],
)
def test_a_transformation_around_it_that_hides_leaves_is_refused(around):
    result, keep = pruned()
    own = {name: name == "w" for name in result.params}
    tx = around(fh.keep_sparse(optax.sgd(0.1), keep), own)
    with pytest.raises(ValueError, match="keep_sparse outermost"):
        tx.init(result.params)
    inside = fh.keep_sparse(optax.adam(0.1), keep)
    with pytest.raises(ValueError, match="keep_sparse outermost"):
        hidden = {**result.params, "b": optax.MaskedNode()}
        inside.update(hidden, inside.init(result.params), result.params)
    outermost = fh.keep_sparse(around(optax.sgd(0.1), own), keep)
    outermost.update(result.params, outermost.init(result.params), result.params)
