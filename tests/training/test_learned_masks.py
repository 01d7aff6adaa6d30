"""MaskLLM, MaskPro, ProxSparse and Patch under a loss of the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training.fit import fit
from flexhinm_jax.training.model_gates import harden, sample

KEY = jax.random.key(0)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["c"]


def loss_fn(params, x, y):
    return jnp.mean((apply_fn(params, x) - y) ** 2) / jnp.mean(y**2)


@pytest.fixture(scope="module")
def task():
    """Two layers with strongly correlated inputs, so that masks interact."""
    keys = jax.random.split(KEY, 4)
    params = {
        n: jax.random.normal(k, (32, 32)) / 6
        for n, k in zip("ac", keys[:2], strict=True)
    }
    mix = jnp.eye(32) + 0.5 * jax.random.normal(keys[2], (32, 32))
    x = jax.random.normal(keys[3], (256, 32)) @ mix
    uses = fh.discover(apply_fn, params, x)
    stats = fh.calibrate(apply_fn, params, uses, [x])
    return params, uses, stats, [(x, apply_fn(params, x))]


@pytest.mark.parametrize(
    ("method", "tx", "steps", "gain", "sparsity"),
    [
        (fh.MaskLLM(), optax.adam(0.05), 60, 0.9, None),
        (fh.MaskLLM(parameters="weights"), optax.adam(0.05), 60, 0.9, None),
        (fh.MaskPro(start=6.0), optax.sgd(50.0), 300, 0.99, None),
        (fh.ProxSparse(strength=0.05), optax.adam(3e-3), 60, 0.98, None),
        (fh.Patch(fh.Tiles(8)), optax.adam(0.01), 60, 0.9, 0.375),
    ],
    ids=["maskllm", "maskllm-weights", "maskpro", "proxsparse", "patch"],
)
def test_learning_beats_the_one_shot_start(task, method, tx, steps, gain, sparsity):
    params, uses, stats, batches = task
    states = fh.solve(method, KEY, params, uses, stats, sparsity)
    found, history = fit(
        method, states, loss_fn, params, uses, batches,
        key=KEY, tx=tx, steps=steps, every=steps // 5,
    )  # fmt: skip
    values = [h["value"] for h in history]
    assert min(values) < gain * values[0]
    plans = fh.decide(method, found, params, uses)
    for path, plan in plans.items():
        fh.verify(plan)
        kept = jnp.where(plan.support.keep, params[path].T, 0)
        np.testing.assert_array_equal(plan.weight, kept)
    kept = sum(float(p.support.keep.sum()) for p in plans.values()) / (2 * 32 * 32)
    assert abs(kept - (1 - (sparsity or 0.5))) < 1e-6


def test_the_names_of_leaves_and_not_their_order_decide_the_sample(task):
    params, uses, stats, _ = task
    method = fh.MaskLLM()
    states = fh.solve(method, KEY, params, uses, stats)
    turned = dict(reversed(states.items()))
    first, _ = sample(method, states, params, uses, KEY)
    second, _ = sample(method, turned, params, uses, KEY)
    compiled, _ = jax.jit(lambda s: sample(method, s, params, uses, KEY))(states)
    for name in params:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], compiled[name], atol=1e-6)


def test_a_step_has_no_gradient_and_no_optimiser_for_the_weights(task):
    params, uses, stats, batches = task
    method = fh.MaskLLM()
    states = fh.solve(method, KEY, params, uses, stats)
    tx = optax.adam(0.1)
    training = fh.init_training(method, params, uses, states, None, key=KEY, mask_tx=tx)
    before = sum(x.size for x in jax.tree.leaves(training.learned_opt))
    assert training.opt_state == () and before == 2 * 2 * 32 * 8 * 6 + 1
    training, _ = fh.make_step(method, loss_fn, None, uses, mask_tx=tx)(
        training, *batches[0]
    )
    for name in params:
        np.testing.assert_array_equal(training.params[name], params[name])


def test_a_prior_that_is_not_n_of_m_is_refused_by_name(task):
    params, uses, _, _ = task
    other = fh.Magnitude(fh.NM(1, 4))
    plans = fh.decide(other, fh.solve(other, KEY, params, uses), params, uses)
    with pytest.raises(ValueError, match=r"a: the plan has groups of 1:4, MaskLLM"):
        fh.adopt(fh.MaskLLM(), plans, params, uses)
    with pytest.raises(ValueError, match="a: "):
        broken = dataclasses.replace(
            plans["a"].support, keep=plans["a"].support.keep.at[0].set(True)
        )
        plan = dataclasses.replace(plans["a"], support=broken)
        fh.adopt(fh.MaskLLM(fh.NM(1, 4)), {"a": plan}, params, uses)


def test_every_n_of_m_with_a_table_of_patterns_is_built(task):
    params, uses, stats, _ = task
    for (n, m), patterns in {(1, 4): 4, (2, 4): 6, (4, 8): 70}.items():
        method = fh.MaskLLM(fh.NM(n, m))
        states = fh.solve(method, KEY, params, uses, stats)
        shape = states["a"].learned["logits"].shape
        assert shape == (1, 32, 32 // m, patterns)


def test_hardened_samples_are_the_hard_plan(task):
    params, uses, stats, _ = task
    for method in (fh.MaskLLM(), fh.MaskPro(), fh.ProxSparse()):
        states = fh.solve(method, KEY, params, uses, stats)
        states = harden(method, states, params, uses)
        sampled, _ = sample(method, states, params, uses, KEY)
        dense = fh.densify(fh.decide(method, states, params, uses), params, uses)
        for name in params:
            np.testing.assert_allclose(sampled[name], dense[name], atol=1e-6)


def test_drawing_again_in_the_backward_pass_keeps_less_and_changes_nothing(task):
    params, uses, stats, _ = task
    method = fh.MaskLLM()
    states = fh.solve(method, KEY, params, uses, stats)
    learned = {path: state.learned for path, state in states.items()}

    def total(learned, lean):
        now = {p: dataclasses.replace(s, learned=learned[p]) for p, s in states.items()}
        drawn, terms = sample(method, now, params, uses, KEY, lean=lean)
        return sum(jnp.sum(jnp.sin(w)) for w in drawn.values()) + terms["reward"]

    found, kept = [], []
    for lean in (False, True):
        value, back = jax.vjp(lambda x: total(x, lean), learned)  # noqa: B023
        kept.append(sum(x.nbytes for x in jax.tree.leaves(back)))
        found.append((value, back(jnp.ones(()))))
    assert kept[1] < 0.75 * kept[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
