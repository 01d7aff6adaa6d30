"""Experimental: products on the sparse tensor cores of Blackwell, `tcgen05.mma.sp`.

Compiled offline for B200, never run on a GPU, not tuned: copies run one step ahead,
and one product is in flight. It is here to be tested and improved on a chip; nothing
chooses it by itself. Serves weights of one tile.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax.gpu import layouts, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.layouts import BLACKWELL_ROWS, STEP
from flexhinm_jax.types import PackedWeight

NAME = "tcgen05"

TOKENS = 64
"""Tokens of a block."""

SLOTS = 2
"""Steps held in shared memory."""


def prepare(packed: PackedWeight) -> dict[str, Array]:
    """The arrays that `matmul` reads: `layouts.blackwell`, positions in 2 bits."""
    ready = layouts.blackwell(packed)
    return ready | {"meta": ready["meta"].astype(jnp.uint2)}


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core x [N, i] @ S^T -> [N, o], accumulated in float32."""
    ready = packed.layouts[NAME]
    n = x.shape[0]
    x = layouts.gather(support.pad_rows(x, TOKENS), ready["index"])
    y = product(ready["values"].astype(x.dtype), ready["meta"], x)
    y = support.restore_rows(y, ready["order"], packed.shape[0])
    return y[:n].astype(dtype)


def product(values: Array, meta: Array, x: Array) -> Array:
    """f32[r, n] = W @ x^T in storage order.

    Args:
      values: [r, c] 16 bit, r a multiple of 128, c of 64.
      meta: u2[r / 128, c / 64, 128, 64].
      x: [n, 2 c], n a multiple of TOKENS.
    """
    from jax.experimental import pallas as pl

    plgpu = support.mosaic()
    rows, stored = values.shape
    n, steps, dtype = x.shape[0], stored // STEP, values.dtype
    wide = support.swizzled(STEP, dtype)
    out_tr = support.swizzled(TOKENS, jnp.float32)

    def body(v_g, m_g, x_g, y_g, a_s, m_s, x_s, y_s, full, done, acc, m_t):
        row, token = lax.axis_index("row"), lax.axis_index("token")
        down = pl.ds(row * BLACKWELL_ROWS, BLACKWELL_ROWS)
        across = pl.ds(token * TOKENS, TOKENS)

        def fetch(k, slot):
            copy = plgpu.copy_gmem_to_smem
            copy(v_g.at[down, pl.ds(k * STEP, STEP)], a_s.at[slot], full.at[slot])
            columns = pl.ds(k * 2 * STEP, 2 * STEP)
            copy(x_g.at[across, columns], x_s.at[slot], full.at[slot])
            copy(m_g.at[pl.ds(row, 1), pl.ds(k, 1)], m_s.at[slot], full.at[slot])

        for k in range(min(SLOTS, steps)):
            fetch(k, k)

        def step(k, _):
            slot = lax.rem(k, SLOTS)
            plgpu.barrier_wait(full.at[slot])
            plgpu.async_copy_sparse_metadata_to_tmem(m_s.at[slot], m_t)
            plgpu.tcgen05_mma(
                acc,
                a_s.at[slot],
                x_s.at[slot].T,
                done,
                accumulate=k > 0,
                a_sparse_metadata=m_t,
            )
            plgpu.barrier_wait(done)

            @pl.when(k + SLOTS < steps)
            def _next():
                fetch(k + SLOTS, slot)

        lax.fori_loop(0, steps, step, None)
        y_s[...] = plgpu.async_load_tmem(acc)
        plgpu.wait_load_tmem()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s, y_g.at[down, across])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        grid=(rows // BLACKWELL_ROWS, n // TOKENS),
        grid_names=("row", "token"),
        scratch_types=[
            plgpu.SMEM((SLOTS, BLACKWELL_ROWS, STEP), dtype, transforms=wide),
            plgpu.SMEM((SLOTS, 1, 1, BLACKWELL_ROWS, STEP), meta.dtype),
            plgpu.SMEM((SLOTS, TOKENS, 2 * STEP), dtype, transforms=wide),
            plgpu.SMEM((BLACKWELL_ROWS, TOKENS), jnp.float32, transforms=out_tr),
            plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
            plgpu.Barrier(orders_tensor_core=True),
            plgpu.TMEM((BLACKWELL_ROWS, TOKENS), jnp.float32),
            plgpu.TMEM(
                (BLACKWELL_ROWS, STEP),
                jnp.uint2,
                layout=plgpu.TMEMLayout.SPARSE_METADATA_LAYOUT,
            ),
        ],
    )(values, meta, x)


KERNEL = Kernel(
    NAME,
    prepare,
    matmul,
    majors=(10,),
    cases=((1, 72, 6, 40, 11),),
)
