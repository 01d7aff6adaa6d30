"""Hidden states of the calibration text between two blocks, in memory and on disk."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax.io.shelf import Shelf, Stored

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
        self.shelf = Shelf(limit)
        self.now: list[Any] = []
        self.dense: list[Any] | None = None

    def begin(self, made: Iterable[np.ndarray]) -> None:
        """Takes the states before the first block; both models have the same."""
        self.forget(0)
        self.now = [
            self.shelf.put(x, self.path(0, "now", n)) for n, x in enumerate(made)
        ]

    def next(
        self,
        layer: int,
        made: Iterator[tuple[list[Any], list[Any] | None]],
        beside: bool,
    ) -> None:
        """Takes the states before block `layer`, batch by batch."""
        self.forget(layer)
        self.now, self.dense = [], [] if beside else None
        for n, (now, dense) in enumerate(made):
            pairs = (("now", self.now, now), ("dense", self.dense, dense))
            for name, kept, arrays in pairs:
                if kept is not None and arrays is not None:
                    path, x = self.path(layer, name, n), np.asarray(arrays[0])
                    kept.append(self.shelf.put(x, path, durable=self.durable))

    def path(self, layer: int, name: str, n: int) -> Path:
        """File of the states of batch `n` before a block."""
        return self.folder / f"{layer:05d}" / f"{name}-{n:05d}"

    def load(self, layer: int) -> None:
        """Finds the states before block `layer` on disk."""
        folder = self.folder / f"{layer:05d}"
        self.now = [Stored(p) for p in sorted(folder.glob("now-*"))]
        self.dense = [Stored(p) for p in sorted(folder.glob("dense-*"))] or None
        if not self.now:
            raise ValueError(
                f"{folder} is empty: the run cannot go on; remove"
                f" {self.folder.parent} and begin again"
            )

    def take(self) -> tuple[Arrays, Arrays | None]:
        """(pruned, dense or None where they are the same), and forgets them."""
        now, dense = self.now, self.dense
        self.now, self.dense, self.shelf = [], None, Shelf(self.limit)

        def mapped(arrays: list[Any]) -> Arrays:
            return [x.mapped() if isinstance(x, Stored) else x for x in arrays]

        return mapped(now), None if dense is None else mapped(dense)

    def forget(self, layer: int) -> None:
        """Removes the states before block `layer` from disk."""
        shutil.rmtree(self.folder / f"{layer:05d}", ignore_errors=True)
