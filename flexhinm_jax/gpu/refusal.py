"""Why a GPU kernel cannot serve a product: the conditions that all of them share."""

from typing import Any

import jax

from flexhinm_jax.gpu import layouts, selfcheck, support
from flexhinm_jax.types import PackedWeight


def refusal(
    module: Any, x: jax.ShapeDtypeStruct, packed: PackedWeight, *, one_tile: bool
) -> str | None:
    """The first condition that does not hold, or None if the kernel can serve.

    Args:
      module: module of the backend, with NAME, `prepare` and `matmul`.
      x: the input [N, i], in the dtype of the computation.
      packed: one packed matrix, of arrays or tracers.
      one_tile: whether the kernel serves weights of one tile only.
    """
    index = packed.dense_index if packed.nm_index is None else packed.nm_index
    tiles = index.shape[-2]
    if not isinstance(x.shape[0], int):
        return "it needs to know the number of rows when a program is traced"
    if one_tile and tiles != 1:
        return f"it serves weights of one tile, this one has {tiles}"
    return (
        support.old_jax()
        or layouts.two_of_four(packed)
        or support.not_half(x.dtype)
        or support.not_half(packed.dtype)
        or support.no_layout(packed, module.NAME)
        or selfcheck.failure(module)
    )
