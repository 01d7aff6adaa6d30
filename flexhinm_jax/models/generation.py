"""Text generation with a cache of keys and values.

The prompt runs once through the decoder and fills the cache; then every step runs one
token. The cache has its final size from the start, so a call compiles two programs: one
for the prompt, one for all steps.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.arguments import say
from flexhinm_jax.models import attention, decoder, parameters, rope
from flexhinm_jax.models.decoder import DecoderConfig
from flexhinm_jax.models.load import Model
from flexhinm_jax.tracing.sparsify import sparsify

__all__ = ["Continuation", "Generated", "Sampling", "continue_text", "generate"]

Cache = tuple[tuple[Array, Array], ...]
"""Rotated keys and values of every layer, [b, total, kv_heads, head_size]."""


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      tokens: i32[batch, steps], `pad` behind the end.
      lengths: i32[batch], tokens before the end, the end token itself included.
    """

    tokens: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends.

    Attributes:
      temperature: 0 takes the most likely token (the lowest id of equal ones); above,
        tokens are drawn from softmax(logits / temperature).
      top_k: draws only among so many most likely tokens; None among all.
      ends: ids after which a text is finished. Once all are, no more steps run.
      pad: id behind the end of a finished text.
    """

    temperature: float = 0.0
    top_k: int | None = None
    ends: Sequence[int] = ()
    pad: int = 0

    def __post_init__(self):
        """Validates what needs no model."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"{say('temperature', self.temperature)}: need a number of at least 0"
            )
        if self.top_k is not None and self.temperature == 0:
            raise ValueError(
                f"{say('top k', self.top_k)} has no use at temperature 0, which draws"
                f" nothing; give {say('temperature', 1.0)} or another"
            )

    def choose(self, key: Array | None, logits: Array, step: Array | int) -> Array:
        """The next token of every row, i32[b], from f32[b, vocab_size]."""
        if key is None or self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return _draw(
            jax.random.fold_in(key, step), logits, self.temperature, self.top_k
        )


