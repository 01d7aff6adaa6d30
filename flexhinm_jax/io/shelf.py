"""Arrays kept in memory up to a limit, and in files beyond it.

A file holds one array of any dtype: first dtype and shape in 128 bytes, then its bytes.
NumPy's own format does not know the small floating-point formats.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax import atomic

__all__ = ["Shelf", "Stored", "store"]

HEADER_BYTES = 128


class Shelf:
    """Keeps arrays in memory up to a limit, and on disk beyond it.

    Attributes:
      held: bytes in memory now.
      peak: the most there ever were.
    """

    def __init__(self, limit: int | None, folder: Path | None = None):
        """Keeps `limit` bytes in memory; any number for None.

        Args:
          limit: bytes.
          folder: exists; where the rest goes, in a folder of its own that is removed
            at the end. None for the system's place for temporary files.
        """
        self.limit, self.where = limit, folder
        self.held = self.peak = 0
        self.folder: tempfile.TemporaryDirectory | None = None
        self.number = itertools.count()
        self.on_host = jax.default_backend() == "cpu"

    def put(self, x: Any, path: Path | None = None, *, durable: bool = False) -> Any:
        """Takes an array; the result is for `get` and `drop`.

        Args:
          x: the array. One that is mapped from a file is on disk already and stays.
          path: its file where it goes to disk, which the caller removes; None for a
            temporary one.
          durable: writes the file in any case, and waits until it is on the disk.
        """
        if isinstance(x, np.memmap | Stored):
            return x
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
        fits = is_key or self.limit is None or self.held + x.nbytes <= self.limit
        if durable or not fits:
            stored = store(path or self._temporary(), x, durable=durable)
            if not fits:
                return stored
        self.held += x.nbytes
        self.peak = max(self.peak, self.held)
        return x if is_key or self.on_host else np.asarray(x)

    def get(self, kept: Any) -> Any:
        """The array."""
        return kept.read() if isinstance(kept, Stored) else kept

    def drop(self, kept: Any) -> None:
        """Forgets an array."""
        if isinstance(kept, Stored):
            if self.folder and kept.path.parent == Path(self.folder.name):
                kept.path.unlink()
        elif not isinstance(kept, np.memmap):
            self.held -= kept.nbytes

    def wait(self, arrays: Any) -> None:
        """Lets a step end before the next begins, where memory is limited.

        A step that is only dispatched holds its scratch already, one per batch.
        """
        if self.limit is not None:
            jax.block_until_ready(arrays)

    def trim(self) -> None:
        """Gives what the C library keeps of freed memory back, where it is limited."""
        if self.limit is not None and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    def close(self) -> None:
        """Removes the temporary files."""
        if self.folder is not None:
            self.folder.cleanup()

    def _temporary(self) -> Path:
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(
                prefix="flexhinm-", dir=self.where
            )
        return Path(self.folder.name, f"{next(self.number)}.bin")


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a file that `store` wrote.

    Attributes:
      path: the file.
    """

    path: Path

    def read(self) -> np.ndarray:
        """A copy in memory.

        Better than `mapped` where it is forgotten soon: what was looked at of a mapped
        array counts as memory of the process until the last reference is gone.
        """
        with open(self.path, "rb") as f:
            dtype, shape = _form(f.read(HEADER_BYTES))
            return np.fromfile(f, np.uint8).view(dtype).reshape(shape)

    def mapped(self) -> np.ndarray:
        """The array, read-only; its pages are read when looked at."""
        with open(self.path, "rb") as f:
            dtype, shape = _form(f.read(HEADER_BYTES))
        if 0 in shape:  # there is nothing to map
            return np.zeros(shape, dtype)
        raw = np.memmap(self.path, np.uint8, "r", offset=HEADER_BYTES)
        return raw.view(dtype).reshape(shape)


def store(path: Path, x: Any, *, durable: bool = True) -> Stored:
    """Writes an array.

    Args:
      path: file to make or replace; missing parents are created.
      x: of any shape and dtype that NumPy holds.
      durable: waits until the array is on the disk; the file appears whole.

    Returns:
      Where it is.

    Raises:
      OSError: the disk is full or not writable.
    """
    host = np.asarray(x)
    head = f"{host.dtype.name} {' '.join(map(str, host.shape))}".encode()
    assert len(head) <= HEADER_BYTES, f"{path}: an array of {host.ndim} axes"

    def fill(target: Path) -> None:
        with open(target, "wb") as f:
            f.write(head.ljust(HEADER_BYTES))
            f.write(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)

    if durable:
        with atomic.file(path, overwrite=True) as temporary:
            fill(temporary)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(path)
    return Stored(path)


def _form(head: bytes) -> tuple[np.dtype, list[int]]:
    name, *shape = head.decode().split()
    return jnp.dtype(name), [int(n) for n in shape]
