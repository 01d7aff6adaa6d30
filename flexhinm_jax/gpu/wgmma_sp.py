"""Products on the sparse tensor cores of Hopper: 2:4, HiNM and FlexHiNM in one kernel.

Columns in their own order need no index: x is read as it is. Other columns of a weight
of one tile are gathered once, outside. With more tiles every tile reads other columns,
and the kernel gathers them itself: a gathered copy of x for all tiles would cost more
traffic than the weight. With few tokens x lies in shared memory, once per block, and
the index lists come beside the metadata. Dense and 2:4 columns of a tile are one stream
(`layouts`), so they share one pass and one accumulator. Rows return to their original
places when a block stores its result.

How a product is cut (`tiling`) is what `cost` predicts to be fastest; nothing has been
tuned on a device. Where all blocks read the same columns, those of a cluster fetch x
together. In-kernel gathers read x once per 64 or 128 rows: with 64 rows per tile and
many tokens that traffic, not the tensor cores, sets the pace.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import DTypeLike

from flexhinm_jax.gpu import cost, layouts, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.layouts import ROWS, STEP
from flexhinm_jax.gpu.selfcheck import Case
from flexhinm_jax.gpu.tilings import MOST_BLOCKS, MOST_SPLIT, Source, Tiling
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

MOST_HELD = 16
"""Tokens of which all of x may lie in shared memory."""

COPIED = 32
"""Tokens of a block up to which threads copy x that fills no whole tile."""

PARTIAL_SHARE = 0.25
"""Most bytes of sums that blocks read from others, of those of the weight."""

LEAST = 4
"""Fewest steps that are worth a block of their own."""


class Shape(NamedTuple):
    """Sizes of a layout.

    Attributes:
      tiles: row tiles.
      blocks: blocks of 64 rows per tile.
      steps: steps of 64 stored columns.
      inputs: of the matrix.
      plain: its columns are in their own order.
    """

    tiles: int
    blocks: int
    steps: int
    inputs: int
    plain: bool = False

    def ready(self, n: int, cut: Tiling) -> bool:
        """Whether x is the stream as it is: its order, its end, and whole tiles."""
        whole = self.plain and self.inputs == 2 * STEP * self.steps
        return whole and n % cut.tokens == 0

    def source(self, n: int, cut: Tiling) -> Source:
        """How activations of n tokens come."""
        if self.plain:
            streams = self.ready(n, cut) or cut.tokens > COPIED
            return Source.STREAM if streams else Source.PLAIN
        if cut.held and self.inputs % 8 == 0:
            return Source.HELD
        return Source.STREAM if self.tiles == 1 else Source.LISTED


def shape(packed: PackedWeight) -> Shape:
    """Sizes of the layout of a prepared weight."""
    ready = packed.layouts[NAME]
    tiles, blocks, steps, _ = ready["meta"].shape
    return Shape(tiles, blocks, steps, packed.shape[1], "index" not in ready)


def prepare(packed: PackedWeight) -> dict[str, Array]:
    """The arrays that `matmul` reads: `layouts.tiles`."""
    return layouts.tiles(packed)


def settle(ready: dict[str, Array], packed: PackedWeight) -> dict[str, Array]:
    """Without the index list where it is the identity, in every matrix of a stack.

    Args:
      ready: `prepare`, may have leading axes.
      packed: what it was made of.
    """
    index, inputs = ready["index"], packed.shape[1]
    if isinstance(index, Tracer) or index.shape[-3] != 1 or inputs % 8:
        return ready
    place = np.arange(index.shape[-2] * index.shape[-1])
    plain = np.where(place < inputs, place, layouts.ABSENT)
    same = np.asarray(index).reshape(*index.shape[:-3], -1) == plain
    return {k: v for k, v in ready.items() if k != "index"} if same.all() else ready


def matmul(
    x: Array,
    packed: PackedWeight,
    dtype: DTypeLike,
    cut: Tiling | None = None,
) -> Array:
    """Sparse core x [N, i] @ S^T -> [N, o], accumulated in float32."""
    from flexhinm_jax.gpu import hopper  # parts of MLIR that only a kernel needs

    ready, sizes = packed.layouts[NAME], shape(packed)
    cut = cut or tiling(x.shape[0], sizes)
    values, index = ready["values"].astype(x.dtype), ready.get("index")
    source = sizes.source(x.shape[0], cut)
    if source is Source.STREAM:
        if index is None:
            x = jnp.pad(x, ((0, 0), (0, 2 * STEP * sizes.steps - sizes.inputs)))
        else:
            x, index = layouts.gather(x, index.reshape(-1)), None
    rows, meta, order = packed.shape[0], ready["meta"], ready["order"]
    return hopper.product(values, meta, x, order, rows, dtype, cut, source, index)


def tiling(n: int, sizes: Shape) -> Tiling:
    """How to cut a product of n tokens: the way that is predicted to be fastest."""
    return min(cuts(n, sizes))[-1]


def cuts(n: int, sizes: Shape) -> Iterator[tuple[float, int, Tiling]]:
    """(predicted seconds, number, cut) of every cut that fits the chip.

    More splits than the fewest that fit must not exchange many sums.
    """
    tiles, blocks, steps, inputs, _ = sizes
    product = cost.Sizes(
        n, tiles * blocks * ROWS, inputs, tiles, STEP * steps, 2 * STEP * steps
    )
    spare = PARTIAL_SHARE * product.o * steps * (2 * STEP + 16)
    number = 0
    for form in _forms(n, sizes):
        fewest = None
        most = MOST_BLOCKS // form.sharing if form.tokens <= MOST_SPLIT else 1
        for splits in range(1, most + 1):
            cut = dataclasses.replace(form, splits=splits)
            source = sizes.source(n, cut)
            depth, resident = _room(cut, source, steps, 2 * n * inputs)
            if not depth:
                continue
            moved = source in (Source.STREAM, Source.LISTED)
            helper = moved and not sizes.ready(n, cut)
            block = cost.Block(cut, resident, source, helper)
            fewest = fewest or splits
            worth = splits * LEAST <= steps
            partial = cost.exchanged_bytes(product, cut)
            if splits == fewest or (worth and partial <= spare):
                number += 1
                cut = dataclasses.replace(cut, depth=depth)
                yield cost.sparse(product, block, steps, tiles * blocks), number, cut


def _room(cut: Tiling, source: Source, steps: int, held: int) -> tuple[int, int]:
    """Slots and blocks of a multiprocessor: two if they fit, (0, 0) if none does.

    Args:
      cut: with the fewest slots.
      source: how activations come.
      steps: of 64 stored columns of a tile.
      held: bytes of x.
    """
    per = -(-steps // cut.splits) if source is Source.LISTED else 0
    once, slot = per * LIST_BYTES, cut.slot_bytes
    if source is Source.HELD:
        once, slot = held, slot + LIST_BYTES
    one, two = ((room - once) // slot for room in (CHIP, CHIP // 2 - SPARE))
    if two >= cut.depth:
        return min(two, MOST_SLOTS), 2
    fits = per <= LISTED and one >= cut.depth
    return (min(one, MOST_SLOTS), 1) if fits else (0, 0)


def _forms(n: int, sizes: Shape) -> Iterator[Tiling]:
    """Cuts without splits that suit a number of tokens."""
    pairs = (1, 2) if sizes.blocks % 2 == 0 else (1,)
    few = next((t for t in (8, 16, 32, 64) if t >= n), 0)
    if few and n <= MOST_HELD and not sizes.plain and sizes.inputs % 8 == 0:
        yield from (Tiling(rows, few, held=True) for rows in pairs)
    if few and not sizes.plain and sizes.tiles > 1:
        few = max(few, 16)  # a gather brings 16 bytes, which swizzling needs twice
    if few:
        alone = [Tiling(rows, few) for rows in pairs]
    elif 2 in pairs:
        alone = [Tiling(2, 128), Tiling(2, 256, step=STEP // 2)]
    else:
        alone = [Tiling(1, 128, step=STEP // 2)]
    for cut in alone:
        yield cut
        for sharing in (2, 4):
            along_rows = sizes.tiles == 1 and sizes.blocks % (2 * sharing) == 0
            along_tokens = sizes.tiles > 1 and sharing == 2 and n > cut.tokens
            if cut.groups == 2 and cut.tokens >= 64 and (along_rows or along_tokens):
                yield dataclasses.replace(cut, sharing=sharing)


def seconds(n: int, packed: PackedWeight) -> float:
    """Predicted seconds of `matmul`."""
    return min(cuts(n, shape(packed)))[0]


RING = Tiling(depth=4)
"""The shallowest pipeline: 40 steps fill each of its slots ten times."""

SHARED = Tiling(2, 64, splits=2, sharing=2)
HELD = Tiling(2, 8, splits=4, held=True)
WIDE = Tiling(2, 256, step=32)

CASES = (
    Case(1, 72, 0, 100, 70),
    Case(3, 40, 6, 36, 11),
    Case(1, 64, 0, 1312, 5, "float16", dataclasses.replace(RING, tokens=8)),
    Case(1, 128, 0, 1310, 130, "bfloat16", dataclasses.replace(RING, groups=2)),
    Case(2, 64, 70, 1300, 70, "float16", Tiling(1, 32, splits=3)),
    Case(2, 128, 6, 1300, 130, "bfloat16", Tiling(2, 128, 2)),
    Case(1, 512, 0, 1302, 70, "bfloat16", SHARED, True),
    Case(1, 512, 0, 1302, 130, "float16", Tiling(2, 128, sharing=4), True),
    Case(3, 128, 8, 1299, 5, "bfloat16", HELD),
    Case(1, 136, 0, 1302, 3, "bfloat16", dataclasses.replace(RING, tokens=8), True),
    Case(1, 136, 8, 1299, 3, "float16", dataclasses.replace(HELD, groups=1)),
    Case(1, 256, 0, 1302, 300, "bfloat16", dataclasses.replace(WIDE, sharing=2), True),
    Case(2, 128, 6, 1300, 300, "float16", dataclasses.replace(WIDE, sharing=2)),
    Case(2, 64, 6, 1300, 300, "bfloat16", Tiling(1, 128, step=32)),
)
"""Ragged sizes; then whole rings and every form of blocks, x and clusters."""

KERNEL = Kernel(
    NAME,
    prepare,
    matmul,
    majors=(9,),
    cases=CASES,
    module=__name__,
    settle=settle,
    seconds=seconds,
)
