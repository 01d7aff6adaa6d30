"""A transformer layer as encoders of text and of images share it.

A layer is attention and a feed-forward block, with the norm after either (Vaswani et
al. 2017, arXiv:1706.03762) or before (arXiv:2002.04745). What its parameters are called
is a `LayerKeys`. Weights are `[out, in]`. Products run in the dtype of the parameters
at the default precision of the device; softmax and layer norms accumulate in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flexhinm_jax.models import fields
from flexhinm_jax.ops.products import matmul_transposed

__all__ = [
    "ACTIVATIONS",
    "LayerKeys",
    "Sizes",
    "check",
    "dense",
    "dense_shapes",
    "layer",
    "layer_norm",
    "layer_shapes",
    "norm_shapes",
]

Shapes = dict[str, tuple[int, ...]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""Supported values of `hidden_act`; "gelu" is the exact one, with erf."""


class Sizes(Protocol):
    """What a layer needs to know of a configuration."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width inside the feed-forward block."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Heads of a layer."""
        ...

    @property
    def hidden_act(self) -> str:
        """A key of `ACTIVATIONS`."""
        ...

    @property
    def layer_norm_eps(self) -> float:
        """Added to the variance in layer norms."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKeys:
    """What the parts of a layer are called below the layer's own place.

    Attributes:
      query: and `key`, `value`, `out`: the products of attention.
      key: see `query`.
      value: see `query`.
      out: see `query`.
      attention_norm: norm of attention.
      up: and `down`: the products of the feed-forward block.
      down: see `up`.
      norm: norm of the feed-forward block.
      pre_norm: whether norms stand before attention and feed-forward block, else behind
        the sums.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"
    pre_norm: bool = False

    @property
    def read(self) -> tuple[str, str, str]:
        """The products that read the input of attention."""
        return self.query, self.key, self.value


def check(sizes: Sizes) -> None:
    """Refuses an activation that is not known and heads that do not divide the width.

    Raises:
      ValueError: names the field and what is supported.
    """
    fields.chosen("hidden_act", sizes.hidden_act, ACTIVATIONS)
    if sizes.hidden_size % sizes.num_attention_heads:
        raise ValueError(
            f"hidden_size={sizes.hidden_size} is not a multiple of"
            f" num_attention_heads={sizes.num_attention_heads}"
        )


def layer(
    params: Mapping[str, Array],
    at: str,
    x: Array,
    sizes: Sizes,
    keys: LayerKeys,
    mask: Array | np.ndarray | None = None,
    bias: Array | None = None,
    product: Callable[[Mapping[str, Array], str, Array], Array] | None = None,
    operands: jax.typing.DTypeLike | None = None,
) -> Array:
    """One layer: attention, then the feed-forward block.

    Args:
      params: flat dict of parameters.
      at: what the keys of the layer begin with, without the last point.
      x: [batch, length, hidden].
      sizes: of the layer.
      keys: names of its parameters.
      mask: [batch, length], nonzero where others may look, or [batch, length, length]
        by query and key; None for everywhere.
      bias: f32[heads, length, length], added to the scores; None for none.
      product: in the place of `dense`.
      operands: dtype of what the products of attention read, summed in float32; None
        for that of `x`.

    Returns:
      [batch, length, hidden] in the dtype of `x`.
    """
    product = product or dense

    def attend(x: Array) -> Array:
        parts = [product(params, f"{at}.{name}", x) for name in keys.read]
        mixed = _attention(parts, sizes.num_attention_heads, mask, bias, operands)
        return product(params, f"{at}.{keys.out}", mixed)

    def feed_forward(x: Array) -> Array:
        inner = product(params, f"{at}.{keys.up}", x)
        inner = ACTIVATIONS[sizes.hidden_act](inner)
        return product(params, f"{at}.{keys.down}", inner)

    def norm(name: str, x: Array) -> Array:
        return layer_norm(params, f"{at}.{name}", x, sizes.layer_norm_eps)

    if keys.pre_norm:
        x = x + attend(norm(keys.attention_norm, x))
        return x + feed_forward(norm(keys.norm, x))
    x = norm(keys.attention_norm, x + attend(x))
    return norm(keys.norm, x + feed_forward(x))


