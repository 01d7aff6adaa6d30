"""Predicted seconds of a product on an H200: which program serves it, how it is cut.

The larger of what memory, the L2 cache, shared memory and the tensor cores need, plus
starts and helper programs. The rates of memory and of the dense product are measured,
the others are published; no kernel of this package has been timed yet (`bench.gpu`
does). A sparse tensor core reads twice the activations per unit of time, which shared
memory does not deliver: twice the dense rate is out of reach, 1.2 times is what tuned
libraries show for 2:4. What a packed weight wins, it wins with few tokens or few stored
columns.
"""

import dataclasses

from flexhinm_jax.gpu.layouts import ROWS, STEP
from flexhinm_jax.gpu.tilings import MOST_BLOCKS, Source, Tiling

CORES, CLOCK = 132, 1.7e9
"""Multiprocessors; their clock in Hz."""

MEMORY, CACHE = 4.3e12, 6.0e12
"""Bytes per second from memory, and from the L2 cache to all multiprocessors."""

SHARED = 128 * CORES * CLOCK
"""Bytes per second that tensor cores and copies move in all shared memories."""

DENSE_RATE = 790e12
"""Operations per second of a dense product in bfloat16 (cuBLAS)."""

START, SLACK = 2e-6, 1.15
"""Seconds to start a program; loss of a kernel against its bound."""

SINGLE, TILED = 5, 7
"""Programs, the product among them, in which a weight of one tile, and of more, is
written out and multiplied, as XLA compiles it for an H200 (`make gpu-compile`)."""

MEET, REMOTE = 1e-6, 32 * CLOCK
"""Seconds in which a cluster meets twice; bytes per second from another block: guesses.
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A product.

    Attributes:
      n: tokens.
      o: outputs.
      i: inputs.
      tiles: row tiles.
      stored: stored values of a row.
      kept: inputs that a tile reads.
    """

    n: int
    o: int
    i: int
    tiles: int
    stored: int
    kept: int

    @property
    def packed_bytes(self) -> float:
        """Values, positions and index lists."""
        positions = self.o * self.stored / 4
        return 2 * self.o * self.stored + positions + 4 * self.tiles * self.kept


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a kernel.

    Attributes:
      cut: its sizes.
      resident: blocks that fit a multiprocessor at a time.
      source: how activations come.
      helper: whether a program before it brings them into order.
    """

    cut: Tiling
    resident: int
    source: Source
    helper: bool


def dense(n: int, o: int, i: int) -> float:
    """Seconds of the dense product."""
    moved = 2 * (o * i + n * i + n * o)
    return max(1.05 * moved / MEMORY, 2 * n * o * i / DENSE_RATE)


def tuned(n: int, o: int, i: int) -> float:
    """Seconds of 2:4 by a tuned library: its bytes, or 1.2 times the dense rate."""
    moved = 2 * (9 / 16 * o * i + n * i + n * o)
    return max(1.05 * moved / MEMORY, 2 * n * o * i / (1.2 * DENSE_RATE))


def expanded(sizes: Sizes) -> float:
    """Seconds to write the matrix out and multiply with it (`kernels.dense`)."""
    n, o, i = sizes.n, sizes.o, sizes.i
    moved = sizes.packed_bytes + 2 * o * i
    if sizes.tiles > 1:  # the kept columns turned, and the result in order
        moved, programs = moved + 4 * o * sizes.kept + 4 * n * o, TILED
    else:  # the columns of x in the order of the weight
        moved, programs = moved + 4 * n * i, SINGLE
    return moved / MEMORY + (programs - 1) * START + dense(n, o, i)


def floor(sizes: Sizes) -> float:
    """Least seconds of a packed product for anybody, on this chip.

    Bytes from memory, the tensor cores at twice the dense rate, shared memory, which
    has to feed them: a block of 128 x 256 reads and writes it 1.8 times as long as the
    tensor cores work; and the L2 cache, which the largest cluster asks least often.
    """
    moved = sizes.packed_bytes + 2 * sizes.n * (sizes.i + sizes.o)
    columns = -(-sizes.n // 8) * 8
    width = min(256, columns)
    work = 2 * sizes.o * columns * sizes.stored / DENSE_RATE
    steps = sizes.stored / STEP
    rows = 2 * ROWS
    values, x = rows * (2 * STEP + 16), 2 * STEP * width * 2
    operands = 2 * 4 * (64 * width + 2048)
    along = [k for k in (1, 2, 4, 8) if k * width <= columns]  # k blocks of tokens
    brought = min(values / k + x * k / MOST_BLOCKS for k in along)
    count = sizes.o / rows * columns / width * steps
    shared, cache = count * (values + x + operands) / SHARED, count * brought / CACHE
    return max(moved / MEMORY, work, shared, cache)


def sparse(sizes: Sizes, block: Block, steps: int, blocks: int) -> float:
    """Seconds of the kernel on sparse tensor cores and of its helpers.

    Args:
      sizes: of the product.
      block: how it is cut.
      steps: steps of 64 stored columns of a tile.
      blocks: blocks of 64 rows of all tiles.
    """
    n, source, cut = sizes.n, block.source, block.cut
    rows, width = ROWS * cut.groups, cut.tokens
    weight_sharing = cut.sharing if source is Source.LISTED else 1
    columns = -(-n // (width * weight_sharing)) * weight_sharing
    grid = blocks // cut.groups * columns
    values, x = rows * (2 * STEP + 16), 2 * STEP * width * 2
    listed = 512 if source in (Source.LISTED, Source.HELD) else 0
    memory = blocks * ROWS * steps * (2 * STEP + 16) + 2 * n * (sizes.i + sizes.o)
    memory += sizes.tiles * steps * listed
    fetched = {Source.HELD: 0, Source.PLAIN: 2 * STEP * min(n, width) * 2}.get(
        source, x
    )
    once = 2 * n * sizes.i if source is Source.HELD else 0
    together = values / weight_sharing + fetched * weight_sharing / cut.sharing
    cache = grid * (steps * (together + listed) + cut.splits * once)
    operands = 4 * cut.groups * (64 * width + 2048)
    shared = grid * (steps * (values + x + listed + operands) + cut.splits * once)
    tensor = grid * steps * cut.groups * 4 * width / 2 / (CORES * CLOCK)
    bound = max(memory / MEMORY, cache / CACHE, shared / SHARED, tensor)
    cluster = cut.splits * cut.sharing
    waves = grid * cut.splits / (CORES * block.resident // cluster * cluster)
    bound *= -(-waves // 1) / waves
    helper = START + 4 * n * sizes.i / MEMORY if block.helper else 0.0
    sums = 4 * (cut.splits - 1) * rows * width / REMOTE
    return SLACK * bound + START + helper + (MEET + sums if sums else 0.0)


def exchanged_bytes(sizes: Sizes, cut: Tiling) -> int:
    """Bytes of sums that blocks read from the others of their cluster."""
    return 4 * (cut.splits - 1) * sizes.o * (-(-sizes.n // cut.tokens) * cut.tokens)
