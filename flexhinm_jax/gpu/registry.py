"""The GPU kernels by name, the one that "auto" tries first in front.

On Hopper the sparse tensor cores serve every 2:4 stream, so one kernel is enough. Three
more were written and compiled (packed weights expanded in registers on Hopper, `mma.sp`
on Ampere and Ada, `tcgen05.mma.sp` on Blackwell): the first reads the same bytes with
more arithmetic, the others were latency bound by their form, an order of magnitude
slower than the dense product. No chip was there to show otherwise, so they went.
"""

from flexhinm_jax.gpu import wgmma_sp
from flexhinm_jax.gpu.kernel import Kernel

KERNELS: dict[str, Kernel] = {wgmma_sp.NAME: wgmma_sp.KERNEL}
