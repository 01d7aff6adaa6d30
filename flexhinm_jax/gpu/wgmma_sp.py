"""Products on the sparse tensor cores of Hopper: 2:4, HiNM and FlexHiNM in one kernel.

A weight of one tile has its columns gathered once, outside. With more tiles every tile
reads other columns, and the kernel gathers them itself: a gathered copy of x for all
tiles would cost more traffic than the weight. Dense and 2:4 columns of a tile are one
stream (`layouts`), so they share one pass and one accumulator. Rows return to their
original places when a block stores its result.

How a product is cut (`tiling`) is what `cost` predicts to be fastest; nothing has been
tuned on a device. In-kernel gathers read x once per 64 or 128 rows: with 64 rows per
tile and many tokens that traffic, not the tensor cores, sets the pace.
"""

import dataclasses
from collections.abc import Iterator

from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.gpu import cost, hopper, layouts, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.layouts import ROWS, STEP
from flexhinm_jax.gpu.selfcheck import Case
from flexhinm_jax.types import PackedWeight

NAME = "wgmma_sp"

LISTED = 96
"""Most steps of one block with an index list: 48 KB of shared memory."""

LIST_BYTES = 512
"""Index list of one step."""

SPARE = 2048
"""Shared memory for barriers and alignment."""

CHIP = support.SHARED_BYTES - SPARE

MOST_SLOTS = 8
"""More are not needed to have memory in flight."""

MOST_SPLITS = 16
"""More blocks add more partial sums than they bring multiprocessors."""

PARTIAL_SHARE = 0.25
"""Most bytes of partial sums, of those of the weight."""

LEAST = 4
"""Fewest steps that are worth a block of their own."""


def prepare(packed: PackedWeight) -> dict[str, Array]:
    """The arrays that `matmul` reads: `layouts.tiles`."""
    return layouts.tiles(packed)


def matmul(
    x: Array,
    packed: PackedWeight,
    dtype: DTypeLike,
    cut: hopper.Tiling | None = None,
) -> Array:
    """Sparse core x [N, i] @ S^T -> [N, o], accumulated in float32."""
    ready = packed.layouts[NAME]
    n = x.shape[0]
    tiles, blocks, steps = ready["meta"].shape[:3]
    cut = cut or tiling(n, tiles, blocks, steps)
    x = support.pad_rows(x, cut.width)
    values, index = ready["values"].astype(x.dtype), ready["index"]
    if tiles == 1:
        x, index = layouts.gather(x, index.reshape(-1)), None
    else:
        x = x.T
    y = hopper.product(
        values, ready["meta"], x, ready["order"], packed.shape[0], dtype, cut, index
    )
    return y[:, :n].T


def tiling(n: int, tiles: int, blocks: int, steps: int) -> hopper.Tiling:
    """How to cut a product: the way that is predicted to be fastest.

    Args:
      n: tokens.
      tiles: row tiles.
      blocks: blocks of 64 rows per tile.
      steps: steps of 64 stored columns.
    """
    return min(_cuts(n, tiles, blocks, steps))[-1]


def _cuts(
    n: int, tiles: int, blocks: int, steps: int
) -> Iterator[tuple[float, int, hopper.Tiling]]:
    """(predicted seconds, number, cut) of every cut that fits the chip.

    More splits than the fewest that fit must not write many partial sums.
    """
    gathered, stored = tiles > 1, STEP * steps
    sizes = cost.Sizes(n, tiles * blocks * ROWS, 2 * stored, tiles, stored, 2 * stored)
    spare = PARTIAL_SHARE * sizes.o * steps * (2 * STEP + 16)
    number = 0
    for rows, groups, tokens in _forms(n, blocks, gathered):
        fewest = None
        for splits in range(1, max(MOST_SPLITS, steps // LEAST) + 1):
            cut = hopper.Tiling(rows, groups, tokens, splits)
            depth, resident = _room(cut, steps if gathered else 0)
            if not depth:
                continue
            block = cost.Block(rows, groups, tokens, splits, resident)
            fewest = fewest or splits
            worth = splits <= MOST_SPLITS and splits * LEAST <= steps
            partial = cost.partial_bytes(sizes, block)
            if splits == fewest or (worth and partial <= spare):
                number += 1
                cut = dataclasses.replace(cut, depth=depth)
                yield cost.sparse(sizes, block, steps, tiles * blocks), number, cut


def _room(cut: hopper.Tiling, listed: int) -> tuple[int, int]:
    """Slots and blocks of a multiprocessor: two if they fit, (0, 0) if none does.

    Args:
      cut: with the fewest slots.
      listed: steps of a tile with an index list.
    """
    per = -(-listed // cut.splits)
    lists, slot = per * LIST_BYTES, cut.shared_bytes // cut.depth
    two = (CHIP // 2 - SPARE - lists) // slot
    if two >= cut.depth:
        return min(two, MOST_SLOTS), 2
    fits = per <= LISTED and cut.shared_bytes + lists <= CHIP
    return (cut.depth, 1) if fits else (0, 0)


def _forms(n: int, blocks: int, gathered: bool) -> Iterator[tuple[int, int, int]]:
    """(row groups, token groups, tokens) that suit a number of tokens."""
    pairs = (1, 2) if blocks % 2 == 0 else (1,)
    # A gather brings 16 bytes at a time, which swizzling needs twice: 16 tokens.
    few = next((t for t in (8, 16, 32, 64) if t >= n and not (gathered and t == 8)), 0)
    if few:
        yield from ((rows, 1, few) for rows in pairs)
    elif 2 in pairs:
        yield 2, 1, 128
    else:
        yield 1, 2, 64


def seconds(n: int, packed: PackedWeight) -> float:
    """Predicted seconds of `matmul`."""
    tiles, blocks, steps = packed.layouts[NAME]["meta"].shape[:3]
    return min(_cuts(n, tiles, blocks, steps))[0]


RING = hopper.Tiling(depth=4)
"""The shallowest pipeline: 40 steps fill each of its slots ten times."""

CASES = (
    Case(1, 72, 0, 100, 70),
    Case(3, 40, 6, 36, 11),
    Case(1, 64, 0, 1312, 5, "float16", dataclasses.replace(RING, tokens=8)),
    Case(1, 128, 0, 1310, 130, "bfloat16", dataclasses.replace(RING, row_groups=2)),
    Case(
        2,
        64,
        70,
        1300,
        70,
        "float16",
        dataclasses.replace(RING, token_groups=2, tokens=32, splits=3),
    ),
    Case(2, 128, 6, 1300, 130, "bfloat16", hopper.Tiling(2, 1, 128, 2)),
)
"""Ragged sizes; then whole rings, splits and every form of two warpgroups."""

KERNEL = Kernel(
    NAME,
    prepare,
    matmul,
    majors=(9,),
    cases=CASES,
    module=__name__,
    seconds=seconds,
)
