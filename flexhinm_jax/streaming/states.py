"""Hidden states of the calibration text between two blocks, in memory and on disk."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax.io.shelf import Shelf, Stored

Arrays = list[np.ndarray]


class States:
    """What the next block reads: of the pruned model, and of the dense one.

    All are on disk before a block is called done, so that a killed run finds them; up
    to a limit they are in memory too. Files are named by the number of the batch, so
    that several processes share a folder, and as many others go on from it.
    """

    def __init__(
        self,
        folder: Path,
        limit: int | None,
        numbers: Sequence[int],
        durable: bool = True,
    ):
        """Starts with none.

        Args:
          folder: where to keep them; made when needed.
          limit: bytes in memory; None for all.
          numbers: of the batches of this process.
          durable: False keeps on disk only what does not fit in memory.
        """
        self.folder, self.limit, self.durable = folder, limit, durable
        self.numbers = numbers
        self.shelf = Shelf(limit)
        self.now: list[Any] = []
        self.dense: list[Any] | None = None

    def begin(self, arrays: Iterable[np.ndarray]) -> None:
        """Takes the states before the first block; both models have the same."""
        self.forget(0)
        self.now = [
            self.shelf.put(x, self.path(0, "now", n))
            for n, x in zip(self.numbers, arrays, strict=True)
        ]

    def next(
        self,
        layer: int,
        outputs: Iterator[tuple[list[Any], list[Any] | None]],
        beside: bool,
    ) -> None:
        """Takes the states before block `layer`, batch by batch."""
        self.forget(layer)
        self.now, self.dense = [], [] if beside else None
        for n, (now, dense) in zip(self.numbers, outputs, strict=True):
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
        paths = [self.path(layer, "now", n) for n in self.numbers]
        twins = [self.path(layer, "dense", n) for n in self.numbers]
        missing = [p for p in paths if not p.exists()]
        if missing:
            raise ValueError(
                f"{missing[0]} is missing: the run cannot go on; remove"
                f" {self.folder.parent} and begin again"
            )
        self.now = [Stored(p) for p in paths]
        self.dense = [Stored(p) for p in twins if p.exists()] or None

    def take(self) -> tuple[Arrays, Arrays | None]:
        """(pruned, dense or None where they are the same), and forgets them."""
        now, dense = self.now, self.dense
        self.now, self.dense, self.shelf = [], None, Shelf(self.limit)

        def mapped(arrays: list[Any]) -> Arrays:
            return [x.mapped() if isinstance(x, Stored) else x for x in arrays]

        return mapped(now), None if dense is None else mapped(dense)

    def forget(self, layer: int) -> None:
        """Removes the states before block `layer` from disk."""
        for n in self.numbers:
            for name in ("now", "dense"):
                self.path(layer, name, n).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds those of other processes
            (self.folder / f"{layer:05d}").rmdir()
