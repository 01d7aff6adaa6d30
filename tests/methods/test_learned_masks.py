"""What the papers of MaskLLM, MaskPro and ProxSparse claim, on one layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from bench.masks import layer_of, learn, lost
from flexhinm_jax.ops import masks, prox
from tests.cases import stats, weight
from tests.compiled import decide, solve

KEY = jax.random.key(0)


def solved(method, w=None):
    w = weight() if w is None else w
    return solve(method, KEY, w, stats(inputs=w.shape[1], outputs=w.shape[0]))


@pytest.mark.parametrize("name", ["MaskLLM", "MaskPro"])
def test_the_start_is_the_mask_of_the_prior(name):
    method = getattr(fh, name)(fh.NM(2, 4), scores=fh.RIA())
    want = solve(fh.RIA(fh.NM(2, 4)), KEY, weight(), stats()).fixed["support"].keep
    plan = decide(method, solved(method), weight())
    np.testing.assert_array_equal(plan.support.keep, want)


def test_samples_of_maskllm_keep_n_in_every_group_of_a_permuted_pattern():
    method = fh.MaskLLM(fh.FlexHiNM(8, permute=None))
    state = solve(method, KEY, weight(), stats(), sparsity=0.6)
    ones = jnp.ones_like(weight())
    mask = decide(method, state, ones, key=KEY).weight
    hard = decide(method, state, ones).weight
    np.testing.assert_allclose(mask.sum(1), hard.sum(1), atol=1e-4)
    assert 0 < float(jnp.mean((mask > 0.01) & (mask < 0.99))) < 1


def test_only_logits_have_gradients_that_reach_the_loss():
    method = fh.MaskLLM()
    state = solved(method)

    def loss(logits, w):
        now = dataclasses.replace(state, learned={"logits": logits})
        return jnp.sum(jnp.square(decide(method, now, w, key=KEY).weight))

    grad = jax.grad(loss)(state.learned["logits"], weight())
    assert float(jnp.abs(grad).max()) > 0
    assert method.frozen_weights


def test_weights_as_parameters_take_two_thirds_of_the_memory():
    sizes = [
        solved(fh.MaskLLM(parameters=p)).learned["logits"].size
        for p in ("patterns", "weights")
    ]
    assert sizes == [weight().size // 4 * 6, weight().size]


def test_learned_masks_reconstruct_better_than_magnitude_and_wanda():
    w, s = layer_of(0)  # that of the published comparison, correlated inputs
    found = {}
    for method in (fh.Magnitude(), fh.Wanda()):
        plan = decide(method, solve(method, KEY, w, s), w)
        found[type(method).__name__] = float(lost(w, plan.weight, s.gram))
    learned = float(learn(fh.MaskLLM(reward=0.0), 600, KEY, w, s))
    assert learned < 0.85 * found["Wanda"] < found["Magnitude"]


def test_the_score_of_maskpro_is_the_gradient_of_the_log_probability():
    method = fh.MaskPro(start=0.5)
    state = solved(method)

    def log_prob(logits):
        now = dataclasses.replace(state, learned={"logits": logits})
        return method.log_prob(now, key=KEY)

    logits = state.learned["logits"]
    mask = decide(method, state, jnp.ones_like(weight()), key=KEY).weight
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(mask.reshape(16, -1, 4).sum(-1), 2)
    grad = jax.grad(log_prob)(logits)
    drawn = mask.reshape(grad.shape) > 0
    assert bool(jnp.all(jnp.where(drawn, grad, 1) > 0))
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-5)


def test_maskpro_refuses_draws_that_it_cannot_sum():
    with pytest.raises(ValueError, match="stops at n=6"):
        fh.MaskPro(fh.NM(8, 16))


def test_without_gradients_proxsparse_is_magnitude_and_restores_the_weights():
    method = fh.ProxSparse(strength=0.3)
    w = weight()
    state = solved(method)
    for _ in range(30):
        state = method.constrain(state)
    assert float(method.metrics(state)["sparse_groups"]) > 0.9
    plan = decide(method, state, w)
    want = jnp.where(masks.n_of_m(jnp.abs(w), n=2, m=4), w, 0)
    np.testing.assert_array_equal(plan.weight, want)
    moved = decide(method, state, w, key=KEY).weight
    groups = list(jnp.moveaxis(jnp.abs(moved.reshape(-1, 4)), -1, 0))
    assert float(prox.regularizer(groups).max()) < 1


def test_scaling_the_weights_changes_no_mask_of_proxsparse():
    method, small = fh.ProxSparse(strength=0.3), weight() * 0.01
    a, b = solved(method), solved(method, small)
    for _ in range(5):
        a, b = method.constrain(a), method.constrain(b)
    np.testing.assert_allclose(
        a.learned["weight"] * 0.01, b.learned["weight"], atol=1e-6
    )


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        fh.MaskLLM(temperature=(4.0, 0.0))
    with pytest.raises(ValueError, match="scale"):
        fh.MaskLLM(scale=(0.0, 5.0))
    with pytest.raises(ValueError, match="works with NM"):
        fh.ProxSparse(fh.NM(1, 4))
