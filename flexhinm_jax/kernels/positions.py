"""How a packed weight stores which n of every m columns a group keeps.

A 2:4 group is the nibble `i0 | i1 << 2` with i0 < i1: four bits where three would do,
but these are the metadata that sparse tensor cores read. Every other group is one
number, the rank of its positions p0 < p1 < ... among all n-subsets of m

    rank = C(p0, 1) + C(p1, 2) + ... + C(p[n-1], n)

(combinatorial number system), in the least number of bits that holds C(m, n) - 1: 5
instead of 24 for 6:8, 14 instead of 32 for 8:16. The complement of a subset needs no
code of its own, as C(m, n) = C(m, m - n). Groups with more than 2**32 subsets store
every position. Codes lie one after the other, low bits first, across the borders of
u32 words; every row of a tile starts a new word.

All functions take NumPy arrays as well as JAX arrays and return the same kind.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.ops.words import WORD, from_words, position_bits, to_words

MAX_TABLE = 1 << 14
"""Subsets up to which ranks are looked up; 8:16 has 12870."""


def subsets(n: int, m: int) -> int | None:
    """Number of ranks of a group, or None where every position is stored."""
    count = math.comb(m, n)
    return None if (n, m) == (2, 4) or count > 1 << WORD else count


def group_bits(n: int, m: int) -> int:
    """Bits that the positions of one group take.

    Example:
      >>> [group_bits(n, m) for n, m in ((2, 4), (4, 8), (6, 8), (8, 16), (16, 32))]
      [4, 7, 5, 14, 30]
    """
    count = subsets(n, m)
    return n * position_bits(m) if count is None else max(1, (count - 1).bit_length())


def encode(position: Any, n: int, m: int) -> Any:
    """The positions of the groups of every row as words.

    Args:
      position: u32[..., groups * n], strictly increasing in every group.
      n: kept of each group.
      m: group size.

    Returns:
      u32[..., words].
    """
    if subsets(n, m) is None:
        return to_words(position, position_bits(m))
    groups = position.reshape(*position.shape[:-1], position.shape[-1] // n, n)
    return to_words(rank(groups, m), group_bits(n, m))


def decode(words: Any, groups: int, n: int, m: int) -> Any:
    """The positions of the first groups of every row: u32[..., groups * n]."""
    bits = position_bits(m)
    if subsets(n, m) is None:
        return from_words(words, groups * n, bits)
    if n * bits <= WORD and math.comb(m, n) <= MAX_TABLE:
        shift = np.arange(n, dtype=np.uint32) * np.uint32(bits)
        joint = decode_joint(words, groups, n, m)
        position = (joint[..., None] >> shift) & np.uint32((1 << bits) - 1)
    else:
        position = subset(ranks(words, groups, n, m), n, m)
    return position.reshape(*position.shape[:-2], groups * n)


def decode_joint(words: Any, groups: int, n: int, m: int) -> Any:
    """All positions of a group in one number, `position_bits(m)` each, low bits first.

    Args:
      words: u32[..., words].
      groups: of every row.
      n: kept of each group; all positions fit a word.
      m: group size; at most `MAX_TABLE` subsets.

    Returns:
      u32[..., groups].
    """
    if subsets(n, m) is None:
        return from_words(words, groups, n * position_bits(m))
    rank, table = ranks(words, groups, n, m), _joint_positions(n, m)
    if isinstance(rank, jax.Array):
        return jnp.asarray(table).at[rank].get(mode="promise_in_bounds")
    return table[rank]


def ranks(words: Any, groups: int, n: int, m: int) -> Any:
    """The ranks of the first groups of every row: u32[..., groups]."""
    return from_words(words, groups, group_bits(n, m))


def rank(position: Any, m: int) -> Any:
    """The rank of every subset: u32[..., n] increasing positions to u32[...]."""
    n = position.shape[-1]
    numpy = jnp if isinstance(position, jax.Array) else np
    table = [[math.comb(p, k + 1) for k in range(n)] for p in range(m)]
    # Positions of a subset have C(p[k], k + 1) < C(m, n): larger ones are never read.
    table = np.asarray(np.minimum(table, (1 << WORD) - 1), np.uint32)
    terms = numpy.asarray(table)[position, np.arange(n, dtype=np.int32)]
    return numpy.sum(terms, axis=-1, dtype=np.uint32)


def subset(rank: Any, n: int, m: int) -> Any:
    """The positions of every rank: u32[...] to u32[..., n], inverse of `rank`.

    The last position is the largest p with C(p, n) <= rank; the rest of the rank says
    the others. Both are sums of comparisons with constants, C(p, k + 1) growing in
    steps of C(p - 1, k).
    """
    numpy = jnp if isinstance(rank, jax.Array) else np
    positions = []
    for k in reversed(range(n)):
        position, rest = numpy.full_like(rank, k), rank
        for p in range(k + 1, m - n + k + 1):
            above = (rank >= np.uint32(math.comb(p, k + 1))).astype(np.uint32)
            position = position + above
            rest = rest - above * np.uint32(math.comb(p - 1, k))
        positions.append(position)
        rank = rest
    return numpy.stack(positions[::-1], axis=-1)


@functools.cache
def _joint_positions(n: int, m: int) -> np.ndarray:
    """Rank -> all positions in one number: u32[C(m, n)]."""
    position = subset(np.arange(math.comb(m, n), dtype=np.uint32), n, m)
    shift = np.arange(n, dtype=np.uint32) * np.uint32(position_bits(m))
    return np.asarray(np.sum(position << shift, axis=-1, dtype=np.uint32))
