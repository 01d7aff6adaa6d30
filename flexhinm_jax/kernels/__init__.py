"""Packed weights and the products that run on them; knows no method or pattern."""

from flexhinm_jax.kernels.dispatch import assume
from flexhinm_jax.kernels.folding import (
    check_equal,
    fold,
    fold_inputs,
    gather_once,
)
from flexhinm_jax.kernels.packing import (
    block_columns,
    block_product,
    pack,
    pack_to,
    sizes,
    unpack,
    with_weight,
)
from flexhinm_jax.kernels.preparing import prepare, strip
from flexhinm_jax.kernels.product import sparse_dot
from flexhinm_jax.kernels.quantised import quantise
from flexhinm_jax.kernels.validation import verify_packed

__all__ = [
    "assume",
    "block_columns",
    "block_product",
    "check_equal",
    "fold",
    "fold_inputs",
    "gather_once",
    "pack",
    "pack_to",
    "prepare",
    "quantise",
    "sizes",
    "sparse_dot",
    "strip",
    "unpack",
    "verify_packed",
    "with_weight",
]
