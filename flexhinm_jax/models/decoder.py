"""Text decoders of the Llama, Mistral, Qwen and Gemma families as pure functions.

Pre-norm transformer decoder with RMSNorm (arXiv:1910.07467), rotary positions
(arXiv:2104.09864), SwiGLU (arXiv:2002.05202) and grouped key and value heads
(arXiv:2305.13245), as in Llama (arXiv:2302.13971). Where the configuration asks for
them: the biases of Qwen2 (arXiv:2407.10671), the norms of queries and keys of Qwen3
(arXiv:2505.09388), the windows of Mistral (arXiv:2310.06825), the mixtures of experts
of Mixtral (arXiv:2401.04088) and Qwen3, the layers without rotary positions of SmolLM3,
the local layers, sandwiched norms and GeGLU of Gemma 3 (arXiv:2503.19786). Rotary
halves are paired as in Hugging Face's
checkpoints: channel c with channel c + head_dim / 2.

Parameters are a flat dict under Hugging Face's keys, weights `[out, in]`. Products run
in the dtype of the parameters at the default precision of the device; norms, rotary
positions and softmax accumulate in float32.

`apply` is `embed`, then `block` for every layer, then `head`: each of these reads only
its own parameters, so a model larger than memory can run a block at a time.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.models import attention, rope
from flexhinm_jax.models.decoder_config import DecoderConfig, Experts
from flexhinm_jax.models.decoder_parameters import (
    HEAD,
    NORM,
    TABLE,
    block_params,
    block_prefix,
    block_shapes,
    check,
    check_directory,
    head_shapes,
    init,
    model_rules,
    rules,
    shapes,
    table_shapes,
)
from flexhinm_jax.models.parameters import select
from flexhinm_jax.ops.products import matmul_transposed

__all__ = [
    "DecoderConfig",
    "apply",
    "block",
    "block_params",
    "block_prefix",
    "block_shapes",
    "check",
    "check_directory",
    "embed",
    "head",
    "init",
    "model_rules",
    "parts",
    "rules",
    "shapes",
]

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(queries, keys, values), all [b, t, heads, size] and rotated, -> (mixed, state)."""


def apply(params: Mapping[str, Array], tokens: Array, config: DecoderConfig) -> Array:
    """Logits of the next token at every position.

    Args:
      params: flat dict of parameters; keys beyond `shapes(config)` are not read.
      tokens: i32[batch, length]; an id outside the vocabulary gives NaN.
      config: sizes.

    Returns:
      [batch, length, vocab_size] in the dtype of the parameters. Position p depends on
      tokens 0 .. p only.

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`.

    Example:
      >>> config = DecoderConfig(hidden_size=8, num_hidden_layers=1,
      ...                        num_attention_heads=2, num_key_value_heads=1,
      ...                        intermediate_size=16)
      >>> params = init(jax.random.key(0), config)
      >>> apply(params, jnp.zeros((2, 5), jnp.int32), config).shape
      (2, 5, 256)
    """
    params = select(params, shapes(config))
    h = embed(params, tokens, config)
    for layer in range(config.num_hidden_layers):
        h = block(block_params(params, layer), h, config, layer)
    return head(params, h, config)


def embed(params: Mapping[str, Array], tokens: Array, config: DecoderConfig) -> Array:
    """The rows of the token table.

    Args:
      params: holds the table; other keys are not read.
      tokens: i32[batch, length]; an id outside the vocabulary gives NaN.
      config: sizes.

    Returns:
      [batch, length, hidden_size] in the dtype of the table.

    Raises:
      ValueError: the table is missing or has another shape.
    """
    select(params, table_shapes(config))
    h = jnp.take(params[TABLE], tokens, axis=0, mode="fill")
    if config.embed_scaled:
        h = h * jnp.asarray(config.hidden_size**0.5, h.dtype)
    return h


def block(
    params: Mapping[str, Array], h: Array, config: DecoderConfig, layer: int = 0
) -> Array:
    """One layer, causal, at positions 0 .. length - 1.

    Args:
      params: the parameters of one layer under the keys of `block_shapes`.
      h: [batch, length, hidden_size].
      config: sizes.
      layer: which layer, where layers differ.

    Returns:
      [batch, length, hidden_size].

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`.
    """
    return parts(params, h, config, layer)[1]


