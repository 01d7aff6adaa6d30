"""Every family gives the numbers of `transformers` and reads its `config.json`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import decoder, generation, rope
from flexhinm_jax.models.decoder import DecoderConfig
from tests.models import decoder_cases, directories
from tests.models.decoder_cases import (
    CASES,
    GEMMA3,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
)

TOKENS = jnp.asarray(decoder_cases.TOKENS, jnp.int32)
GOLDEN = decoder_cases.golden()


@functools.cache
def case(name):
    config = DecoderConfig.from_dict(CASES[name])
    return config, directories.random_params(config)


@functools.cache
def logits(name):
    config, params = case(name)
    # Not jitted: the operations of one case are compiled for all.
    return np.asarray(decoder.apply(params, TOKENS, config)[0])


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    want = np.array(GOLDEN[name]["logits"])
    np.testing.assert_allclose(logits(name), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"dynamic"}))
def test_the_likeliest_continuation_is_that_of_transformers(name):
    config, params = case(name)
    new = np.array(GOLDEN[name]["tokens"])
    tokens = np.concatenate([decoder_cases.TOKENS[0, : decoder_cases.PROMPT], new])
    found = decoder.apply(params, jnp.asarray(tokens[None], jnp.int32), config)[0]
    # Each is the likeliest behind those before it, so the text is the greedy one.
    likeliest = np.argmax(found, -1)[decoder_cases.PROMPT - 1 : -1]
    np.testing.assert_array_equal(likeliest, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_generation_continues_as_transformers_does(name):
    config, params = case(name)
    prompt, steps = TOKENS[:, : decoder_cases.PROMPT], decoder_cases.steps(CASES[name])
    made = generation.generate(params, prompt, config, steps=steps)
    assert made.tokens[0].tolist() == GOLDEN[name]["tokens"]


@pytest.mark.parametrize("name", ["llama 2", "qwen3 with biases"])
def test_float16_says_compiled_what_float32_says(name):
    config, params = case(name)
    half = {key: jnp.asarray(x, jnp.float16) for key, x in params.items()}
    run = jax.jit(functools.partial(decoder.apply, config=config))
    found = run(half, TOKENS)[0]
    assert found.dtype == jnp.float16
    want = jax.nn.log_softmax(logits(name))
    other = jax.nn.log_softmax(found.astype(jnp.float32))
    divergence = jnp.sum(jnp.exp(want) * (want - other), -1)
    assert 0 < divergence.max() < 1e-3


def test_float16_continues_with_the_likeliest_tokens():
    config, params = case("llama 2")
    half = {key: jnp.asarray(x, jnp.float16) for key, x in params.items()}
    prompt = TOKENS[:, : decoder_cases.PROMPT]
    run = functools.partial(generation.generate, config=config, steps=4)
    new = jax.jit(run)(half, prompt).tokens
    whole = jax.jit(functools.partial(decoder.apply, config=config))
    found = whole(half, jnp.concatenate([prompt, new], 1))[0, prompt.shape[1] - 1 : -1]
    taken = jnp.take_along_axis(found, new[0][:, None], -1)[:, 0]
    # Rounding may swap tokens whose logits are within a few steps of float16.
    assert jnp.max(found.max(-1) - taken) < 0.05


@pytest.mark.parametrize("name", ["llama 3", "linear", "dynamic", "yarn"])
def test_a_scaling_shows_in_the_logits(name):
    config, params = case(name)
    plain = dataclasses.replace(config, rope_scaling=None)
    other = decoder.apply(params, TOKENS, plain)[0]
    assert np.abs(other - logits(name)).max() > 0.05


@pytest.mark.parametrize("name", ["llama with biases", "qwen2", "qwen3"])
def test_biases_and_norms_of_a_family_are_read(name):
    config, params = case(name)
    vectors = [k for k, x in params.items() if x.ndim == 1 and "layers.1" in k]
    count = {"llama with biases": 9, "qwen2": 5, "qwen3": 4}[name]
    assert len(vectors) == count
    for key in vectors:
        # k_proj.bias only moves logits through positions, so the effect may be small.
        moved = params | {key: params[key] + 0.5}
        other = decoder.apply(moved, TOKENS, config)[0]
        assert np.abs(other - logits(name)).max() > 1e-2, key


@pytest.mark.parametrize("name", ["qwen2", "qwen3 with biases"])
def test_blocks_compose_to_the_whole_and_read_only_their_keys(name):
    config, params = case(name)
    h = decoder.embed(
        {k: params[k] for k in ["model.embed_tokens.weight"]}, TOKENS, config
    )
    for layer in range(config.num_hidden_layers):
        at = decoder.block_prefix(layer)
        own = {k: params[at + k] for k in decoder.block_shapes(config)}
        h = decoder.block(own, h, config)
    last = ["model.norm.weight"]
    last += ["model.embed_tokens.weight" if name == "qwen2" else "lm_head.weight"]
    got = decoder.head({k: params[k] for k in last}, h, config)[0]
    np.testing.assert_array_equal(got, logits(name))


def test_a_stray_bias_is_not_read():
    config, params = case("llama 2")
    stray = {"model.layers.0.self_attn.o_proj.bias": np.ones(32, np.float32)}
    got = decoder.apply(params | stray, TOKENS, config)[0]
    np.testing.assert_array_equal(got, logits("llama 2"))


def test_every_matrix_of_a_block_can_be_pruned():
    config, params = case("qwen3 with biases")
    own = decoder.block_params(params, 0)
    h = jnp.zeros((1, 4, 32), jnp.float32)
    uses = fh.discover(functools.partial(decoder.block, config=config), own, h)
    assert set(uses.leaves) == {k for k, x in own.items() if x.ndim == 2}


def test_a_tied_head_is_left_alone():
    config, params = case("qwen2")
    uses = fh.discover(functools.partial(decoder.apply, config=config), params, TOKENS)
    assert "tied" in uses.skipped["model.embed_tokens.weight"]


def test_what_a_file_leaves_out_means_what_it_means_to_transformers():
    def left_out(config, *names):
        return DecoderConfig.from_dict(
            {k: v for k, v in config.items() if k not in names}
        )

    assert left_out(QWEN3, "head_dim").head_size == 128
    assert left_out(QWEN2).head_size == 8
    assert left_out(LLAMA, "num_key_value_heads").num_key_value_heads == 4
    assert left_out(LLAMA, "max_position_embeddings").max_position_embeddings == 2048
    assert left_out(QWEN2, "rope_theta").rope_theta == 10_000
    assert not left_out(QWEN2).tie_word_embeddings
    nulls = LLAMA | {
        "head_dim": None,
        "num_key_value_heads": None,
        "rope_scaling": None,
    }
    assert DecoderConfig.from_dict(nulls).num_key_value_heads == 4
    # Qwen2 has its biases whatever the file says, and none behind attention.
    biased = DecoderConfig.from_dict(QWEN2 | {"attention_bias": False})
    assert biased.attention_bias and not biased.attention_output_bias


def test_both_forms_of_rotary_settings_are_read():
    stretched = {"rope_type": "linear", "factor": 2.0}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": stretched}
    new = LLAMA | {"rope_parameters": stretched | {"rope_theta": 5e5}}
    assert DecoderConfig.from_dict(old) == DecoderConfig.from_dict(new)
    assert DecoderConfig.from_dict(new).rope_scaling == rope.Linear(factor=2.0)


def stretched(**values):
    return {"rope_scaling": values}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"model_type": "gpt2"}, "'gpt2' is not supported; supported are llama"),
        (LLAMA, {"model_type": "qwen2_moe"}, "model_type='qwen2_moe'"),
        (LLAMA, {"model_type": ["llama"]}, "model_type=.'llama'. is not supported"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing from the configuration"),
        (LLAMA, {"vocab_size": None}, "vocab_size is missing"),
        (LLAMA, {"hidden_size": "32"}, "hidden_size must be an integer > 0, got '32'"),
        (LLAMA, {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            LLAMA,
            {"num_local_experts": 8},
            "num_local_experts=8: llama has no mixture of",
        ),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantised weights are not"),
        (LLAMA, stretched(type="su"), "rope_scaling: rope_type='su' is not supported"),
        (LLAMA, stretched(type="linear"), "factor is missing for linear"),
        (LLAMA, stretched(type="linear", factor=0.5), "factor must be a number >= 1"),
        (LLAMA, {"rope_scaling": 2}, "rope_scaling=2 must be an object"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "differs between layers"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
        (QWEN3, {"layer_types": ["sliding_attention"]}, "each of the 2 layers; got"),
        (QWEN3, {"layer_types": ["chunked"] * 2}, "got .'chunked', 'chunked'."),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is"),
        (GEMMA3, {"hidden_activation": "silu"}, "hidden_activation='silu' is not"),
        (GEMMA3, {"use_bidirectional_attention": True}, "supported is causal"),
        (QWEN3_MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict(config | change)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (MISTRAL, {"sliding_window": 32}),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 2}),
        (QWEN2, {"attention_dropout": 0.1, "use_cache": False}),
        (LLAMA, {"rope_scaling": {"type": "default"}}),
    ],
)
def test_a_setting_without_effect_is_accepted(config, change):
    DecoderConfig.from_dict(config | change)


def test_missing_and_unknown_tensors_are_named():
    config, params = case("qwen2")
    found = {name: leaf.shape for name, leaf in params.items()}
    # What other writers add is not an error: a stored tied head, old rotary tables.
    stored = {"lm_head.weight": (19, 32)}
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    decoder.check(found | stored | table, config)
    del found["model.layers.1.mlp.up_proj.weight"]
    found["model.layers.2.mlp.up_proj.weight"] = (48, 32)
    with pytest.raises(ValueError, match=r"missing model.layers.1.mlp.up_proj.weight"):
        decoder.check(found, config)
    with pytest.raises(ValueError, match=r"not known model.layers.2.mlp.up_proj"):
        decoder.check(found, config)
    del found["model.layers.2.mlp.up_proj.weight"]
    found["model.layers.1.mlp.up_proj.weight"] = (32, 48)
    with pytest.raises(
        ValueError, match=r"\(32, 48\), the configuration gives \(48, 32"
    ):
        decoder.check(found, config)
