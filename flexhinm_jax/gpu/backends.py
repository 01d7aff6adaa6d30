"""The GPU kernels: which there are, and which is best for a product.

Light on purpose: the modules of the kernels, and Pallas with them, are imported when a
product first needs one.
"""

import jax

from flexhinm_jax.kernels.backends import Backend
from flexhinm_jax.types import PackedWeight

HERE = __name__.rpartition(".")[0]
SINCE = (0, 11, 2)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("wgmma_sp", f"{HERE}.gpu_wgmma_sp", majors=(9,), since=SINCE),
        Backend("expand", f"{HERE}.gpu_expand", majors=(9,), since=SINCE),
        # Experimental: compiled, never run, never chosen by themselves.
        Backend("mma_sp", f"{HERE}.gpu_mma_sp", majors=(8, 9), since=SINCE),
        Backend("tcgen05", f"{HERE}.gpu_tcgen05", majors=(10,), since=SINCE),
    )
}


def ranked(
    x: jax.ShapeDtypeStruct, packed: PackedWeight, capability: tuple[int, int]
) -> tuple[str, ...]:
    """Names of the backends worth trying for a product, best first.

    On Hopper the sparse tensor cores read the same bytes as the expand kernel, without
    its arithmetic, and serve every pattern and batch. Listing the expand kernel beside
    them would make `prepare` hold the weight once more; ask for it by name. No order
    has been measured yet: `bench/gpu.py` does it.

    Args:
      x: the input, [N, i].
      packed: the weight.
      capability: compute capability of the chip, such as (9, 0).
    """
    del x, packed
    return ("wgmma_sp",) if capability[0] == 9 else ()
