"""Sentences packed into rows without padding, and a BERT encoder that runs on them.

Distillation spends its whole budget in this forward pass and its gradient, so three
things differ from `flexhinm_jax.models.encoder`, which stays the reference (they agree;
tested): several sentences share a row and attend only to themselves, so next to nothing
is computed on padding and one shape is compiled; the hidden states of all layers come
out; and matrix products may run in bfloat16 with float32 accumulation, which processors
with such instructions do at twice the pace. Parameters and everything else are float32.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flexhinm_jax.models.encoder import EncoderConfig
from flexhinm_jax.models.transformer import ACTIVATIONS

Precision = Literal["float32", "bfloat16"]


class Rows(NamedTuple):
    """Token lists side by side in rows of one length.

    Attributes:
      tokens: i32[rows, length].
      positions: i32[rows, length], place of the token in its own list.
      slots: i32[rows, length], which list of its row a token belongs to; -1 on padding.
      lists: i32[rows, slots], index of the list in each slot; -1 where there is none.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    lists: np.ndarray


def pack_rows(
    token_lists: Sequence[Sequence[int]],
    order: np.ndarray,
    *,
    length: int = 64,
    slots: int = 8,
    window: int = 512,
) -> Rows:
    """Packs lists into rows, best fit, longest first inside each window of the order.

    Args:
      token_lists: token ids, each list at most `length` long.
      order: i32[n], which lists to pack, in this order up to `window`.
      length: tokens in a row.
      slots: lists in a row, at most.
      window: lists that are packed together; rows of one window follow each other.

    Raises:
      ValueError: a list is empty or longer than a row.
    """
    packed: list[list[int]] = []
    for start in range(0, len(order), window):
        found = sorted(
            (int(j) for j in order[start : start + window]),
            key=lambda j: -len(token_lists[j]),
        )
        rows: list[list[int]] = []
        free: list[int] = []
        for j in found:
            size = len(token_lists[j])
            if not 0 < size <= length:
                raise ValueError(
                    f"list {j} has {size} tokens, allowed are 1 .. {length}; leave it"
                    " out or take longer rows"
                )
            fits = [
                r
                for r, left in enumerate(free)
                if left >= size and len(rows[r]) < slots
            ]
            if fits:
                r = min(fits, key=free.__getitem__)
                rows[r].append(j)
                free[r] -= size
            else:
                rows.append([j])
                free.append(length - size)
        packed += rows
    result = Rows(
        np.zeros((len(packed), length), np.int32),
        np.zeros((len(packed), length), np.int32),
        np.full((len(packed), length), -1, np.int32),
        np.full((len(packed), slots), -1, np.int32),
    )
    for r, members in enumerate(packed):
        at = 0
        for slot, j in enumerate(members):
            end = at + len(token_lists[j])
            result.tokens[r, at:end] = token_lists[j]
            result.positions[r, at:end] = np.arange(end - at)
            result.slots[r, at:end] = slot
            result.lists[r, slot] = j
            at = end
    return result


def take(rows: Rows, index: np.ndarray) -> Rows:
    """The rows of the given numbers."""
    return Rows(*(x[index] for x in rows))


def hidden_states(
    params: Mapping[str, Array],
    rows: Rows,
    config: EncoderConfig,
    precision: Precision = "float32",
) -> list[Array]:
    """Hidden states behind every layer, f32[rows, length, hidden] each.

    Args:
      params: flat dict of an encoder, without prefix.
      rows: packed sentences; states on padding mean nothing.
      config: sizes.
      precision: of the matrix products of the layers.
    """
    dense = functools.partial(_dense, params, precision)
    words = params["embeddings.word_embeddings.weight"][rows.tokens]
    places = params["embeddings.position_embeddings.weight"][rows.positions]
    types = params["embeddings.token_type_embeddings.weight"][0]
    x = _layer_norm(params, "embeddings.LayerNorm", words + types + places, config)
    together = rows.slots[:, :, None] == rows.slots[:, None, :]
    states = []
    for layer in range(config.num_hidden_layers):
        at = f"encoder.layer.{layer}"
        mixed = _attention(
            dense, f"{at}.attention.self", x, together, config, precision
        )
        mixed = dense(f"{at}.attention.output.dense", mixed)
        x = _layer_norm(params, f"{at}.attention.output.LayerNorm", x + mixed, config)
        inner = ACTIVATIONS[config.hidden_act](dense(f"{at}.intermediate.dense", x))
        inner = dense(f"{at}.output.dense", inner)
        x = _layer_norm(params, f"{at}.output.LayerNorm", x + inner, config)
        states.append(x)
    return states


