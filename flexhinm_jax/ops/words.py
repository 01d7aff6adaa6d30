"""Small numbers in the bits of u32 words: the positions of N:M groups."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

WORD = 32


def position_bits(m: int) -> int:
    """Bits of one stored position: the smallest of 1, 2, 4, 8, 16 that holds m - 1."""
    need = max(1, (m - 1).bit_length())
    return 1 << (need - 1).bit_length()


def to_words(position: Array, bits: int) -> Array:
    """Packs u32[..., c] numbers of `bits` bits into u32[..., ceil(c * bits / 32)]."""
    per = WORD // bits
    words = math.ceil(position.shape[-1] / per)
    pad = [(0, 0)] * (position.ndim - 1) + [(0, words * per - position.shape[-1])]
    parts = jnp.pad(position, pad).reshape(*position.shape[:-1], words, per)
    shift = jnp.arange(per, dtype=jnp.uint32) * bits
    return jnp.sum(parts << shift, axis=-1, dtype=jnp.uint32)


def from_words(words: Any, count: int, bits: int) -> Any:
    """The first `count` numbers of `to_words`, u32[..., count]; of NumPy in NumPy."""
    shift = np.arange(0, WORD, bits, dtype=np.uint32)
    parts = (words[..., None] >> shift) & np.uint32((1 << bits) - 1)
    numbers = parts.reshape(*words.shape[:-1], words.shape[-1] * shift.size)
    return numbers[..., :count]