def generate(
    params: Mapping[str, Array],
    prompt: Array,
    config: DecoderConfig,
    *,
    steps: int,
    lengths: Array | None = None,
    key: Array | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    **sampling: Any,
) -> Generated:
    """Continues prompts token by token.

    Works under jit, and under `sparsify` for packed weights.

    Args:
      params: parameters of the decoder.
      prompt: i32[batch, length]; shorter prompts are padded on the left.
      config: sizes.
      steps: new tokens.
      lengths: i32[batch], real tokens of every prompt, 1 .. length; None if all are.
      key: PRNG key, consumed; needed when `temperature` is above 0.
      cache_dtype: dtype of cached keys and values; None for that of the parameters.
      **sampling: temperature, top_k, ends and pad, see `Sampling`.

    Returns:
      The new tokens, without the prompt.

    Raises:
      ValueError: an option out of range, prompt and new tokens together longer than
        `max_position_embeddings`, or parameters that disagree with `config`.

    Example:
      >>> config = DecoderConfig(hidden_size=8, num_hidden_layers=1,
      ...                        num_attention_heads=2, num_key_value_heads=1,
      ...                        intermediate_size=16)
      >>> params = decoder.init(jax.random.key(0), config)
      >>> prompt = jnp.array([[72, 105]], jnp.int32)
      >>> generate(params, prompt, config, steps=3).tokens.shape
      (1, 3)
    """
    rule = Sampling(**sampling)
    _check(prompt, config, steps, key, rule)
    params = parameters.select(params, decoder.shapes(config))
    batch, length = prompt.shape
    total = length + steps
    if lengths is None:
        lengths = jnp.full((batch,), length, jnp.int32)
    first = length - jnp.asarray(lengths, jnp.int32)
    stops, pad = jnp.asarray(tuple(rule.ends), jnp.int32), rule.pad

    def advance(tokens: Array, at: Array | int, cache: Cache) -> tuple[Array, Cache]:
        """Logits behind the last of the tokens, which stand at `at` and after it."""
        return _advance(params, tokens, at, first, total, cache, config)

    def step(carry: tuple) -> tuple:
        k, token, done, out, cache = carry
        logits, cache = advance(token[:, None], length + k - 1, cache)
        token = rule.choose(key, logits, k)
        token = jnp.where(done, jnp.int32(pad), token)
        out = lax.dynamic_update_index_in_dim(out, token, k, 1)
        done = done | jnp.isin(token, stops)
        return k + 1, token, done, out, cache

    def unfinished(carry: tuple) -> Array:
        k, _, done, _, _ = carry
        return (k < steps) & ~jnp.all(done)

    dtype = params["model.norm.weight"].dtype if cache_dtype is None else cache_dtype
    shape = (batch, total, config.num_key_value_heads, config.head_size)
    empty = jnp.zeros(shape, dtype)
    cache = ((empty, empty),) * config.num_hidden_layers
    logits, cache = advance(jnp.asarray(prompt, jnp.int32), 0, cache)
    token = rule.choose(key, logits, 0)
    out = jnp.full((batch, steps), pad, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, jnp.isin(token, stops), out, cache)
    _, _, _, out, _ = lax.while_loop(unfinished, step, carry)
    ended = jnp.isin(out, stops)
    # The first end counts; `pad` behind it may be an end token itself.
    before = jnp.where(ended.any(1), jnp.argmax(ended, 1) + 1, steps)
    return Generated(out, before.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A text behind a prompt.

    Attributes:
      text: without the prompt.
      tokens: its ids, the end included.
      ended: whether the last one is an end.
      seconds: wall time without compiling; None where it was not asked.
    """

    text: str
    tokens: list[int]
    ended: bool
    seconds: float | None = None


def continue_text(
    model: Model,
    prompt: str,
    *,
    steps: int,
    key: Array | None = None,
    timed: bool = False,
    **sampling: Any,
) -> Continuation:
    """Continues one text, up to the model's own end.

    Args:
      model: a decoder with its tokenizer, dense or packed.
      prompt: text with at least one token.
      steps: new tokens at most.
      key: PRNG key, consumed; needed when `temperature` is above 0.
      timed: measures the time of a second run, which compiles nothing.
      **sampling: temperature and top_k, see `Sampling`.

    Returns:
      The text and its tokens.

    Raises:
      ValueError: an encoder, a prompt without tokens, or what `generate` refuses.
    """
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(
            f"{model.directory} is an encoder, which continues no text; give a decoder"
        )
    tokens, _ = model.encode(prompt)
    if tokens.size == 0:
        raise ValueError("the prompt has no tokens; give at least one")
    sampling = {"ends": model.ends} | sampling
    go_on = functools.partial(generate, config=model.config, steps=steps, **sampling)
    run = jax.jit(sparsify(go_on) if model.packed else go_on)
    generated = run(model.params, jnp.asarray(tokens[None]), key=key)
    seconds = None
    if timed:
        jax.block_until_ready(generated)
        began = time.perf_counter()
        generated = run(model.params, jnp.asarray(tokens[None]), key=key)
        jax.block_until_ready(generated)
        seconds = time.perf_counter() - began
    new = generated.tokens[0, : int(generated.lengths[0])].tolist()
    # The text behind the prompt: a token decoded alone may lack its leading space.
    whole = model.tokenizer.decode([*tokens.tolist(), *new])
    before = model.tokenizer.decode(tokens.tolist())
    ended = bool(new and new[-1] in sampling["ends"])
    return Continuation(whole.removeprefix(before), new, ended, seconds)


def _advance(
    params: Mapping[str, Array],
    tokens: Array,
    at: Array | int,
    first: Array,
    total: int,
    cache: Cache,
    config: DecoderConfig,
) -> tuple[Array, Cache]:
    """Runs tokens [b, t] at columns at .. at + t - 1 behind what the cache holds.

    Args:
      params: parameters.
      tokens: i32[b, t].
      at: first column.
      first: i32[b], column of every row's first real token.
      total: columns of the cache.
      cache: keys and values of the columns before `at`.
      config: sizes.

    Returns:
      f32[b, vocab_size], logits behind the last column, and the new cache.
    """
    columns = at + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.maximum(columns - first[:, None], 0)
    held = jnp.arange(total, dtype=jnp.int32)
    # [b, 1, t, total]: real columns up to the own one.
    mask = (held <= columns[:, None]) & (held >= first[:, None, None])
    mask = mask[:, None]
    ages = columns[:, None] - held
    h = decoder.embed(params, tokens, config)
    filled = []
    for layer, (keys, values) in enumerate(cache):

        def attend(
            query: Array,
            key: Array,
            value: Array,
            keys: Array,
            values: Array,
            seen: Array,
        ) -> tuple[Array, tuple[Array, Array]]:
            new_keys, new_values = (
                lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), at, 1)
                for held, new in ((keys, key), (values, value))
            )
            mixed = attention.attend(
                query,
                new_keys.astype(query.dtype),
                new_values.astype(query.dtype),
                mask=seen,
                scale=config.attention_scale,
            )
            return mixed, (new_keys, new_values)

        window = config.layer(layer).window
        seen = mask if window is None else mask & (ages < window)
        bound = functools.partial(attend, keys=keys, values=values, seen=seen)
        turned = decoder.turns(positions, total, config, layer)
        block = decoder.block_params(params, layer)
        (_, h), new = decoder.run_block(block, h, turned, bound, config)
        filled.append(new)
    logits = decoder.head(params, h[:, -1], config)
    return logits.astype(jnp.float32), tuple(filled)


def _draw(key: Array, logits: Array, temperature: float, top_k: int | None) -> Array:
    """A random next token of every row, i32[b]."""
    if top_k is not None:
        # Exactly so many, by index: a threshold would let equal logits in.
        best, ids = lax.top_k(logits, top_k)
        chosen = jax.random.categorical(key, best / jnp.float32(temperature))
        return jnp.take_along_axis(ids, chosen[:, None], 1)[:, 0].astype(jnp.int32)
    drawn = jax.random.categorical(key, logits / jnp.float32(temperature))
    return drawn.astype(jnp.int32)


def _check(
    prompt: Array,
    config: DecoderConfig,
    steps: int,
    key: Array | None,
    rule: Sampling,
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"the prompt has shape {tuple(prompt.shape)}; give [batch, length] with at"
            " least one token"
        )
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be an integer > 0, got {steps!r}")
    limit = config.max_position_embeddings
    if limit is not None and prompt.shape[1] + steps > limit:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and {steps} new ones are more than"
            f" max_position_embeddings={limit}; shorten the prompt or take"
            f" {say('steps')}"
        )
    scaling = config.rope_scaling
    if isinstance(scaling, rope.Dynamic) and prompt.shape[1] + steps > scaling.trained:
        raise ValueError(
            f"{prompt.shape[1] + steps} tokens are more than trained={scaling.trained}"
            " of dynamic positions, which would turn with every step while the cache"
            f" stays; take {say('steps')}"
        )
    if rule.temperature > 0 and key is None:
        raise ValueError(f"temperature={rule.temperature!r} draws tokens: give a key")
    if rule.top_k is not None and not 1 <= rule.top_k <= config.vocab_size:
        raise ValueError(
            f"{say('top k', rule.top_k)} must be between 1 and"
            f" vocab_size={config.vocab_size}"
        )
