"""Products on the sparse tensor cores of Hopper: 2:4, HiNM and FlexHiNM in one kernel.

A weight of one tile has its columns gathered once, outside. With more tiles every tile
reads other columns, and the kernel gathers them itself: a gathered copy of x for all
tiles would cost more traffic than the weight. Dense and 2:4 columns of a tile are one
stream (`layouts`), so they share one pass and one accumulator. Rows return to their
original places when a block stores its result.

How a product is cut (`tiling`) follows from sizes alone and has not been tuned on a
device. In-kernel gathers read x once per 64 or 128 rows: with 64 rows per tile and many
tokens that traffic, not the tensor cores, sets the pace.
"""

import dataclasses

from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.gpu import hopper, layouts, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.selfcheck import Case
from flexhinm_jax.types import PackedWeight

NAME = "wgmma_sp"

BLOCKS = 264
"""Blocks that fill the largest Hopper chip twice: 2 x 132 multiprocessors."""

LISTED = 96
"""Most steps of one block with an index list: 48 KB of shared memory."""

LIST_BYTES = 512
"""Index list of one step."""

SPARE = 2048
"""Shared memory for barriers and alignment."""

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
    """How to cut a product.

    Args:
      n: tokens.
      tiles: row tiles.
      blocks: blocks of 64 rows per tile.
      steps: steps of 64 stored columns.
    """
    if n <= 64:
        rows, groups, tokens = 1, 1, next(t for t in (16, 32, 64) if t >= n)
    elif blocks % 2 == 0:
        rows, groups, tokens = 2, 1, 128
    else:
        rows, groups, tokens = 1, 2, 64
    running = tiles * (blocks // rows) * -(-n // (tokens * groups))
    splits = min(max(1, steps // LEAST), -(-BLOCKS // running))
    if running >= BLOCKS // 2:  # one wave and a half is not worth partial sums
        splits = 1
    cuts = [hopper.Tiling(rows, groups, tokens, splits, depth) for depth in range(4, 9)]
    chip = support.SHARED_BYTES - SPARE
    if tiles > 1:
        most = min(LISTED, (chip - cuts[0].shared_bytes) // LIST_BYTES)
        splits = max(splits, -(-steps // most))
        cuts = [dataclasses.replace(cut, splits=splits) for cut in cuts]
    listed = -(-steps // splits) * LIST_BYTES if tiles > 1 else 0
    two = [c for c in cuts if c.shared_bytes + listed <= chip // 2 - SPARE]
    return two[-1] if two else cuts[0]


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
)
