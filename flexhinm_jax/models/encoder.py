"""The BERT family of text encoders as pure functions over a checkpoint's own keys.

Post-norm transformer encoder with learned absolute positions (Devlin et al. 2018,
arXiv:1810.04805), and the mean-pooled, L2-normalised sentence embedding of
all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv:1908.10084). Dropout is absent: these
functions embed, calibrate and fine-tune without it. Token types are all zero.

Parameters are the flat dict that `io.huggingface.read` returns: Hugging Face keys with
or without the prefix "bert.", weights `[out, in]`. Products run in the dtype of the
parameters at the default precision of the device; softmax, layer norms and pooling
accumulate in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.models import fields

__all__ = ["EncoderConfig", "embed", "encode", "init", "pool", "shapes"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""Supported values of `hidden_act`; "gelu" is the exact one, with erf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of an encoder, under the names of Hugging Face's `config.json`.

    Attributes:
      vocab_size: rows of the token table.
      hidden_size: width of the hidden states; a multiple of `num_attention_heads`.
      num_hidden_layers: layers.
      num_attention_heads: heads per layer.
      intermediate_size: width inside the feed-forward block.
      max_position_embeddings: longest sequence.
      type_vocab_size: rows of the token-type table, of which row 0 is used.
      layer_norm_eps: added to the variance in layer norms.
      hidden_act: activation, a key of `ACTIVATIONS`.
      initializer_range: standard deviation of random weights.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    def __post_init__(self):
        """Validates types, ranges and the activation."""
        fields.check(self)
        if self.hidden_act not in list(ACTIVATIONS):
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported; supported are"
                f" {', '.join(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of"
                f" num_attention_heads={self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Reads the contents of a Hugging Face `config.json`; other fields are ignored.

        Raises:
          ValueError: a field is missing or wrong, or asks for something that `encode`
            does not do: another model type or position embedding, or a decoder.
        """
        for field, value in (
            ("model_type", "bert"),
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
            ("add_cross_attention", False),
        ):
            given = config.get(field, None if field == "model_type" else value)
            if given != value:
                raise ValueError(
                    f"{field}={given!r} is not supported; supported is {value!r}"
                )
        values = {}
        for field in dataclasses.fields(cls):
            if field.name in config:
                values[field.name] = config[field.name]
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing from the configuration")
        return cls(**values)


def shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Key (without prefix) -> shape of every parameter that `encode` reads."""
    hidden, inner = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (
            config.max_position_embeddings,
            hidden,
        ),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, hidden),
    }
    found |= _norm_shapes("embeddings.LayerNorm", hidden)
    for layer in range(config.num_hidden_layers):
        at = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            found |= _dense_shapes(f"{at}.attention.self.{name}", hidden, hidden)
        found |= _dense_shapes(f"{at}.attention.output.dense", hidden, hidden)
        found |= _norm_shapes(f"{at}.attention.output.LayerNorm", hidden)
        found |= _dense_shapes(f"{at}.intermediate.dense", inner, hidden)
        found |= _dense_shapes(f"{at}.output.dense", hidden, inner)
        found |= _norm_shapes(f"{at}.output.LayerNorm", hidden)
    return found


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
    wanted = shapes(config)
    keys = jax.random.split(key, len(wanted))
    params = {}
    for k, (name, shape) in zip(keys, wanted.items(), strict=True):
        if name.endswith("LayerNorm.weight"):
            params[name] = jnp.ones(shape, dtype)
        elif name.endswith("bias"):
            params[name] = jnp.zeros(shape, dtype)
        else:
            draw = jax.random.normal(k, shape, jnp.float32) * config.initializer_range
            params[name] = draw.astype(dtype)
    return params


def embed(
    params: Mapping[str, Array], tokens: Array, mask: Array, config: EncoderConfig
) -> Array:
    """Sentence embeddings: `pool(encode(...))`.

    Args:
      params: flat dict of parameters.
      tokens: i32[batch, length].
      mask: [batch, length], nonzero on real tokens.
      config: sizes.

    Returns:
      [batch, hidden], rows of unit length (zero for a row without tokens).
    """
    return pool(encode(params, tokens, mask, config), mask)


def encode(
    params: Mapping[str, Array], tokens: Array, mask: Array, config: EncoderConfig
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
    params = _unprefixed(params, config)
    length = tokens.shape[1]
    if length > config.max_position_embeddings:
        raise ValueError(
            f"sequences of {length} tokens are longer than"
            f" max_position_embeddings={config.max_position_embeddings}; truncate them"
        )
    words = jnp.take(
        params["embeddings.word_embeddings.weight"], tokens, axis=0, mode="fill"
    )
    positions = params["embeddings.position_embeddings.weight"][:length]
    types = params["embeddings.token_type_embeddings.weight"][0]
    x = words + types + positions
    x = _layer_norm(params, "embeddings.LayerNorm", x, config)
    for layer in range(config.num_hidden_layers):
        x = _layer(params, f"encoder.layer.{layer}", x, mask, config)
    return x


def pool(hidden: Array, mask: Array) -> Array:
    """Mean over real tokens, scaled to unit length.

    Args:
      hidden: [batch, length, hidden].
      mask: [batch, length], nonzero on real tokens.

    Returns:
      [batch, hidden] in the dtype of `hidden`; zero for a row without tokens.
    """
    real = (mask != 0).astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * real, axis=1)
    mean = total / jnp.maximum(jnp.sum(real, axis=1), 1.0)
    # The square root is kept away from 0, where its derivative is infinite.
    squared = jnp.sum(mean * mean, axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(squared, 1e-24))
    return (mean / norm).astype(hidden.dtype)


def _layer(
    params: Mapping[str, Array], at: str, x: Array, mask: Array, config: EncoderConfig
) -> Array:
    """One post-norm layer: attention, then feed-forward."""
    attended = _attention(params, f"{at}.attention.self", x, mask, config)
    attended = _dense(params, f"{at}.attention.output.dense", attended)
    x = _layer_norm(params, f"{at}.attention.output.LayerNorm", x + attended, config)
    inner = _dense(params, f"{at}.intermediate.dense", x)
    inner = ACTIVATIONS[config.hidden_act](inner)
    inner = _dense(params, f"{at}.output.dense", inner)
    return _layer_norm(params, f"{at}.output.LayerNorm", x + inner, config)


def _attention(
    params: Mapping[str, Array], at: str, x: Array, mask: Array, config: EncoderConfig
) -> Array:
    batch, length, hidden = x.shape
    heads = config.num_attention_heads

    def split(name):
        return _dense(params, f"{at}.{name}", x).reshape(batch, length, heads, -1)

    query, key, value = split("query"), split("key"), split("value")
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    logits = logits * jnp.float32((hidden // heads) ** -0.5)
    # The lowest finite number: a row without tokens gets equal weights, not NaN.
    lowest = jnp.finfo(jnp.float32).min
    logits = jnp.where((mask != 0)[:, None, None, :], logits, lowest)
    weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return mixed.reshape(batch, length, hidden)


def _dense(params: Mapping[str, Array], at: str, x: Array) -> Array:
    """Computes x W^T + b for a weight `[out, in]`."""
    weight, bias = params[f"{at}.weight"], params[f"{at}.bias"]
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(weight.dtype), weight, contract) + bias


def _layer_norm(
    params: Mapping[str, Array], at: str, x: Array, config: EncoderConfig
) -> Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred * lax.rsqrt(variance + jnp.float32(config.layer_norm_eps))
    scale = params[f"{at}.weight"].astype(jnp.float32)
    shift = params[f"{at}.bias"].astype(jnp.float32)
    return (normal * scale + shift).astype(x.dtype)


def _dense_shapes(at: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{at}.weight": (out, inputs), f"{at}.bias": (out,)}


def _norm_shapes(at: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{at}.weight": (size,), f"{at}.bias": (size,)}


def _unprefixed(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """The parameters that `encode` reads, without prefix, as JAX arrays."""
    first = "embeddings.word_embeddings.weight"
    prefix = "bert." if first not in params and f"bert.{first}" in params else ""
    found = {}
    for name, shape in shapes(config).items():
        if prefix + name not in params:
            raise ValueError(
                f"{prefix}{name} is missing from the parameters; they belong to "
                "another configuration"
            )
        found[name] = jnp.asarray(params[prefix + name])
        if found[name].shape != shape:
            raise ValueError(
                f"{prefix}{name} has shape {found[name].shape}, the configuration"
                f" gives {shape}"
            )
    return found
