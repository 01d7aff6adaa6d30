"""How a product is cut into blocks of a Hopper GPU, and how they get activations.

Apart from the kernel (`gpu.hopper`), which needs parts of MLIR that are imported where
a GPU runs it and nowhere else.
"""

import dataclasses
import enum

from flexhinm_jax.gpu.layouts import ROWS, STEP

MOST_BLOCKS = 8
"""Blocks of a cluster that every Hopper GPU can place."""

MOST_SPLIT = 128
"""Tokens of a block up to which sums of another one fit the registers beside its own.
"""


class Source(enum.Enum):
    """How the activations of a step come into shared memory."""

    STREAM = "x in the order of the stream, by the tensor memory engine"
    PLAIN = "x as it is, in the order of the stream, by cp.async: any number of tokens"
    LISTED = "rows of x^T by the index list of the tile, by cp.async"
    HELD = "all of x once per block, its columns by the index list of each step"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut into blocks.

    Attributes:
      groups: warpgroups of a block, 64 rows each; 1 or 2.
      tokens: tokens of a block; 8, 16, 32, 64, 128 or 256.
      splits: blocks that share the columns of one tile of the result, one cluster; 1
        for more than `MOST_SPLIT` tokens.
      depth: pipeline slots, at least 4: one is in use, `in_flight` are still read, the
        others are fetched ahead.
      in_flight: products that may run while the metadata of the next one are loaded: 0,
        or 1 to try on a GPU. The registers of their metadata may be written again by
        then; whether an instruction has read them when it begins is not documented.
      held: x lies in shared memory, if tiles read it by an index (`Source.HELD`).
      sharing: blocks of one cluster that fetch together, a part each for all of them:
        along the rows tiles of x (`Source.STREAM`), along the tokens values and
        metadata (`Source.LISTED`).
      step: stored columns of a slot, 64, or 32 where a slot of many tokens is large.
      selectors: sparsity selectors of the instruction in use: 2, or 1 to try on a GPU
        at the cost of a shuffle. Nobody but the PTX ISA tells what selector 1 does.
    """

    groups: int = 1
    tokens: int = 64
    splits: int = 1
    depth: int = 4
    in_flight: int = 0
    held: bool = False
    sharing: int = 1
    step: int = STEP
    selectors: int = 2

    def __post_init__(self) -> None:
        """Checks the numbers against each other."""
        for name, values in {
            "groups": (1, 2),
            "tokens": (8, 16, 32, 64, 128, 256),
            "in_flight": (0, 1),
            "sharing": (1, 2, 4),
            "step": (32, 64),
            "selectors": (1, 2),
        }.items():
            if getattr(self, name) not in values:
                among = ", ".join(map(str, values))
                raise ValueError(f"{name}={getattr(self, name)} must be among {among}")
        cluster = self.splits * self.sharing
        if self.depth < 4 or self.splits < 1 or cluster > MOST_BLOCKS:
            raise ValueError(
                f"depth={self.depth} must be >= 4, splits={self.splits} x "
                f"sharing={self.sharing} between 1 and {MOST_BLOCKS} blocks"
            )
        if self.tokens < 8 * self.sharing or (self.step < STEP and self.tokens < 64):
            raise ValueError(
                f"tokens={self.tokens} are too few: 8 for each of "
                f"sharing={self.sharing} blocks, 64 for step={self.step}"
            )
        if self.splits > 1 and self.tokens > MOST_SPLIT:
            raise ValueError(
                f"splits={self.splits} must be 1 for tokens={self.tokens}: a thread "
                f"has registers for sums of two blocks of up to {MOST_SPLIT} tokens"
            )

    @property
    def ahead(self) -> int:
        """Steps that are fetched before the one in use."""
        return self.depth - 1 - self.in_flight

    @property
    def slot_bytes(self) -> int:
        """Shared memory of a slot, without index lists and barriers."""
        return self.step * (self.groups * (2 * ROWS + 16) + 4 * self.tokens)
