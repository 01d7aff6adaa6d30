"""Products of few tokens with a 2:4 weight: read it packed, expand it in registers.

With few tokens a product costs what its weight bytes cost: 18 bits instead of 32 per
pair of bfloat16 weights, one of them stored. The kernel reads the packed form once,
rebuilds the dense operand in registers and feeds the dense tensor cores of Hopper. It
helps as long as bandwidth is the limit; with many tokens it costs what the dense
product costs.

Operands are slot-major (`layouts.slots`): column j of every group of four is an
elementwise function of the two kept values and their positions, so no value moves
between lanes. Serves weights of one tile, whose columns are gathered once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax.gpu import layouts, ptx, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.layouts import ROWS, SLOT
from flexhinm_jax.types import PackedWeight

NAME = "expand"

TOKENS = (8, 16, 32, 64)
"""Widths of a block; more tokens take several blocks."""

BLOCKS = 264
"""Blocks that fill the largest Hopper chip twice: 2 x 132 multiprocessors."""


def prepare(packed: PackedWeight) -> dict[str, Array]:
    """The arrays that `matmul` reads: `layouts.slots`."""
    return layouts.slots(packed)


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core x [N, i] @ S^T -> [N, o], accumulated in float32."""
    ready = packed.layouts[NAME]
    n = x.shape[0]
    width = next((t for t in TOKENS if t >= n), TOKENS[-1])
    x = support.pad_rows(x, width)
    taken = layouts.gather(x, ready["index"]).transpose(1, 0, 2)
    y = product(
        ready["values"].astype(x.dtype),
        ready["nibbles"],
        taken,
        ready["order"],
        out=packed.shape[0],
        dtype=dtype,
        width=width,
    )
    return y[:, :n].T


def product(
    values: Array,
    nibbles: Array,
    x: Array,
    order: Array,
    *,
    out: int,
    dtype: DTypeLike,
    width: int,
    splits: int | None = None,
    shared: bool | None = None,
) -> Array:
    """[out, n] = W @ x^T from slot-major operands.

    Args:
      values: [2, r, g] 16 bit.
      nibbles: u8[r, g / 2].
      x: [4, n, g], n a multiple of `width`.
      order: i32[r], output row of each row, negative for padding.
      out: rows of the output.
      dtype: of the output; partial sums are float32.
      width: tokens of a block, one of TOKENS.
      splits: blocks that share the columns of a row block, a divisor of the steps;
        None for enough blocks to fill the chip.
      shared: put the expanded operand into shared memory instead of registers: slower,
        and the only form that the interpreter knows. None for what is needed.
    """
    _, rows, groups = values.shape
    n, steps = x.shape[1], groups // SLOT
    if splits is None:
        blocks = (rows // ROWS) * (n // width)
        fit = [s for s in range(1, steps + 1) if steps % s == 0]
        splits = next((s for s in fit if s * blocks >= BLOCKS), fit[-1])
        splits = max(s for s in fit if s <= splits and (s == 1 or steps // s >= 2))
    elif steps % splits:
        raise ValueError(f"splits={splits} must divide the {steps} steps")
    if shared is None:
        shared = support.interpreting()
    partial = jnp.dtype(dtype) if splits == 1 else jnp.dtype(jnp.float32)
    result = jax.ShapeDtypeStruct((splits, out, n), partial)
    run = _kernel(rows, steps, width, splits, shared, values.dtype, result)
    y = run(values, nibbles, x, order.reshape(-1, ROWS))
    if splits == 1:
        return y[0]
    return jnp.sum(y, axis=0, dtype=jnp.float32).astype(dtype)


def _kernel(
    rows: int,
    steps: int,
    width: int,
    splits: int,
    shared: bool,
    dtype: Any,
    result: jax.ShapeDtypeStruct,
) -> Any:
    """Builds the Pallas kernel for static sizes."""
    from jax.experimental import pallas as pl

    plgpu = support.mosaic()
    half, per = SLOT // 2, steps // splits
    value_tr = support.swizzled(SLOT, dtype)
    byte_tr = support.swizzled(half, jnp.uint8)
    wgmma = plgpu.Layout.WGMMA
    if support.interpreting():
        scatter = ptx.scatter_rows_meaning
    else:
        scatter = plgpu.inline_mgpu(
            arg_types=(
                wgmma,
                wgmma.reduce(1),
                plgpu.RefType(),
                plgpu.Layout.WG_SPLAT,
            )
        )(ptx.scatter_rows)
    scratch = {}
    if shared:
        tile_tr = support.swizzled(half, dtype)
        scratch["w_s"] = plgpu.SMEM((ROWS, half), dtype, transforms=tile_tr)

    def body(v_g, b_g, x_g, o_g, y_g, w_s=None):
        row, token, split = (lax.axis_index(a) for a in ("row", "token", "split"))
        down, across = pl.ds(row * ROWS, ROWS), pl.ds(token * width, width)

        def with_accumulator(acc):
            def step(_, v_s, b_s, x_s):
                for h in range(2):
                    # Mosaic has no arithmetic on bytes: widen first.
                    packed = b_s[...].astype(jnp.int16)
                    nibble = (packed >> 4) & 15 if h else packed & 15
                    first, second = nibble & 3, nibble >> 2
                    columns = pl.ds(h * half, half)
                    v0, v1 = v_s[0, :, columns], v_s[1, :, columns]
                    zero = jnp.zeros_like(v0)
                    for j in range(4):
                        w = jnp.where(second == j, v1, zero)
                        w = jnp.where(first == j, v0, w)
                        if w_s is not None:
                            w_s[...] = w
                            plgpu.commit_smem()
                            w = w_s
                        plgpu.wgmma(acc, w, x_s.at[j, :, columns].T)
                        plgpu.wgmma_wait(0)

            at = lambda k: split * per + k  # noqa: E731
            spec = plgpu.BlockSpec
            plgpu.emit_pipeline(
                step,
                grid=(per,),
                in_specs=[
                    spec((2, ROWS, SLOT), lambda k: (0, 0, at(k)), transforms=value_tr),
                    spec((ROWS, half), lambda k: (0, at(k)), transforms=byte_tr),
                    spec(
                        (4, width, SLOT), lambda k: (0, 0, at(k)), transforms=value_tr
                    ),
                ],
                max_concurrent_steps=2,
            )(v_g.at[:, down], b_g.at[down], x_g.at[:, across])
            return acc[...]

        acc = pl.run_scoped(with_accumulator, plgpu.ACC((ROWS, width), jnp.float32))
        places = plgpu.load(o_g.at[row], layout=wgmma.reduce(1), optimized=False)
        scatter(acc, places, y_g.at[split], token * width)

    return plgpu.kernel(
        body,
        out_type=result,
        grid=(rows // ROWS, result.shape[-1] // width, splits),
        grid_names=("row", "token", "split"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


KERNEL = Kernel(
    NAME,
    prepare,
    matmul,
    majors=(9,),
    cases=((1, 72, 6, 40, 11),),
)
