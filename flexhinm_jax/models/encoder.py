"""The BERT family of text encoders as pure functions over a checkpoint's own keys.

Post-norm transformer encoders with learned absolute positions: BERT (Devlin et al.
2018, arXiv:1810.04805), RoBERTa (arXiv:1907.11692), XLM-RoBERTa (arXiv:1911.02116),
MPNet with its bias by distance (arXiv:2004.09297) and DistilBERT (arXiv:1910.01108);
and sentence embeddings (Reimers and Gurevych 2019, arXiv:1908.10084). Dropout is
absent: these functions embed, calibrate and fine-tune without it. Token types are all
zero.

Parameters are the flat dict that `io.huggingface.read` returns: Hugging Face keys with
or without the prefix of the family, such as "bert.", weights `[out, in]`. Products run
in the dtype of the parameters at the default precision of the device; softmax, layer
norms and pooling accumulate in float32.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.models import parameters, transformer
from flexhinm_jax.models.encoder_config import EncoderConfig
from flexhinm_jax.models.pooling import MEAN, MODES, Pooling

__all__ = ["EncoderConfig", "embed", "encode", "init", "pool", "shapes"]

Ints = Array | np.ndarray

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
NORM = "embeddings.LayerNorm"
DISTANCES = "encoder.relative_attention_bias.weight"

MAX_DISTANCE = 128
"""Tokens further apart than this have one bias, on either side."""


def shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Key (without prefix) -> shape of every parameter that `encode` reads."""
    hidden, family = config.hidden_size, config.family
    wanted: dict[str, tuple[int, ...]] = {
        WORDS: (config.vocab_size, hidden),
        POSITIONS: (config.max_position_embeddings, hidden),
    }
    if config.type_vocab_size is not None:
        wanted[TYPES] = (config.type_vocab_size, hidden)
    wanted |= transformer.norm_shapes(NORM, hidden)
    for layer in range(config.num_hidden_layers):
        at = f"{family.place}.{layer}"
        wanted |= transformer.layer_shapes(at, config, family.keys)
    if config.relative_attention_num_buckets is not None:
        heads = config.num_attention_heads
        wanted[DISTANCES] = (config.relative_attention_num_buckets, heads)
    return wanted


def init(
    key: Array, config: EncoderConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Array]:
    """Random parameters: normal weights, zero biases, unit norms.

    Args:
      key: PRNG key, consumed.
      config: sizes.
      dtype: dtype of all parameters.

    Returns:
      Flat dict with the keys and shapes of `shapes(config)`.
    """
    return parameters.init(key, shapes(config), config.initializer_range, dtype)


def embed(
    params: Mapping[str, Array],
    tokens: Ints,
    mask: Ints,
    config: EncoderConfig,
    pooling: Pooling = MEAN,
) -> Array:
    """Sentence embeddings: `pool(encode(...))`.

    Args:
      params: flat dict of parameters.
      tokens: i32[batch, length].
      mask: [batch, length], nonzero on real tokens.
      config: sizes.
      pooling: what becomes of the hidden states of a sentence.

    Returns:
      [batch, hidden]; by default rows of unit length (zero for a row without tokens).
    """
    return pool(encode(params, tokens, mask, config), mask, pooling)


def encode(
    params: Mapping[str, Array], tokens: Ints, mask: Ints, config: EncoderConfig
) -> Array:
    """Hidden states of the last layer.

    Args:
      params: flat dict of parameters; keys beyond those of `shapes(config)` (pooler,
        heads, position ids) are not read.
      tokens: i32[batch, length]; an id outside the vocabulary gives NaN.
      mask: [batch, length], nonzero on real tokens. Other positions are not attended
        to; their own states are computed and mean nothing.
      config: sizes.

    Returns:
      [batch, length, hidden] in the dtype of the parameters.

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`, or
        the sequence is too long.
    """
    family = config.family
    prefix = (
        "" if WORDS in params or family.prefix + WORDS not in params else family.prefix
    )
    params = parameters.select(params, shapes(config), prefix)
    length = tokens.shape[1]
    if length > config.longest:
        raise ValueError(
            f"sequences of {length} tokens are longer than the {config.longest} that"
            f" max_position_embeddings={config.max_position_embeddings} allows;"
            " truncate them"
        )
    x = jnp.take(params[WORDS], tokens, axis=0, mode="fill")
    if config.type_vocab_size is not None:
        x = x + params[TYPES][0]
    x = x + _positions(params[POSITIONS], tokens, config)
    x = transformer.layer_norm(params, NORM, x, config.layer_norm_eps)
    bias = None
    if config.relative_attention_num_buckets is not None:
        bias = _distance_bias(params[DISTANCES], length)
    for layer in range(config.num_hidden_layers):
        at = f"{family.place}.{layer}"
        x = transformer.layer(params, at, x, config, family.keys, mask, bias)
    return x


def _positions(table: Array, tokens: Ints, config: EncoderConfig) -> Array:
    """Rows of the position table, [length, hidden] or [batch, length, hidden]."""
    if config.first_position is None:
        return table[: tokens.shape[1]]
    # As RoBERTa counts: pad tokens are passed over, wherever they stand.
    pad = config.first_position - 1
    real = (tokens != pad).astype(jnp.int32)
    return jnp.take(table, pad + jnp.cumsum(real, axis=1) * real, axis=0, mode="clip")


def _distance_bias(table: Array, length: int) -> Array:
    """MPNet's bias of the scores by the distance of two tokens, as T5 buckets it.

    Half of the buckets are for tokens after a query, half for those before. Of either
    half the first half is for one distance each, the rest for distances that grow by a
    factor, up to `MAX_DISTANCE`.

    Args:
      table: [buckets, heads].
      length: tokens.

    Returns:
      f32[heads, length, length], by query and key.
    """
    half = table.shape[0] // 2
    exact = half // 2
    places = np.arange(length)
    distance = places[None, :] - places[:, None]
    near = np.abs(distance)
    with np.errstate(divide="ignore"):
        ratio = np.log(near / exact) / math.log(MAX_DISTANCE / exact)
    far = np.minimum(exact + np.maximum(ratio, 0) * (half - exact), half - 1)
    bucket = np.where(near < exact, near, far.astype(np.int32)) + half * (distance > 0)
    bias = jnp.take(table, jnp.asarray(bucket, jnp.int32), axis=0)
    return bias.astype(jnp.float32).transpose(2, 0, 1)


def pool(hidden: Array, mask: Ints, pooling: Pooling = MEAN) -> Array:
    """One embedding per sentence; by default the mean, scaled to unit length.

    Args:
      hidden: [batch, length, hidden].
      mask: [batch, length], nonzero on real tokens.
      pooling: what becomes of the hidden states of a sentence.

    Returns:
      [batch, hidden] in the dtype of `hidden`; zero for a row without tokens.
    """
    real = (mask != 0).astype(jnp.float32)[..., None]
    pooled = MODES[pooling.mode](hidden.astype(jnp.float32), real)
    if pooling.unit:
        # The square root is kept away from 0, where its derivative is infinite.
        squared = jnp.sum(pooled * pooled, axis=-1, keepdims=True)
        pooled = pooled / jnp.sqrt(jnp.maximum(squared, 1e-24))
    return pooled.astype(hidden.dtype)
