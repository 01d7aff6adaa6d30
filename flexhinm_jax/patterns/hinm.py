"""Hierarchical N:M: column vectors are removed per tile, the rest is N:M.

VENOM (arXiv:2310.02065) and HiNM (arXiv:2407.20496). Vectors are chosen over all inputs
of the tile instead of within blocks of M columns as VENOM's packer does.
"""

import dataclasses

from jax import Array

from flexhinm_jax.patterns.permute import ChannelSearch, Gyro
from flexhinm_jax.patterns.tiled import Tiled


@dataclasses.dataclass(frozen=True)
class HiNM(Tiled):
    """Keeps column vectors of every tile and the n best of every m of them per row.

    Attributes:
      vector_size: rows of a tile; divides the outputs of the weight.
      n: kept per group.
      m: group size; divides the inputs of the weight.
      permute: search of the row and column orders; None for natural rows with the
        columns dealt to groups by strength.
      hardware: keep a multiple of 32 N:M columns, what one instruction reads.
    """

    n: int = 2
    m: int = 4
    permute: ChannelSearch | None = Gyro()
    hardware: bool = False
    has_dense = False

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(n, m)."""
        return self.n, self.m

    def groups(self, tiles: Array, k: Array) -> Array:
        """The whole budget."""
        del tiles
        return k // self.n
