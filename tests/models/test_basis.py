"""A decoder in another basis is the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.models import decoder
from flexhinm_jax.models.basis import Basis, change
from flexhinm_jax.models.decoder_config import DecoderConfig
from tests.models import decoder_cases

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
NAMES = ("LLAMA", "QWEN2", "QWEN3", "SMOLLM3", "GEMMA3", "MIXTRAL", "QWEN3_MOE")


def model(name):
    config = DecoderConfig.from_dict(getattr(decoder_cases, name))
    params = decoder.init(jax.random.key(0), config)
    keys = iter(jax.random.split(jax.random.key(1), len(params)))
    # Norms and biases away from their neutral values.
    params = {
        k: 3 * x if x.ndim > 1 else x + 0.3 * jax.random.normal(next(keys), x.shape)
        for k, x in params.items()
    }
    return params, config


def orders(key, *shape):
    """Random orders, and a rotation for each."""
    at = jnp.argsort(jax.random.uniform(key, shape), axis=-1).astype(jnp.int32)
    turn = jnp.linalg.qr(jax.random.normal(key, (*shape, shape[-1])))[0]
    return at, turn


def same(params, config, basis, tolerance):
    changed, other = change(params, config, basis)
    decoder.check({k: tuple(x.shape) for k, x in changed.items()}, other)
    want = decoder.apply(params, TOKENS, config)
    got = decoder.apply(changed, TOKENS, other)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(want.std()))
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_orders_give_the_same_function_in_every_family(name):
    params, config = model(name)
    keys = iter(jax.random.split(jax.random.key(2), 3))
    layers, inner = config.num_hidden_layers, config.intermediate_size
    basis = Basis(
        stream=orders(next(keys), config.hidden_size)[0],
        heads=orders(next(keys), layers, config.num_key_value_heads, config.head_size)[
            0
        ],
        inner=None if config.experts else orders(next(keys), layers, inner)[0],
    )
    changed = same(params, config, basis, 1e-5)
    # Orders move numbers, they make no new ones.
    for key, leaf in changed.items():
        np.testing.assert_array_equal(np.sort(leaf, None), np.sort(params[key], None))
    one, other = (
        params["model.embed_tokens.weight"],
        changed["model.embed_tokens.weight"],
    )
    np.testing.assert_array_equal(other, one[:, basis.stream])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "GEMMA3"])
def test_rotations_give_the_same_function_and_untie_the_head(name):
    params, config = model(name)
    one, other = jax.random.split(jax.random.key(3))
    layers, size = config.num_hidden_layers, config.head_size
    basis = Basis(
        stream=orders(one, config.hidden_size)[1],
        heads=orders(other, layers, config.num_key_value_heads, size)[1],
    )
    changed = same(params, config, basis, 1e-4)
    assert "lm_head.weight" in changed
    unit = 0.0 if config.norm_offset else 1.0
    assert float(jnp.abs(changed["model.norm.weight"] - unit).max()) == 0
    assert (
        float(
            jnp.abs(
                changed["model.embed_tokens.weight"]
                - params["model.embed_tokens.weight"]
            ).max()
        )
        > 0.1
    )


def test_heads_of_sandwiched_norms_turn_but_their_stream_does_not():
    params, config = model("GEMMA3")
    layers, size = config.num_hidden_layers, config.head_size
    heads = orders(jax.random.key(4), layers, config.num_key_value_heads, size)[1]
    same(params, config, Basis(heads=heads), 1e-4)
    stream = orders(jax.random.key(4), config.hidden_size)[1]
    with pytest.raises(ValueError, match="cannot be absorbed; give an order"):
        change(params, config, Basis(stream=stream))


@pytest.mark.parametrize("field", ["stream", "heads", "inner"])
def test_a_basis_of_another_size_is_refused_by_name(field):
    params, config = model("LLAMA")
    basis = Basis(**{field: jnp.zeros((3,), jnp.int32)})
    with pytest.raises(ValueError, match=rf"{field} has shape \[3\]; this model needs"):
        change(params, config, basis)
