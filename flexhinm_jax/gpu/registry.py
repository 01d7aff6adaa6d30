"""The GPU kernels, the one that "auto" tries first in front.

On Hopper the sparse tensor cores read the same bytes as the expand kernel, without its
arithmetic, and serve every pattern and batch. Trying the expand kernel as well would
make `prepare` hold the weight once more; ask for it by name. No order has been measured
yet: `bench/gpu.py` does it. The last two are experimental: compiled, never run, never
chosen by themselves.
"""

from flexhinm_jax.gpu import expand, mma_sp, tcgen05, wgmma_sp
from flexhinm_jax.gpu.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (wgmma_sp.KERNEL, expand.KERNEL, mma_sp.KERNEL, tcgen05.KERNEL)
}
