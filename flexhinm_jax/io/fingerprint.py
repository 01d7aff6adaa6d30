"""What decides about the result of a run, as text that two runs can compare.

A folder to resume from holds such a record. A run with another record is refused with
the name of what differs, and so is a folder that an older version of the library began:
`VERSION` rises whenever the text for the same inputs changes.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "FIELD",
    "VERSION",
    "Differs",
    "check",
    "check_version",
    "digest",
    "key_words",
    "record",
]

VERSION = 3
FIELD = "fingerprint"
"""Name of the version in a record."""


class Differs(ValueError):
    """A folder was begun by a run that was asked for something else.

    Attributes:
      where: the folder.
      parts: name -> (text of the run that began it, text of this one); None in place of
        a text that a record does not have.
    """

    def __init__(self, where: Any, parts: Mapping[str, tuple[Any, Any]]):
        """Names the parts that differ."""
        self.where, self.parts = where, dict(parts)
        pairs = [
            f"{name}={saved}, this run has {now}"
            for name, (saved, now) in self.parts.items()
        ]
        super().__init__(
            f"resume: {where} was begun with {'; '.join(pairs)}; give the same"
            " arguments or another folder, or remove this one to begin anew"
        )


def record(**parts: Any) -> dict[str, str]:
    """One text for each named part of what a run depends on.

    Args:
      **parts: strings as they are, PRNG keys as their words, trees that hold arrays as
        a `digest`, anything else as its `repr`.

    Returns:
      name -> text, and the version of the fingerprint itself.
    """
    return {FIELD: str(VERSION)} | {name: _text(x) for name, x in parts.items()}


def check(saved: Mapping[str, Any], now: Mapping[str, Any], where: Any) -> None:
    """Compares the records of two runs.

    Args:
      saved: the record of the run that began the folder.
      now: that of this run.
      where: the folder, for the message.

    Raises:
      Differs: they differ; it names all parts that do.
      ValueError: the first is of another version.
    """
    check_version(saved, where)
    pairs = {name: (saved.get(name), now.get(name)) for name in sorted({*saved, *now})}
    parts = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if parts:
        raise Differs(where, parts)


def check_version(saved: Mapping[str, Any], where: Any) -> None:
    """Compares the version of a record.

    Args:
      saved: the record.
      where: file or folder, for the message.

    Raises:
      ValueError: it is another one than that of this file.
    """
    if saved.get(FIELD) != str(VERSION):
        raise ValueError(
            f"resume: {where} was begun by another version of flexhinm_jax, with "
            f"fingerprints of version {saved.get(FIELD, 1)}; this one has version "
            f"{VERSION}. Finish it with that version, remove it, or give another folder"
        )


def digest(tree: Any) -> str:
    """A checksum of all arrays of a tree, of its structure and of what is no array.

    Of an array that is spread over several processes, shape and dtype alone are read.
    """
    leaves, structure = jax.tree.flatten(tree)
    total = zlib.crc32(str(structure).encode())
    for leaf in leaves:
        if not _is_array(leaf):
            total = zlib.crc32(repr(leaf).encode(), total)
            continue
        x = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        total = zlib.crc32(f"{x.dtype}{x.shape}".encode(), total)
        if getattr(x, "is_fully_addressable", True):
            value = np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)
            total = zlib.crc32(value.data, total)
    return f"{total:08x}"


def key_words(key: Any) -> list[int]:
    """A PRNG key, typed or raw, as numbers."""
    words = jax.random.key_data(key) if _is_key(key) else key
    return [int(word) for word in np.asarray(words).ravel()]


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if _is_key(part):
        return str(key_words(part))
    return digest(part) if any(map(_is_array, jax.tree.leaves(part))) else repr(part)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
