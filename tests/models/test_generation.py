"""Generation with a cache equals generation without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import decoder, generation, rope
from flexhinm_jax.models.decoder import DecoderConfig
from tests.models import directories

CONFIG = DecoderConfig(
    vocab_size=17,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    rope_theta=100.0,
    attention_bias=True,
    qk_norm=True,
    max_position_embeddings=12,
)
PARAMS = directories.random_params(CONFIG, seed=2)
PROMPT = jnp.array([[3, 16, 0, 7], [2, 2, 5, 9]], jnp.int32)
STEPS = 8


@functools.partial(jax.jit, static_argnames=("steps", "temperature", "top_k", "ends"))
def made(params, prompt, lengths, key=None, **options):
    options = {"steps": STEPS} | options
    return generation.generate(
        params, prompt, CONFIG, lengths=lengths, key=key, **options
    )


@pytest.fixture(scope="module")
def greedy():
    return np.asarray(made(PARAMS, PROMPT, np.array([4, 4], np.int32)).tokens)


@jax.jit
def whole(params, tokens):
    return decoder.apply(params, tokens, CONFIG)


def likeliest(row):
    """The likeliest token behind every token of one text of 12."""
    return np.argmax(whole(PARAMS, np.stack([row, row])), -1)[0]


def test_every_token_is_the_likeliest_after_all_before_it(greedy):
    for prompt, new in zip(np.asarray(PROMPT), greedy, strict=True):
        tokens = np.concatenate([prompt, new])
        np.testing.assert_array_equal(likeliest(tokens)[3:-1], new)
    assert len(set(greedy.ravel().tolist())) > 3


def test_prompts_padded_on_the_left_continue_as_if_alone(greedy):
    padded = PROMPT.at[0].set(jnp.array([11, 11, 3, 16], jnp.int32))
    got = np.asarray(made(PARAMS, padded, np.array([2, 4], np.int32)).tokens)
    alone = np.array([3, 16, *got[0], 0, 0], np.int32)
    np.testing.assert_array_equal(likeliest(alone)[1:9], got[0])
    np.testing.assert_array_equal(got[1], greedy[1])


def test_a_text_ends_at_its_end_token_and_is_padded_behind(greedy):
    end = int(greedy[0, 2])
    got = made(PARAMS, PROMPT, np.array([4, 4], np.int32), ends=(end, 1000))
    for row, length, before in zip(got.tokens, got.lengths, greedy, strict=True):
        hits = np.flatnonzero(before == end)
        want = hits[0] + 1 if hits.size else STEPS
        assert length == want
        np.testing.assert_array_equal(row[:want], before[:want])
        np.testing.assert_array_equal(row[want:], 0)


def test_tokens_are_drawn_with_the_probabilities_of_their_logits():
    prompt, full = jnp.tile(PROMPT[:1], (1000, 1)), np.full(1000, 4, np.int32)
    draw = functools.partial(made, PARAMS, prompt, full)
    draw = functools.partial(draw, steps=2, temperature=2.0, top_k=5)
    drawn, same, other = (
        np.asarray(draw(key=jax.random.key(k)).tokens) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(drawn, same)
    assert np.any(drawn != other) and np.any(drawn[:, 0] != drawn[:, 1])
    text = jnp.pad(PROMPT, ((0, 0), (0, 8)))
    logits = np.asarray(whole(PARAMS, text)[0, 3], np.float64)
    best = np.argsort(-logits)[:5]
    want = np.zeros(17)
    want[best] = np.exp(logits[best] / 2) / np.exp(logits[best] / 2).sum()
    found = np.bincount(drawn[:, 0], minlength=17) / 1000
    # Four standard deviations of a share of 1000 draws.
    np.testing.assert_allclose(found, want, atol=4 * 0.5 / 1000**0.5)
    assert set(np.flatnonzero(found)) <= set(best.tolist())


def test_bfloat16_weights_with_a_float32_cache_stay_near_the_whole_forward():
    params = {k: jnp.asarray(x, jnp.bfloat16) for k, x in PARAMS.items()}
    run = functools.partial(generation.generate, config=CONFIG, steps=STEPS)
    got = jax.jit(functools.partial(run, cache_dtype=jnp.float32))(params, PROMPT)
    got = got.tokens
    logits = whole(params, jnp.concatenate([PROMPT, got], 1)).astype(jnp.float32)
    logits = logits[:, 3:-1]
    taken = jnp.take_along_axis(logits, got[..., None], -1)[..., 0]
    # Rounding may swap tokens whose logits are within a few bfloat16 steps.
    assert jnp.max(logits.max(-1) - taken) < 0.1


def test_packed_weights_generate_the_tokens_of_the_dense_ones():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_key_value_heads=4)
    params = directories.random_params(config)
    apply_fn = functools.partial(decoder.apply, config=config)
    uses = fh.discover(apply_fn, params, PROMPT, rules={"lm_head|[kvo]_proj": "skip"})
    method = fh.Magnitude(fh.NM(2, 4))
    states = fh.solve(method, jax.random.key(2), params, uses, None, sparsity=0.5)
    plans = fh.decide(method, states, params, uses)
    packed = fh.pack(plans, params, uses)
    run = functools.partial(generation.generate, config=config, steps=STEPS)
    want = jax.jit(run)(fh.densify(plans, params, uses), PROMPT).tokens
    got = jax.jit(fh.sparsify(run))(packed, PROMPT).tokens
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 9}, "prompt of 4 tokens and 9 new ones are more than max_position"),
        ({"steps": 0}, "steps must be an integer > 0, got 0"),
        ({"temperature": -1.0}, "temperature=-1.0: need a number of at least 0"),
        ({"temperature": 1.0}, "temperature=1.0 draws tokens: give a key"),
        ({"top_k": 3}, "top_k=3 has no use at temperature 0"),
        (
            {"temperature": 1.0, "top_k": 18, "key": jax.random.key(0)},
            "top_k=18 must be between 1 and vocab_size=17",
        ),
        ({"prompt": PROMPT[:, :0]}, r"the prompt has shape \(2, 0\)"),
        ({"prompt": PROMPT[0]}, r"the prompt has shape \(4,\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    options = {"prompt": PROMPT, "steps": 4} | options
    with pytest.raises(ValueError, match=message):
        generation.generate(PARAMS, config=CONFIG, **options)


def test_dynamic_positions_beyond_the_trained_length_are_refused():
    config = dataclasses.replace(
        CONFIG,
        max_position_embeddings=None,
        rope_scaling=rope.Dynamic(factor=2.0, trained=8),
    )
    with pytest.raises(ValueError, match="12 tokens are more than trained=8"):
        generation.generate(PARAMS, PROMPT, config, steps=8)
