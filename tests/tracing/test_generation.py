"""A decoder generates token by token from packed weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.models import decoder

CONFIG = decoder.DecoderConfig(
    vocab_size=16,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    initializer_range=0.3,
)


def generate(apply_fn, params, prompt, count):
    """The most likely next token, `count` times, in a buffer of fixed length."""
    length = prompt.shape[1]
    tokens = jnp.pad(prompt, ((0, 0), (0, count)))

    def step(k, tokens):
        logits = apply_fn(params, tokens)
        last = jax.lax.dynamic_index_in_dim(logits, length + k - 1, 1, keepdims=False)
        chosen = jnp.argmax(last, -1).astype(tokens.dtype)
        return tokens.at[:, length + k].set(chosen)

    return jax.lax.fori_loop(0, count, step, tokens)


@pytest.mark.parametrize("prepare", [False, True])
def test_packed_weights_generate_the_tokens_of_the_dense_ones(prepare):
    params = decoder.init(jax.random.key(0), CONFIG)
    apply_fn = lambda params, tokens: decoder.apply(params, tokens, CONFIG)  # noqa: E731
    prompt = jax.random.randint(jax.random.key(1), (2, 3), 0, 16)
    uses = fh.discover(apply_fn, params, prompt)
    method = fh.Magnitude(fh.FlexHiNM(8, permute=None))
    states = fh.solve(method, jax.random.key(2), params, uses, None, sparsity=0.6)
    plans = fh.decide(method, states, params, uses)
    packed = fh.pack(plans, params, uses)
    packed = kernels.prepare(packed) if prepare else packed
    run = lambda f, p: jax.jit(lambda p: generate(f, p, prompt, 5))(p)  # noqa: E731
    want = run(apply_fn, fh.densify(plans, params, uses))
    got = run(fh.sparsify(apply_fn), packed)
    np.testing.assert_array_equal(got, want)
    assert len(set(np.asarray(got[:, 3:]).ravel().tolist())) > 1
