"""Keys, shapes and random values of the parameters of a decoder."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.models import parameters
from flexhinm_jax.models.decoder_config import DecoderConfig
from flexhinm_jax.models.transformer import dense_shapes

__all__ = [
    "block_params",
    "block_prefix",
    "block_shapes",
    "check",
    "check_directory",
    "head_shapes",
    "init",
    "model_rules",
    "rules",
    "shapes",
    "table_shapes",
]

TABLE = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter that `apply` reads."""
    every = table_shapes(config)
    for layer in range(config.num_hidden_layers):
        at, own = block_prefix(layer), block_shapes(config, layer)
        every |= {at + name: shape for name, shape in own.items()}
    return every | head_shapes(config)


def block_prefix(layer: int) -> str:
    """What the keys of a layer begin with."""
    return f"model.layers.{layer}."


def block_shapes(config: DecoderConfig, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Key below `block_prefix(layer)` -> shape."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    own: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    own |= dense_shapes("self_attn.q_proj", queries, width, config.attention_bias)
    own |= dense_shapes("self_attn.k_proj", keys, width, config.attention_bias)
    own |= dense_shapes("self_attn.v_proj", keys, width, config.attention_bias)
    bias = config.attention_output_bias
    own |= dense_shapes("self_attn.o_proj", width, queries, bias)
    if config.qk_norm:
        own["self_attn.q_norm.weight"] = (config.head_size,)
        own["self_attn.k_norm.weight"] = (config.head_size,)
    own["post_attention_layernorm.weight"] = (width,)
    if config.sandwich_norms:
        own["pre_feedforward_layernorm.weight"] = (width,)
        own["post_feedforward_layernorm.weight"] = (width,)
    experts = config.experts
    if experts is not None and config.layer(layer).experts:
        own[experts.router] = (experts.count, width)
        inner = experts.intermediate_size
        for k in range(experts.count):
            own[experts.key(k, "gate")] = (inner, width)
            own[experts.key(k, "up")] = (inner, width)
            own[experts.key(k, "down")] = (width, inner)
        return own
    own |= dense_shapes("mlp.gate_proj", inner, width, config.mlp_bias)
    own |= dense_shapes("mlp.up_proj", inner, width, config.mlp_bias)
    own |= dense_shapes("mlp.down_proj", width, inner, config.mlp_bias)
    return own


def table_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the token table."""
    return {TABLE: (config.vocab_size, config.hidden_size)}


def head_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the last norm and the output layer (tied: the token table)."""
    last = TABLE if config.tie_word_embeddings else HEAD
    return {NORM: (config.hidden_size,), last: (config.vocab_size, config.hidden_size)}


def rules(config: DecoderConfig) -> dict[str, str]:
    """Rules for pruning: the routers of experts are small and decide, so they stay.

    Args:
      config: sizes.

    Returns:
      {regex of keys: "skip"}, empty without experts.
    """
    if config.experts is None:
        return {}
    return {rf"\.{re.escape(config.experts.router)}$": "skip"}


def model_rules(config: DecoderConfig) -> dict[str, str]:
    """`rules`, and an output layer of its own stays: only blocks are pruned.

    Args:
      config: sizes.

    Returns:
      {regex of keys: "skip"}.
    """
    own = {} if config.tie_word_embeddings else {rf"^{re.escape(HEAD)}$": "skip"}
    return rules(config) | own


def check_directory(
    directory: str | os.PathLike[str],
    stored: Mapping[str, tuple[tuple[int, ...], Any]],
    config: DecoderConfig,
) -> None:
    """`check` of a directory, and that all weights are floats.

    Args:
      directory: where, for messages.
      stored: key -> (shape, dtype) of every array of the checkpoint.
      config: sizes.

    Raises:
      ValueError: what `check` refuses, or a weight that is no float.
    """
    try:
        check({key: shape for key, (shape, _) in stored.items()}, config)
        for key in shapes(config):
            parameters.check_float(key, stored[key][1])
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def check(stored: Mapping[str, tuple[int, ...]], config: DecoderConfig) -> None:
    """Compares all keys and shapes of a checkpoint with its configuration.

    A stored output layer beside tied embeddings and the rotary tables of old
    checkpoints may be there: they are not read.

    Args:
      stored: key -> shape of every array of the checkpoint.
      config: sizes.

    Raises:
      ValueError: keys are missing or not known, or a shape disagrees; names them.
    """
    wanted = shapes(config)
    missing = [name for name in wanted if name not in stored]
    unread = {HEAD} if config.tie_word_embeddings else set()
    extra = [
        name
        for name in stored
        if name not in wanted
        and name not in unread
        and not name.endswith(".rotary_emb.inv_freq")
    ]
    if missing or extra:
        raise ValueError(
            "the tensors are not those of the configuration: missing"
            f" {arguments.some(missing)}; not known {arguments.some(extra)}"
        )
    for name, shape in wanted.items():
        parameters.check_shape(name, stored[name], shape)


def block_params(params: Mapping[str, Array], layer: int) -> dict[str, Array]:
    """The parameters of one layer under their short keys, as `block` reads them."""
    at = block_prefix(layer)
    return {k.removeprefix(at): v for k, v in params.items() if k.startswith(at)}


def init(
    key: Array, config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Array]:
    """Random parameters: normal weights, zero biases, unit norms.

    Weights that write the residual stream are scaled down by the square root of the
    number of writers, so that its variance does not grow with depth. Unit norms have
    zero weights where the configuration adds 1 to them.

    Args:
      key: PRNG key, consumed.
      config: sizes.
      dtype: dtype of all parameters.

    Returns:
      Flat dict with the keys and shapes of `shapes(config)`.
    """
    wanted = shapes(config)
    keys = jax.random.split(key, len(wanted))
    writers = (2 * config.num_hidden_layers) ** -0.5
    writing = ("o_proj.weight", "down_proj.weight")
    if config.experts is not None:
        writing = (*writing, f"{config.experts.down}.weight")
    params = {}
    for k, (name, shape) in zip(keys, wanted.items(), strict=True):
        if len(shape) == 1:
            zero = name.endswith(".bias") or config.norm_offset
            params[name] = (jnp.zeros if zero else jnp.ones)(shape, dtype)
            continue
        writes = name.endswith(writing)
        scale = config.initializer_range * (writers if writes else 1.0)
        draw = jax.random.normal(k, shape, jnp.float32) * jnp.float32(scale)
        params[name] = draw.astype(dtype)
    return params
