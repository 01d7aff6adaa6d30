"""Token lists of any length as batches of few shapes.

Every distinct shape is one compilation, so lists are sorted into length buckets and
every batch of a bucket has the same `[batch_size, length]`, the last one filled up with
empty rows. Each batch knows where its rows came from.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexhinm_jax import arguments

__all__ = ["BUCKETS", "Batch", "batches", "pad_tokens", "pieces"]

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Lengths that lists are padded to, up to the longest allowed."""


class Batch(NamedTuple):
    """A batch of padded token lists.

    Attributes:
      tokens: i32[batch_size, length].
      mask: i32[batch_size, length], 1 on real tokens.
      rows: i32[count], count <= batch_size: row r of the batch is list `rows[r]`; the
        rows behind are empty (all padding, mask 0). `results[b.rows] = y[:len(b.rows)]`
        puts results back in order.
    """

    tokens: np.ndarray
    mask: np.ndarray
    rows: np.ndarray


def batches(
    token_lists: Sequence[Sequence[int]],
    batch_size: int,
    max_length: int,
    pad_id: int = 0,
    *,
    buckets: Sequence[int] = BUCKETS,
) -> Iterator[Batch]:
    """Yields batches, shorter buckets first, the order inside a bucket unchanged.

    Args:
      token_lists: token ids, special tokens included.
      batch_size: rows of every batch.
      max_length: longest list allowed; also the longest bucket.
      pad_id: id behind the end of a list.
      buckets: lengths to pad to; those above `max_length` are not used.

    Returns:
      Batches of few shapes, every list in exactly one.

    Raises:
      ValueError: `batch_size` or `max_length` is below 1, or a list is empty or too
        long (the tokenizer has to truncate: only it knows its closing token).
    """
    if batch_size < 1 or max_length < 1:
        raise ValueError(
            f"batch_size={batch_size}, max_length={max_length}: need at least 1 each"
        )
    for row, tokens in enumerate(token_lists):
        if not 1 <= len(tokens) <= max_length:
            raise ValueError(
                f"list {row} has {len(tokens)} tokens, allowed are 1 .. {max_length};"
                " truncate in the tokenizer, which knows its closing token"
            )
    ends = np.array(sorted({*(b for b in buckets if b < max_length), max_length}))
    sizes = np.array([len(tokens) for tokens in token_lists], np.int32)
    bucket_of = np.searchsorted(ends, sizes)
    for bucket, end in enumerate(ends):
        members = np.flatnonzero(bucket_of == bucket).astype(np.int32)
        for start in range(0, members.size, batch_size):
            rows = members[start : start + batch_size]
            lists = [token_lists[row] for row in rows]
            empty = [()] * (batch_size - rows.size)
            yield Batch(*pad_tokens([*lists, *empty], int(end), pad_id), rows)


def pad_tokens(
    token_lists: Sequence[Sequence[int]], length: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pads lists on the right to one length.

    Args:
      token_lists: token ids, each list at most `length` long.
      length: length of the result.
      pad_id: id behind the end of a list.

    Returns:
      tokens i32[lists, length] and mask i32[lists, length], 1 on real tokens.

    Raises:
      ValueError: a list is longer than `length`.

    Example:
      >>> tokens, mask = pad_tokens([[5, 6], [7]], 3)
      >>> tokens.tolist(), mask.tolist()
      ([[5, 6, 0], [7, 0, 0]], [[1, 1, 0], [1, 0, 0]])
    """
    tokens = np.full((len(token_lists), length), pad_id, np.int32)
    mask = np.zeros((len(token_lists), length), np.int32)
    for row, ids in enumerate(token_lists):
        if len(ids) > length:
            raise ValueError(
                f"list {row} has {len(ids)} tokens, more than length={length}; truncate"
                " in the tokenizer, which knows its closing token"
            )
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return tokens, mask


def pieces(
    tokens: np.ndarray,
    length: int,
    count: int | None,
    most: int,
    name: str = "the calibration text",
) -> np.ndarray:
    """A text as pieces of equal length; what is left at the end is dropped.

    Args:
      tokens: i32[n], the whole text.
      length: tokens of a piece.
      count: pieces; None for all, at most `most`.
      most: see `count`.
      name: of the text, for messages.

    Returns:
      i32[pieces, length].

    Raises:
      ValueError: the text is too short.

    Example:
      >>> pieces(np.arange(7, dtype=np.int32), 3, None, 9).tolist()
      [[0, 1, 2], [3, 4, 5]]
    """
    wanted = count or 1
    if len(tokens) < wanted * length:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, {wanted} samples of"
            f" {length} need {wanted * length}; give more text,"
            f" {arguments.say('samples')} or {arguments.say('length')}"
        )
    number = min(count or most, len(tokens) // length)
    return tokens[: number * length].reshape(number, length)