def pool(hidden: Array, rows: Rows) -> Array:
    """Mean over the tokens of each list, unit length: f32[rows, slots, hidden].

    Zero in empty slots.
    """
    slots = jnp.arange(rows.lists.shape[1], dtype=jnp.int32)
    member = (rows.slots[:, :, None] == slots).astype(jnp.float32)
    total = jnp.einsum("rls,rlh->rsh", member, hidden)
    mean = total / jnp.maximum(jnp.sum(member, axis=1), 1.0)[..., None]
    squared = jnp.sum(mean * mean, axis=-1, keepdims=True)
    return mean * lax.rsqrt(jnp.maximum(squared, 1e-24))


def _attention(
    dense: Any,
    at: str,
    x: Array,
    together: Array,
    config: EncoderConfig,
    precision: Precision,
) -> Array:
    rows, length, hidden = x.shape
    heads = config.num_attention_heads
    dtype = jnp.dtype(precision)

    def split(name: str) -> Array:
        made = dense(f"{at}.{name}", x).astype(dtype)
        return made.reshape(rows, length, heads, -1)

    query, key, value = split("query"), split("key"), split("value")
    logits = jnp.einsum(
        "rqhd,rkhd->rhqk", query, key, preferred_element_type=jnp.float32
    )
    logits = logits * jnp.float32((hidden // heads) ** -0.5)
    logits = jnp.where(together[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
    mixed = jnp.einsum(
        "rhqk,rkhd->rqhd", weights, value, preferred_element_type=jnp.float32
    )
    return mixed.reshape(rows, length, hidden)


def _dense(
    params: Mapping[str, Array], precision: Precision, at: str, x: Array
) -> Array:
    """Computes x W^T + b for a weight `[out, in]`."""
    flat = x.reshape(-1, x.shape[-1])
    weight, bias = params[f"{at}.weight"], params[f"{at}.bias"]
    product = _low_product if precision == "bfloat16" else _product
    return (product(flat, weight) + bias).reshape(*x.shape[:-1], -1)


def _product(x: Array, weight: Array) -> Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


@jax.custom_vjp
def _low_product(x: Array, weight: Array) -> Array:
    """`_product` on operands rounded to bfloat16, forward and backward."""
    return _accumulate(_low(x), _low(weight), 1, 1)


def _low_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    x, weight = _low(x), _low(weight)
    return _accumulate(x, weight, 1, 1), (x, weight)


def _low_backward(kept: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    x, weight = kept
    ct = _low(ct)
    # XLA folds a transpose into the product, and its CPU kernel for bfloat16 does not
    # take a left side that is contracted over rows: that falls back to float32. It does
    # not fold a concatenation.
    turned = jnp.concatenate([ct.T[:1], ct.T[1:]])
    return _accumulate(ct, weight, 1, 0), _accumulate(turned, x, 1, 0)


_low_product.defvjp(_low_forward, _low_backward)


def _low(x: Array) -> Array:
    return x.astype(jnp.bfloat16)


def _accumulate(a: Array, b: Array, i: int, j: int) -> Array:
    """Contracts axis i of a with axis j of b, summed in float32."""
    axes = (((i,), (j,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _layer_norm(
    params: Mapping[str, Array], at: str, x: Array, config: EncoderConfig
) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred * lax.rsqrt(variance + jnp.float32(config.layer_norm_eps))
    return normal * params[f"{at}.weight"] + params[f"{at}.bias"]
