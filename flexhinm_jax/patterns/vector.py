"""Whole column vectors of a row tile stay or go (out-vector-wise pruning, OVW).

Tan et al., NeurIPS 2022, "Accelerating sparse convolution with column vector-wise
sparsity"; the paper orders rows by clustering, here `permute` does.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from flexhinm_jax.patterns.permute import ChannelSearch
from flexhinm_jax.patterns.tiled import Tiled


@dataclasses.dataclass(frozen=True)
class Vector(Tiled):
    """Keeps the strongest column vectors of every tile, dense.

    Attributes:
      vector_size: rows of a tile; divides the outputs of the weight.
      permute: search of the row order (`Gyro()`); there is no column order to search.
      hardware: keep a multiple of 16 columns, what one instruction reads.
    """

    permute: ChannelSearch | None = None
    hardware: bool = False
    letters: ClassVar[dict[str, str]] = {
        "v": "vector_size",
        "permute": "permute",
        "hardware": "hardware",
    }
    has_groups: ClassVar[bool] = False

    @property
    def n_of_m(self) -> tuple[int, int]:
        """There are no groups; any (n, m) describes none of them."""
        return 1, 1

    def groups(self, tiles: Array, k: Array) -> Array:
        """No groups."""
        del tiles, k
        return jnp.zeros((), jnp.int32)
