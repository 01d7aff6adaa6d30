"""Text decoders of the Llama, Mistral and Qwen families as pure functions.

Pre-norm transformer decoder with RMSNorm (arXiv:1910.07467), rotary positions
(arXiv:2104.09864), SwiGLU (arXiv:2002.05202) and grouped key and value heads
(arXiv:2305.13245), as in Llama (arXiv:2302.13971); with the biases of Qwen2
(arXiv:2407.10671) or the norms of queries and keys of Qwen3 (arXiv:2505.09388) where
the configuration asks for them. Rotary halves are paired as in Hugging Face's
checkpoints: channel c with channel c + head_dim / 2.

Parameters are a flat dict under Hugging Face's keys, weights `[out, in]`. Products run
in the dtype of the parameters at the default precision of the device; norms, rotary
positions and softmax accumulate in float32.

`apply` is `embed`, then `block` for every layer, then `head`: each of these reads only
its own parameters, so a model larger than memory can run a block at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.models import rope
from flexhinm_jax.models.decoder_config import DecoderConfig
from flexhinm_jax.models.decoder_parameters import (
    HEAD,
    NORM,
    TABLE,
    block_params,
    block_prefix,
    block_shapes,
    check,
    head_shapes,
    init,
    select,
    shapes,
    table_shapes,
)

__all__ = [
    "DecoderConfig",
    "apply",
    "block",
    "block_params",
    "block_prefix",
    "block_shapes",
    "check",
    "embed",
    "head",
    "init",
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
        h = block(block_params(params, layer), h, config)
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
    return jnp.take(params[TABLE], tokens, axis=0, mode="fill")


def block(params: Mapping[str, Array], h: Array, config: DecoderConfig) -> Array:
    """One layer, causal, at positions 0 .. length - 1.

    Args:
      params: the parameters of one layer under the keys of `block_shapes(config)`.
      h: [batch, length, hidden_size].
      config: sizes.

    Returns:
      [batch, length, hidden_size].

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`.
    """

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return mixed, None

    params = select(params, block_shapes(config))
    length = h.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    return run_block(params, h, turns(positions, length, config), attend, config)[0]


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
    turned: tuple[Array, Array],
    attend: Attend,
    config: DecoderConfig,
) -> tuple[Array, Any]:
    """One layer with any attention: what `block` and generation share.

    Args:
      params: those of one layer under their short keys, no others; not checked.
      h: [batch, length, hidden_size].
      turned: `turns` of the positions of h.
      attend: mixes values; its second result is passed on.
      config: sizes.

    Returns:
      [batch, length, hidden_size] and the state that `attend` returned.
    """
    batch, length = h.shape[:2]

    def split(name: str) -> Array:
        y = _dense(params, f"self_attn.{name}_proj", x)
        y = y.reshape(batch, length, -1, config.head_size)
        scale = params.get(f"self_attn.{name}_norm.weight") if config.qk_norm else None
        return y if scale is None else _norm(scale, y, config)

    x = _norm(params["input_layernorm.weight"], h, config)
    query, key = rope.rotate(split("q"), turned), rope.rotate(split("k"), turned)
    mixed, state = attend(query, key, split("v"))
    h = h + _dense(params, "self_attn.o_proj", mixed.reshape(batch, length, -1))
    x = _norm(params["post_attention_layernorm.weight"], h, config)
    gate = jax.nn.silu(_dense(params, "mlp.gate_proj", x))
    inner = gate * _dense(params, "mlp.up_proj", x)
    return h + _dense(params, "mlp.down_proj", inner), state


def turns(positions: Array, length: int, config: DecoderConfig) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles of positions of a text of that length."""
    return rope.turns(
        positions, config.rope_theta, config.head_size, config.rope_scaling, length
    )


def _norm(scale: Array, x: Array, config: DecoderConfig) -> Array:
    x32 = x.astype(jnp.float32)
    square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normal = x32 * lax.rsqrt(square + jnp.float32(config.rms_norm_eps))
    return normal.astype(x.dtype) * scale.astype(x.dtype)


def _dense(params: Mapping[str, Array], at: str, x: Array) -> Array:
    """Computes x W^T + b; the bias only where there is one."""
    y = _product(x, params[f"{at}.weight"])
    bias = params.get(f"{at}.bias")
    return y if bias is None else y + bias.astype(y.dtype)


def _product(x: Array, weight: Array) -> Array:
    """Computes x W^T for a weight `[out, in]`."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(weight.dtype), weight, contract)
