"""The Llama family of text decoders as pure functions over a checkpoint's own keys.

Pre-norm transformer decoder with RMSNorm (arXiv:1910.07467), rotary positions
(arXiv:2104.09864), SwiGLU (arXiv:2002.05202) and grouped key and value heads
(arXiv:2305.13245), as in Llama (arXiv:2302.13971). Rotary halves are paired as in
Hugging Face's checkpoints: channel c with channel c + head_dim / 2.

Parameters are a flat dict under Hugging Face's keys, weights `[out, in]`. Products run
in the dtype of the parameters at the default precision of the device; norms, rotary
positions and softmax accumulate in float32.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["DecoderConfig", "apply", "init", "shapes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, under the names of Hugging Face's `config.json`.

    Attributes:
      vocab_size: rows of the token table; 256 for bytes.
      hidden_size: width of the residual stream.
      num_hidden_layers: layers.
      num_attention_heads: query heads per layer.
      num_key_value_heads: key and value heads per layer; divides the query heads.
      intermediate_size: width inside the feed-forward block.
      head_dim: channels of a head, even; None for hidden_size / num_attention_heads.
      rms_norm_eps: added to the mean square in norms.
      rope_theta: base of the rotary wavelengths.
      tie_word_embeddings: whether the token table is also the output layer.
      initializer_range: standard deviation of random weights.
    """

    vocab_size: int = 256
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        """Validates types, ranges and what must divide what."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be an integer > 0, got {value!r}")
            if field.type is float and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value < math.inf
            ):
                raise ValueError(f"{field.name} must be a number > 0, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of"
                f" num_attention_heads={self.num_attention_heads}; give head_dim"
            )
        if self.head_size < 1 or self.head_size % 2:
            raise ValueError(
                f"heads of {self.head_size} channels; rotary positions need an even"
                " number"
            )

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        if self.head_dim is not None:
            return self.head_dim
        return self.hidden_size // self.num_attention_heads


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter that `apply` reads."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width)
    }
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (queries, width),
            f"{at}.self_attn.k_proj.weight": (keys, width),
            f"{at}.self_attn.v_proj.weight": (keys, width),
            f"{at}.self_attn.o_proj.weight": (width, queries),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.mlp.gate_proj.weight": (inner, width),
            f"{at}.mlp.up_proj.weight": (inner, width),
            f"{at}.mlp.down_proj.weight": (width, inner),
        }
    found["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    return found


def init(
    key: Array, config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Array]:
    """Random parameters: normal weights and unit norms.

    Weights that write the residual stream are scaled down by the square root of the
    number of writers, so that its variance does not grow with depth.

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
    params = {}
    for k, (name, shape) in zip(keys, wanted.items(), strict=True):
        if len(shape) == 1:
            params[name] = jnp.ones(shape, dtype)
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = config.initializer_range * (writers if writes else 1.0)
        draw = jax.random.normal(k, shape, jnp.float32) * jnp.float32(scale)
        params[name] = draw.astype(dtype)
    return params


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
    _check(params, config)
    table = params["model.embed_tokens.weight"]
    x = jnp.take(table, tokens, axis=0, mode="fill")
    turns = _rotations(tokens.shape[1], config)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        y = _norm(params[f"{at}.input_layernorm.weight"], x, config)
        x = x + _attention(params, f"{at}.self_attn", y, turns, config)
        y = _norm(params[f"{at}.post_attention_layernorm.weight"], x, config)
        gate = jax.nn.silu(_dense(params, f"{at}.mlp.gate_proj", y))
        inner = gate * _dense(params, f"{at}.mlp.up_proj", y)
        x = x + _dense(params, f"{at}.mlp.down_proj", inner)
    x = _norm(params["model.norm.weight"], x, config)
    if config.tie_word_embeddings:
        return _product(x, table)
    return _dense(params, "lm_head", x)


def _attention(
    params: Mapping[str, Array],
    at: str,
    x: Array,
    turns: tuple[Array, Array],
    config: DecoderConfig,
) -> Array:
    batch, length = x.shape[:2]

    def split(name: str) -> Array:
        y = _dense(params, f"{at}.{name}", x)
        return y.reshape(batch, length, -1, config.head_size)

    query = _rotate(split("q_proj"), turns)
    key = _rotate(split("k_proj"), turns)
    mixed = jax.nn.dot_product_attention(query, key, split("v_proj"), is_causal=True)
    return _dense(params, f"{at}.o_proj", mixed.reshape(batch, length, -1))


def _rotations(length: int, config: DecoderConfig) -> tuple[Array, Array]:
    """Cosine and sine of every angle, f32[length, 1, head_size / 2]."""
    half = config.head_size // 2
    steps = jnp.arange(half, dtype=jnp.float32) / jnp.float32(half)
    frequencies = jnp.float32(config.rope_theta) ** -steps
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, turns: tuple[Array, Array]) -> Array:
    cos, sin = turns
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)


def _norm(scale: Array, x: Array, config: DecoderConfig) -> Array:
    x32 = x.astype(jnp.float32)
    square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normal = x32 * lax.rsqrt(square + jnp.float32(config.rms_norm_eps))
    return normal.astype(x.dtype) * scale.astype(x.dtype)


def _dense(params: Mapping[str, Array], at: str, x: Array) -> Array:
    return _product(x, params[f"{at}.weight"])


def _product(x: Array, weight: Array) -> Array:
    """Computes x W^T for a weight `[out, in]`."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(weight.dtype), weight, contract)


def _check(params: Mapping[str, Array], config: DecoderConfig) -> None:
    for name, shape in shapes(config).items():
        if name not in params:
            raise ValueError(f"{name} is missing from the parameters")
        if tuple(params[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(params[name].shape)}, the configuration"
                f" gives {shape}"
            )
