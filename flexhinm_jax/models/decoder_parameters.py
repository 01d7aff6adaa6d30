"""Keys, shapes and random values of the parameters of a decoder."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.models.decoder_config import DecoderConfig
from flexhinm_jax.models.transformer import dense_shapes

__all__ = [
    "block_params",
    "block_prefix",
    "block_shapes",
    "check",
    "head_shapes",
    "init",
    "rules",
    "select",
    "shapes",
    "table_shapes",
]

TABLE = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter that `apply` reads."""
    found = table_shapes(config)
    for layer in range(config.num_hidden_layers):
        at, own = block_prefix(layer), block_shapes(config, layer)
        found |= {at + name: shape for name, shape in own.items()}
    return found | head_shapes(config)


def block_prefix(layer: int) -> str:
    """What the keys of a layer begin with."""
    return f"model.layers.{layer}."


def block_shapes(config: DecoderConfig, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Key below `block_prefix(layer)` -> shape."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    found: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    found |= dense_shapes("self_attn.q_proj", queries, width, config.attention_bias)
    found |= dense_shapes("self_attn.k_proj", keys, width, config.attention_bias)
    found |= dense_shapes("self_attn.v_proj", keys, width, config.attention_bias)
    bias = config.attention_output_bias
    found |= dense_shapes("self_attn.o_proj", width, queries, bias)
    if config.qk_norm:
        found["self_attn.q_norm.weight"] = (config.head_size,)
        found["self_attn.k_norm.weight"] = (config.head_size,)
    found["post_attention_layernorm.weight"] = (width,)
    if config.sandwich_norms:
        found["pre_feedforward_layernorm.weight"] = (width,)
        found["post_feedforward_layernorm.weight"] = (width,)
    experts = config.experts
    if experts is not None and config.layer(layer).experts:
        found[experts.router] = (experts.count, width)
        inner = experts.intermediate_size
        for k in range(experts.count):
            found[experts.key(k, "gate")] = (inner, width)
            found[experts.key(k, "up")] = (inner, width)
            found[experts.key(k, "down")] = (width, inner)
        return found
    found |= dense_shapes("mlp.gate_proj", inner, width, config.mlp_bias)
    found |= dense_shapes("mlp.up_proj", inner, width, config.mlp_bias)
    found |= dense_shapes("mlp.down_proj", width, inner, config.mlp_bias)
    return found


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


def check(found: Mapping[str, tuple[int, ...]], config: DecoderConfig) -> None:
    """Compares all keys and shapes of a checkpoint with its configuration.

    A stored output layer beside tied embeddings and the rotary tables of old
    checkpoints may be there: they are not read.

    Args:
      found: key -> shape of every array of the checkpoint.
      config: sizes.

    Raises:
      ValueError: keys are missing or not known, or a shape disagrees; names them.
    """
    wanted = shapes(config)
    missing = [name for name in wanted if name not in found]
    unread = {HEAD} if config.tie_word_embeddings else set()
    extra = [
        name
        for name in found
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
        _check_shape(name, found[name], shape)


def select(
    params: Mapping[str, Array], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The wanted parameters of a dict that may hold others.

    Raises:
      ValueError: one is missing or has another shape.
    """
    for name, shape in wanted.items():
        if name not in params:
            raise ValueError(f"{name} is missing from the parameters")
        _check_shape(name, tuple(params[name].shape), shape)
    return {name: params[name] for name in wanted}


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


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(found)}, the configuration gives {wanted}"
        )
