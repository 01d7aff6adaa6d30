"""Predicted nanoseconds of a product on a CPU: which program runs it.

The rates are fitted to products of 576 x 576 to 4096 x 4096 in float32, 2:4 and 75 %
FlexHiNM, on one core of a Zen 3 (AVX2). They need not be right to the nanosecond: where
a packed form and the dense product are close, the dense one runs (`MARGIN`), so a
weight that holds its matrix as well is as fast as that where it chooses dense.

Weights that come from memory cost a packed form less than the dense product, which
reads two to four times the bytes: `Place` says whether they do not. With one row of x
threads share the dense product and the one with the canonical arrays, but not the short
loops over packed terms; with more rows they share those too where they are long.
"""

import dataclasses
import os
from typing import NamedTuple

from flexhinm_jax.kernels import dense as held
from flexhinm_jax.types import PackedWeight

CACHE = 1 << 24
"""Bytes of dense matrices up to which the weights of a tree stay in the cache."""

MARGIN = 0.95
"""A packed form runs where it is predicted below this part of the dense time."""

FEW, MOST = 6, 32
"""Positions select up to so many rows of x, and products n * m of a group."""

THREADS, THREADS_ALONE = 1.8, 1.5
"""How many times faster two threads make the dense product; the one of one row of x."""

LONG = 5e5
"""Nanoseconds from which threads make packed products as much faster."""

MEMORY = 0.19
"""Nanoseconds in which memory gives a float32, to however many threads."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of rows of x that `prepare` asks about."""


class Place(NamedTuple):
    """Where products with a weight run.

    Attributes:
      cached: the weights of its tree stay in the cache between products.
      threads: that a program has, 1 or more.
    """

    cached: bool = True
    threads: int = 1


def threads() -> int:
    """Threads of a program on the CPU, as XLA counts them."""
    told = os.environ.get("NPROC", "")
    if told.isdecimal():
        return int(told)
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A product with one packed matrix.

    Attributes:
      rows: of x.
      outputs: rows of the matrix.
      inputs: columns of the matrix.
      stored: values that it stores.
      columns: inputs that its tiles read, all tiles together.
      selects: its groups are small enough for positions to select.
      cached: it is in the cache before the product.
      threads: of the program.
    """

    rows: int
    outputs: int
    inputs: int
    stored: int
    columns: int
    selects: bool
    cached: bool
    threads: int = 1

    @staticmethod
    def of(rows: int, packed: PackedWeight, place: Place) -> "Sizes":
        """Those of a matrix of any stack; a matrix beyond the cache is not in it."""
        whole = packed.filled()
        assert whole.dense_index is not None and whole.nm_index is not None
        assert whole.nm_values is not None
        dense, groups = whole.dense_index.shape[-1], whole.nm_index.shape[-1]
        outputs, inputs = packed.shape
        return Sizes(
            rows,
            outputs,
            inputs,
            outputs * (dense + whole.nm_values.shape[-1]),
            packed.tiles * (dense + groups),
            selects(packed),
            place.cached and 4 * outputs * inputs <= CACHE,
            place.threads,
        )


def selects(packed: PackedWeight) -> bool:
    """Whether positions can select among the inputs of a group."""
    return packed.n * packed.m <= MOST


def dense(sizes: Sizes) -> float:
    """The product with the matrix as a weight holds it (`dense.WIDE`)."""
    rows = sizes.rows
    each = 0.13 if rows == 1 else 0.16 + 0.035 * rows
    if not sizes.cached and sizes.inputs > held.WIDE:
        each = 0.2 if rows == 1 else 0.45 + 0.0275 * rows
    elif not sizes.cached:
        each += 0.165 if rows == 1 else 0.4 * min(1.0, 16 / rows)
    if sizes.threads > 1:
        each /= THREADS_ALONE if rows == 1 else THREADS
        each = max(each, 0 if sizes.cached else MEMORY)
    return each * sizes.outputs * sizes.inputs


def select(sizes: Sizes) -> float:
    """The prepared product in which positions select (`terms.select`)."""
    each = 0.2 * sizes.rows + (0 if sizes.cached else 0.25)
    return 40e3 + each * sizes.stored + 2 * sizes.rows * sizes.columns


def canonical(sizes: Sizes) -> float:
    """The product of one row with the arrays of files (`xla`), on two threads."""
    return 15e3 + 0.35 * sizes.stored


def gather(sizes: Sizes) -> float:
    """The prepared product in which values read rows of x^T (`terms.gather`)."""
    rows = max(16, -(-sizes.rows // 8) * 8)
    each = 1.0 + 0.045 * rows
    moved = rows * (sizes.outputs + sizes.inputs)
    return 60e3 + moved + each * sizes.stored


def prepared(sizes: Sizes) -> float:
    """The product of a weight that is prepared, as `xla.matmul` takes it."""
    if reads_canonical(sizes.rows, sizes.selects, sizes.threads):
        return canonical(sizes)
    few = sizes.selects and sizes.rows <= FEW
    time = select(sizes) if few else gather(sizes)
    return time / THREADS if sizes.threads > 1 and time > LONG else time


def reads_canonical(rows: int, selects: bool, threads: int) -> bool:
    """Whether a prepared product reads the canonical arrays in place of the terms.

    Two threads take 42, 117 and 136 us for 576 x 576, 1536 x 576 and 576 x 1536 at
    75 %, with the terms 61, 117 and 207; one thread 60, 128 and 123, and 61, 99, 140.
    """
    return rows == 1 and selects and threads > 1


def holds(rows: int, packed: PackedWeight, place: Place) -> bool:
    """Whether so many rows of x run faster with the matrix itself than prepared."""
    sizes = Sizes.of(rows, packed, place)
    return prepared(sizes) > MARGIN * dense(sizes)
