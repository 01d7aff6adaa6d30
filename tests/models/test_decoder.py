"""The decoder equals an independent NumPy forward and never looks ahead."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import decoder
from flexhinm_jax.models.decoder import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    head_dim=8,
    initializer_range=0.3,
)
TOKENS = np.array([[3, 18, 0, 7, 7, 1], [2, 2, 5, 9, 11, 4]], np.int32)


def by_hand(params, tokens, config):
    """One sequence, one head and one position at a time, float64, complex rotations."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    size, group = (
        config.head_size,
        config.num_attention_heads // config.num_key_value_heads,
    )

    def norm(x, name):
        rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + config.rms_norm_eps)
        return x / rms * p[name]

    def turn(x, position):
        wave = config.rope_theta ** (-2.0 * np.arange(size // 2) / size)
        z = (x[: size // 2] + 1j * x[size // 2 :]) * np.exp(1j * position * wave)
        return np.concatenate([z.real, z.imag])

    x = p["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (y @ p[f"{at}self_attn.{n}_proj.weight"].T for n in "qkv")
        mixed = np.zeros_like(q)
        for head in range(config.num_attention_heads):
            mine = slice(head * size, (head + 1) * size)
            theirs = slice(head // group * size, (head // group + 1) * size)
            for i in range(len(tokens)):
                logits = np.array(
                    [turn(q[i, mine], i) @ turn(k[j, theirs], j) for j in range(i + 1)]
                )
                weights = np.exp(logits / np.sqrt(size))
                mixed[i, mine] = weights @ v[: i + 1, theirs] / weights.sum()
        x = x + mixed @ p[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = y @ p[at + "mlp.gate_proj.weight"].T
        up = y @ p[at + "mlp.up_proj.weight"].T
        x = x + gate / (1 + np.exp(-gate)) * up @ p[at + "mlp.down_proj.weight"].T
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


@functools.partial(jax.jit, static_argnums=2)
def run(params, tokens, config):
    return decoder.apply(params, tokens, config)


@pytest.mark.parametrize("tied", [False, True])
def test_it_equals_a_forward_written_by_hand(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = decoder.init(jax.random.key(0), config)
    scale = jax.random.normal(jax.random.key(1), (24,), jnp.float32)
    params["model.layers.1.input_layernorm.weight"] = 1 + 0.3 * scale
    got = run(params, TOKENS, config)
    want = np.stack([by_hand(params, row, config) for row in TOKENS])
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


def test_a_logit_does_not_depend_on_later_tokens():
    params = decoder.init(jax.random.key(0), CONFIG)
    changed = TOKENS.copy()
    changed[:, 4:] = 17
    a, b = run(params, TOKENS, CONFIG), run(params, changed, CONFIG)
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3


def test_every_matrix_but_the_token_table_can_be_pruned():
    params = decoder.init(jax.random.key(0), CONFIG)
    apply_fn = functools.partial(decoder.apply, config=CONFIG)
    uses = fh.discover(apply_fn, params, TOKENS)
    matrices = {
        name for name, shape in decoder.shapes(CONFIG).items() if len(shape) > 1
    }
    assert set(uses.leaves) == matrices - {"model.embed_tokens.weight"}


def test_bfloat16_parameters_give_bfloat16_logits():
    params = decoder.init(jax.random.key(0), CONFIG, jnp.bfloat16)
    assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.eval_shape(
        functools.partial(decoder.apply, config=CONFIG), params, TOKENS
    )
    assert logits.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of"),
        ({"head_dim": 7}, "heads of 7 channels; rotary positions need an even"),
        ({"head_dim": None, "hidden_size": 26}, "hidden_size=26 is not a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer > 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a number > 0"),
        ({"rope_theta": True}, "rope_theta must be a number > 0, got True"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("value", [-1, 1.5, True, "full_attention", {"a": 1}])
def test_layer_types_must_be_a_list(value):
    given = dataclasses.asdict(CONFIG) | {"model_type": "qwen2", "layer_types": value}
    with pytest.raises(ValueError, match="layer_types must be a list of names"):
        decoder.DecoderConfig.from_dict(given)


def test_parameters_of_another_configuration_are_refused():
    params = decoder.init(jax.random.key(0), CONFIG)
    wider = dataclasses.replace(CONFIG, intermediate_size=48)
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \(40, 24\)"):
        decoder.apply(params, TOKENS, wider)
    del params["lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        decoder.apply(params, TOKENS, CONFIG)
