"""Packed weights and the products that run on them; knows no method or pattern."""

from flexhinm_jax.kernels.folding import check_equal, fold
from flexhinm_jax.kernels.packing import block_columns, pack, pack_to, sizes, unpack
from flexhinm_jax.kernels.product import sparse_dot

__all__ = [
    "block_columns",
    "check_equal",
    "fold",
    "pack",
    "pack_to",
    "sizes",
    "sparse_dot",
    "unpack",
]
