"""Sentences packed into rows without padding, and a BERT encoder that runs on them.

Distillation spends its whole budget in this forward pass and its gradient, so three
things differ from `flexhinm_jax.models.encoder`, which stays the reference (they agree;
tested): several sentences share a row and attend only to themselves, so next to nothing
is computed on padding and one shape is compiled; the hidden states of all layers come
out; and matrix products may run in bfloat16 with float32 accumulation, which processors
with such instructions do at twice the pace. Parameters and everything else are float32.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flexhinm_jax.models import encoder, transformer
from flexhinm_jax.models.encoder import EncoderConfig

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
    words = params[encoder.WORDS][rows.tokens]
    places = params[encoder.POSITIONS][rows.positions]
    x = words + places + params[encoder.TYPES][0]
    x = transformer.layer_norm(params, encoder.NORM, x, config.layer_norm_eps)
    together = rows.slots[:, :, None] == rows.slots[:, None, :]
    low = {"product": _low_dense, "operands": jnp.bfloat16}
    how = low if precision == "bfloat16" else {}
    family, states = config.family, []
    for layer in range(config.num_hidden_layers):
        at = f"{family.place}.{layer}"
        x = transformer.layer(params, at, x, config, family.keys, together, **how)
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


def _low_dense(params: Mapping[str, Array], at: str, x: Array) -> Array:
    """`transformer.dense` in bfloat16, summed in float32."""
    flat = x.reshape(-1, x.shape[-1])
    y = _low_product(flat, params[f"{at}.weight"]) + params[f"{at}.bias"]
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _low_product(x: Array, weight: Array) -> Array:
    """x W^T on operands rounded to bfloat16, forward and backward."""
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
