"""Small numbers in the bits of u32 words: the positions of N:M groups."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32


def position_bits(m: int) -> int:
    """Bits of one stored position: the smallest of 1, 2, 4, 8, 16 that holds m - 1."""
    need = max(1, (m - 1).bit_length())
    return 1 << (need - 1).bit_length()


def to_words(numbers: Any, bits: int) -> Any:
    """Packs u32[..., c] numbers of `bits` bits into u32[..., ceil(c * bits / 32)].

    Numbers lie one after the other, low bits first; where `bits` does not divide a word
    some lie in two. Of NumPy in NumPy.
    """
    numpy = jnp if isinstance(numbers, jax.Array) else np
    # The least number of words that numbers fill without a rest.
    words = bits // math.gcd(bits, WORD)
    per = words * WORD // bits
    count = numbers.shape[-1]
    blocks = -(-count // per)
    pad = [(0, 0)] * (numbers.ndim - 1) + [(0, blocks * per - count)]
    parts = numpy.pad(numbers, pad).reshape(*numbers.shape[:-1], blocks, per)
    filled = []
    for word in range(words):
        value = numpy.zeros(parts.shape[:-1], np.uint32)
        for k in range(word * WORD // bits, -(-(word + 1) * WORD // bits)):
            shift = k * bits - word * WORD
            part = parts[..., k]
            value |= (
                part << np.uint32(shift) if shift >= 0 else part >> np.uint32(-shift)
            )
        filled.append(value)
    whole = numpy.stack(filled, axis=-1).reshape(*numbers.shape[:-1], blocks * words)
    return whole[..., : -(-count * bits // WORD)]


def from_words(words: Any, count: int, bits: int) -> Any:
    """The first `count` numbers of `to_words`, u32[..., count]; of NumPy in NumPy."""
    mask = np.uint32((1 << bits) - 1)
    if WORD % bits == 0:
        shift = np.arange(0, WORD, bits, dtype=np.uint32)
        parts = (words[..., None] >> shift) & mask
        numbers = parts.reshape(*words.shape[:-1], words.shape[-1] * shift.size)
        return numbers[..., :count]
    start = np.arange(count, dtype=np.int32) * bits
    word, shift = start // WORD, (start % WORD).astype(np.uint32)
    # What the next word adds to a number that lies in one lies above it.
    after = np.minimum(word + 1, max(words.shape[-1] - 1, 0))
    high = (words[..., after] << np.uint32(1)) << (np.uint32(WORD - 1) - shift)
    return ((words[..., word] >> shift) | high) & mask