def parts(
    params: Mapping[str, Array], h: Array, config: DecoderConfig, layer: int = 0
) -> tuple[Array, Array]:
    """`block`, and the residual stream between its two parts.

    Args:
      params: as in `block`, as the other arguments.
      h: [batch, length, hidden_size].
      config: sizes.
      layer: which layer, where layers differ.

    Returns:
      [batch, length, hidden_size] each: behind the attention, and behind the block.

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`.
    """
    window = config.layer(layer).window

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        mixed = attention.attend(
            query,
            key,
            value,
            scale=config.attention_scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
        return mixed, None

    params = select(params, block_shapes(config, layer))
    length = h.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    turned = turns(positions, length, config, layer)
    return run_block(params, h, turned, attend, config)[0]


def head(params: Mapping[str, Array], h: Array, config: DecoderConfig) -> Array:
    """Logits from the hidden states behind the last block.

    Args:
      params: holds the last norm and the output layer (tied: the token table).
      h: [..., hidden_size].
      config: sizes.

    Returns:
      [..., vocab_size].

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`.
    """
    select(params, head_shapes(config))
    h = _norm(params[NORM], h, config)
    return _product(h, params[TABLE if config.tie_word_embeddings else HEAD])


def run_block(
    params: Mapping[str, Array],
    h: Array,
    turned: tuple[Array, Array] | None,
    attend: Attend,
    config: DecoderConfig,
) -> tuple[tuple[Array, Array], Any]:
    """One layer with any attention: what `parts` and generation share.

    Args:
      params: those of one layer under their short keys, no others; not checked.
      h: [batch, length, hidden_size].
      turned: `turns` of the positions of h; None where nothing turns.
      attend: mixes values; its second result is passed on.
      config: sizes.

    Returns:
      What `parts` returns, and the state that `attend` returned.
    """
    batch, length = h.shape[:2]

    def split(name: str) -> Array:
        y = _dense(params, f"self_attn.{name}_proj", x)
        y = y.reshape(batch, length, -1, config.head_size)
        scale = params.get(f"self_attn.{name}_norm.weight") if config.qk_norm else None
        return y if scale is None else _norm(scale, y, config)

    x = _norm(params["input_layernorm.weight"], h, config)
    query, key = split("q"), split("k")
    if turned is not None:
        query, key = rope.rotate(query, turned), rope.rotate(key, turned)
    mixed, state = attend(query, key, split("v"))
    mixed = _dense(params, "self_attn.o_proj", mixed.reshape(batch, length, -1))
    after = params["post_attention_layernorm.weight"]
    if config.sandwich_norms:
        between = h + _norm(after, mixed, config)
        x = _norm(params["pre_feedforward_layernorm.weight"], between, config)
        y = _feed_forward(params, x, config)
        y = _norm(params["post_feedforward_layernorm.weight"], y, config)
    else:
        between = h + mixed
        y = _feed_forward(params, _norm(after, between, config), config)
    return (between, between + y), state


def _feed_forward(
    params: Mapping[str, Array], x: Array, config: DecoderConfig
) -> Array:
    """The gated block, or the mixture of experts where the layer has one."""
    experts = config.experts
    if experts is not None and experts.router in params:
        return _mixture(params, x, config, experts)
    act = _activation(config)
    gate = act(_dense(params, "mlp.gate_proj", x))
    return _dense(params, "mlp.down_proj", gate * _dense(params, "mlp.up_proj", x))


def _activation(config: DecoderConfig) -> Callable[[Array], Array]:
    """What gates the feed-forward block, and every expert."""
    gelu = functools.partial(jax.nn.gelu, approximate=True)
    return gelu if config.gelu else jax.nn.silu


def _mixture(
    params: Mapping[str, Array], x: Array, config: DecoderConfig, experts: Experts
) -> Array:
    """Every token by its likeliest experts.

    Each expert reads all tokens, those of others as zeros, which add nothing to its
    sums: every matrix stays a leaf with a product of its own. With few experts chosen
    that multiplies more than sorting the tokens would; a CPU expands that as well.
    """
    scores = _product(x, params[experts.router]).astype(jnp.float32)
    share, to = lax.top_k(jax.nn.softmax(scores), experts.chosen)  # [b, t, chosen]
    if experts.normalised:
        share = share / share.sum(-1, keepdims=True)
    act, y = _activation(config), jnp.zeros_like(x)
    for k in range(experts.count):
        weight = jnp.where(to == k, share, 0).sum(-1, keepdims=True)  # [b, t, 1]
        own = jnp.where(weight > 0, x, 0)
        gate = act(_product(own, params[experts.key(k, "gate")]))
        inner = gate * _product(own, params[experts.key(k, "up")])
        y += _product(inner, params[experts.key(k, "down")]) * weight.astype(x.dtype)
    return y


def turns(
    positions: Array, length: int, config: DecoderConfig, layer: int = 0
) -> tuple[Array, Array] | None:
    """Cosine and sine of the rotary angles of positions of a text of that length.

    None for a layer whose queries and keys do not turn.
    """
    kind = config.layer(layer)
    if not kind.rotary:
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind.theta is not None:
        theta, scaling = kind.theta, None
    return rope.turns(positions, theta, config.head_size, scaling, length)


def _norm(scale: Array, x: Array, config: DecoderConfig) -> Array:
    x32 = x.astype(jnp.float32)
    square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normal = x32 * lax.rsqrt(square + jnp.float32(config.rms_norm_eps))
    if config.norm_offset:  # Gemma scales before it rounds
        return (normal * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return normal.astype(x.dtype) * scale.astype(x.dtype)


def _dense(params: Mapping[str, Array], at: str, x: Array) -> Array:
    """Computes x W^T + b; the bias only where there is one."""
    y = _product(x, params[f"{at}.weight"])
    bias = params.get(f"{at}.bias")
    return y if bias is None else y + bias.astype(y.dtype)


def _product(x: Array, weight: Array) -> Array:
    """Computes x W^T for a weight `[out, in]`."""
    return matmul_transposed(x.astype(weight.dtype), weight)
