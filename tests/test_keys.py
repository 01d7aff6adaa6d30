"""A raw key (`jax.random.PRNGKey`) does what the typed key of the same words does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods import METHODS
from flexhinm_jax.models import decoder, generation
from flexhinm_jax.models.decoder_config import DecoderConfig
from tests.cases import MORE_PATTERNS, PATTERNS, stats, targets, weight
from tests.training import program

RAW, TYPED = jax.random.PRNGKey(11), jax.random.key(11)


def model(params, x):
    hidden = jnp.einsum("sbi,sio->sbo", jnp.stack([x, x]), params["stacked"])
    return jnp.tanh(hidden.sum(0)) @ params["out"]


def inputs():
    return jax.random.normal(jax.random.key(1), (32, 16))


def weights():
    keys = jax.random.split(jax.random.key(2), 2)
    return {
        "stacked": jax.random.normal(keys[0], (2, 16, 8)),
        "out": jax.random.normal(keys[1], (8, 16)),
    }


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_traces_alike_over_a_stack(name):
    patterns = PATTERNS | MORE_PATTERNS
    pattern = next(p for p in patterns.values() if METHODS[name].fits(p))
    method, target = METHODS[name](pattern), targets(pattern)[0]
    ws, facts = jnp.stack([weight(0), weight(1)]), stats()

    def run(keys):
        def one(key, w):
            state = method.solve(key, w, facts, sparsity=jnp.float32(target))
            return state, method.decide(state, w, key=key)

        return jax.vmap(one)(keys, ws)

    raw, typed = (jax.eval_shape(run, jax.random.split(k, 2)) for k in (RAW, TYPED))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), raw) == jax.tree.map(
        lambda x: (x.shape, x.dtype), typed
    )


def test_solving_a_stack_and_sampling_it():
    params, x = weights(), inputs()
    uses = fh.discover(model, params, x)
    assert uses.leaves["stacked"].layout.stack_shape == (2,)
    method = fh.HardConcrete(fh.FlexHiNM(8, permute=fh.RandomRows()))
    want = fh.solve(method, TYPED, params, uses, None, 0.5)
    sampled = fh.decide(method, want, params, uses, TYPED)
    for key in (RAW, np.asarray(RAW)):
        assert_same(fh.solve(method, key, params, uses, None, 0.5), want)
        assert_same(fh.decide(method, want, params, uses, key), sampled)


def test_pruning_at_once_and_in_order(tmp_path):
    params, x = weights(), inputs()
    method = fh.Wanda(fh.NM(2, 4, permute=fh.ChannelSearch()))
    run = functools.partial(fh.prune, model, params, [x], method, share_orders=True)
    assert_same(run(key=RAW).params, run(key=TYPED).params)
    run = functools.partial(fh.prune_sequential, model, params, [x], method)
    want = run(key=TYPED, resume=tmp_path)
    assert_same(run(key=RAW, resume=tmp_path).params, want.params)
    assert_same(run(key=RAW).params, want.params)


def test_a_training_step_traces_alike():
    params, x = weights(), inputs()
    uses = fh.discover(model, params, x)
    method, tx = fh.HardConcrete(fh.FlexHiNM(8, permute=None)), optax.adam(0.1)
    states = fh.solve(method, TYPED, params, uses, None, 0.5)
    step = fh.make_step(method, lambda p, x: jnp.mean(model(p, x) ** 2), tx, uses)

    def shapes(key):
        start = fh.init_training(method, params, uses, states, tx, key=key)
        after, metrics = jax.eval_shape(step, start, x)
        assert after.key.shape == key.shape and after.key.dtype == key.dtype
        rest = dataclasses.replace(after, key=None), metrics
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), rest)

    assert shapes(RAW) == shapes(TYPED)


@pytest.mark.slow
def test_a_gradual_run_and_its_checkpoints(tmp_path):
    stages = [fh.Stage(0.5, 2), fh.Stage(0.75, 2)]
    want = program.make(stages=stages, key=TYPED)
    list(want)
    first = program.make(tmp_path, stages=stages, key=RAW)
    next(iter(first))
    resumed = program.make(tmp_path, True, stages=stages, key=RAW)
    list(resumed)
    assert_same(program.outcome(resumed)["p/in"], program.outcome(want)["p/in"])


@pytest.mark.slow
def test_a_fit_and_a_net_for_the_whole_model(tmp_path):
    params, x = weights(), inputs()
    uses = fh.discover(model, params, x)
    facts = fh.calibrate(model, params, uses, [x])
    method = fh.MaskLLM(fh.NM(2, 4))
    states = fh.solve(method, TYPED, params, uses, facts)
    fit = functools.partial(
        *(fh.fit, method, states, fh.objectives.output_error(model, params)),
        *(params, uses, [(x,)]),
        tx=optax.adam(0.1),
        steps=2,
    )
    want = fit(key=TYPED)[0]
    assert_same(fit(key=RAW, checkpoints=tmp_path)[0], want)
    assert_same(fit(key=RAW, checkpoints=tmp_path, resume=True)[0], want)
    net = fh.HyperPrune(fh.Wanda(fh.NM(2, 4)), steps=4)
    want = fh.hyper_prune(net, TYPED, params, uses, facts)
    assert_same(fh.hyper_prune(net, RAW, params, uses, facts).states, want.states)


def test_fresh_models_and_drawn_tokens():
    config = DecoderConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    params = decoder.init(TYPED, config)
    assert_same(decoder.init(RAW, config), params)
    prompt = jnp.array([[3, 5]], jnp.int32)
    draw = functools.partial(
        generation.generate, params, prompt, config, steps=2, temperature=1.0
    )
    assert_same(draw(key=RAW).tokens, draw(key=TYPED).tokens)