def _attention(
    parts: Sequence[Array],
    heads: int,
    mask: Array | np.ndarray | None,
    bias: Array | None,
    operands: jax.typing.DTypeLike | None,
) -> Array:
    """What queries, keys and values [batch, length, hidden] give."""
    shape, summed = parts[0].shape, parts[0].dtype if operands is None else jnp.float32
    split = [x.astype(operands or x.dtype) for x in parts]
    query, key, value = (x.reshape(*shape[:2], heads, -1) for x in split)
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    logits = logits * jnp.float32((shape[2] // heads) ** -0.5)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        # The lowest finite number: a row without tokens gets equal weights, not NaN.
        lowest = jnp.finfo(jnp.float32).min
        seen = (mask != 0)[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        logits = jnp.where(seen, logits, lowest)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value, preferred_element_type=summed)
    return mixed.reshape(shape)


def dense(params: Mapping[str, Array], at: str, x: Array) -> Array:
    """Computes x W^T + b for a weight `[out, in]`; b may be missing.

    Args:
      params: flat dict of parameters.
      at: what the keys of the product begin with, without the last point.
      x: [..., in].

    Returns:
      [..., out] in the dtype of the weight.
    """
    weight, bias = params[f"{at}.weight"], params.get(f"{at}.bias")
    y = matmul_transposed(x.astype(weight.dtype), weight)
    return y if bias is None else y + bias


def layer_norm(params: Mapping[str, Array], at: str, x: Array, eps: float) -> Array:
    """Normalises the last axis, then scales and shifts it.

    Args:
      params: flat dict of parameters.
      at: what the keys of the norm begin with, without the last point.
      x: [..., channels].
      eps: added to the variance.

    Returns:
      Like `x`.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred * lax.rsqrt(variance + jnp.float32(eps))
    scale = params[f"{at}.weight"].astype(jnp.float32)
    shift = params[f"{at}.bias"].astype(jnp.float32)
    return (normal * scale + shift).astype(x.dtype)


def layer_shapes(
    at: str, sizes: Sizes, keys: LayerKeys, qkv_bias: bool = True
) -> Shapes:
    """Shapes of the parameters of a layer.

    Args:
      at: what the keys of the layer begin with, without the last point.
      sizes: of the layer.
      keys: names of its parameters.
      qkv_bias: whether queries, keys and values have biases.

    Returns:
      Key -> shape.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    wanted: Shapes = {}
    for name in keys.read:
        wanted |= dense_shapes(f"{at}.{name}", hidden, hidden, qkv_bias)
    wanted |= dense_shapes(f"{at}.{keys.out}", hidden, hidden)
    wanted |= norm_shapes(f"{at}.{keys.attention_norm}", hidden)
    wanted |= dense_shapes(f"{at}.{keys.up}", inner, hidden)
    wanted |= dense_shapes(f"{at}.{keys.down}", hidden, inner)
    return wanted | norm_shapes(f"{at}.{keys.norm}", hidden)


def dense_shapes(at: str, out: int, inputs: int, bias: bool = True) -> Shapes:
    """Shapes of the parameters of a product.

    Args:
      at: what its keys begin with, without the last point.
      out: outputs.
      inputs: inputs.
      bias: whether it has a bias.

    Returns:
      Key -> shape.
    """
    weight: Shapes = {f"{at}.weight": (out, inputs)}
    return weight | ({f"{at}.bias": (out,)} if bias else {})


def norm_shapes(at: str, size: int) -> Shapes:
    """Shapes of the parameters of a norm: key -> shape."""
    return {f"{at}.weight": (size,), f"{at}.bias": (size,)}
