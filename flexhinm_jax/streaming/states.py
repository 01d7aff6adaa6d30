"""Hidden states of the calibration text between two blocks, in memory and on disk."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

Arrays = list[np.ndarray]


class States:
    """What the next block reads: of the pruned model, and of the dense one.

    All are on disk before a block is called done, so that a killed run finds them; up
    to a limit they are in memory too.
    """

    def __init__(self, folder: Path, limit: int | None, durable: bool = True):
        """Starts with none.

        Args:
          folder: where to keep them; made when needed.
          limit: bytes in memory; None for all.
          durable: False keeps on disk only what does not fit in memory.
        """
        self.folder, self.limit, self.durable = folder, limit, durable
        self.held = 0
        self.now: Arrays = []
        self.dense: Arrays | None = None

    def begin(self, made: Iterable[np.ndarray]) -> None:
        """Takes the states before the first block; both models have the same."""
        scratch = self.folder / "00000"
        shutil.rmtree(scratch, ignore_errors=True)
        for n, x in enumerate(made):
            self.now.append(self.kept(scratch / f"now-{n:05d}", x, False))

    def next(
        self,
        layer: int,
        made: Iterator[tuple[list[Any], list[Any] | None]],
        beside: bool,
    ) -> None:
        """Takes the states before block `layer`, batch by batch."""
        self.now, self.dense, self.held = [], [] if beside else None, 0
        folder = self.folder / f"{layer:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        for n, (now, dense) in enumerate(made):
            x = np.asarray(now[0])
            self.now.append(self.kept(folder / f"now-{n:05d}", x, self.durable))
            if dense is not None and self.dense is not None:
                x = np.asarray(dense[0])
                path = folder / f"dense-{n:05d}"
                self.dense.append(self.kept(path, x, self.durable))

    def kept(self, path: Path, x: np.ndarray, always: bool) -> np.ndarray:
        """The array, in memory or mapped from a file that holds it."""
        fits = self.limit is None or self.held + x.nbytes <= self.limit
        if always or not fits:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, x)
        self.held += x.nbytes if fits else 0
        return x if fits else read(path)

    def load(self, layer: int) -> None:
        """Finds the states before block `layer` on disk."""
        folder = self.folder / f"{layer:05d}"
        self.now = [read(p) for p in sorted(folder.glob("now-*"))]
        self.dense = [read(p) for p in sorted(folder.glob("dense-*"))] or None
        if not self.now:
            raise ValueError(
                f"{folder} is empty: the run cannot go on; remove"
                f" {self.folder.parent} and begin again"
            )

    def take(self) -> tuple[Arrays, Arrays | None]:
        """(pruned, dense or None where they are the same), and forgets them."""
        found = self.now, self.dense
        self.now, self.dense, self.held = [], None, 0
        return found

    def forget(self, layer: int) -> None:
        """Removes the states before block `layer` from disk."""
        shutil.rmtree(self.folder / f"{layer:05d}", ignore_errors=True)


def write(path: Path, x: np.ndarray) -> None:
    """Writes an array; numpy's own format does not know the small floats."""
    with open(path, "wb") as f:
        f.write(f"{x.dtype.name} {' '.join(map(str, x.shape))}".ljust(64).encode())
        f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())


def read(path: Path) -> np.ndarray:
    """Maps an array."""
    with open(path, "rb") as f:
        name, *shape = f.read(64).decode().split()
    raw = np.memmap(path, np.uint8, "r", offset=64)
    return raw.view(jnp.dtype(name)).reshape([int(n) for n in shape])
