"""Attention of decoders and of the examples' vision transformer."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["attend"]


def attend(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """Values mixed by the softmax of query times key.

    `jax.nn.dot_product_attention` asks for float16 products summed in float32 by a
    precision that only GPUs have, so float16 operands are computed with in float32,
    which holds them exactly; other dtypes are computed with as they are.

    Args:
      query: [batch, queries, heads, size].
      key: [batch, keys, kv_heads, size] of the same dtype; kv_heads divides heads.
      value: like `key`.
      **options: of `jax.nn.dot_product_attention`: mask, scale and the like.

    Returns:
      [batch, queries, heads, size] in the dtype of `query`.
    """
    dtype = query.dtype
    if dtype == jnp.float16:
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, **options)
    return mixed.astype(dtype)
