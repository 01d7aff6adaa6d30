"""Experimental: products on the sparse tensor cores of Ampere and Ada, `mma.sp`.

Compiled offline for A100, L40 and H200, never run on a GPU, not tuned: fragments are
loaded straight from global memory, without a pipeline. It is here to be tested and
improved on a chip; nothing chooses it by itself. Serves weights of one tile.

Source: PTX ISA, mma.sp::ordered_metadata.sync.aligned.m16n8k32 for 16-bit types.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from flexhinm_jax.gpu import layouts, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.layouts import ROWS
from flexhinm_jax.types import PackedWeight

NAME = "mma_sp"

TOKENS = 8
"""Tokens of one instruction and of one block."""


def prepare(packed: PackedWeight) -> dict[str, Array]:
    """The layout of `wgmma.sp`: both instructions share one map of the metadata."""
    return layouts.tiles(packed)


def matmul(x: Array, packed: PackedWeight, dtype: DTypeLike) -> Array:
    """Sparse core x [N, i] @ S^T -> [N, o], accumulated in float32."""
    ready = packed.layouts[NAME]
    n = x.shape[0]
    x = layouts.gather(support.pad_rows(x, TOKENS), ready["index"].reshape(-1))
    values = jnp.pad(
        ready["values"][0], ((0, -ready["values"].shape[1] % ROWS), (0, 0))
    )
    y = product(values.astype(x.dtype), ready["meta"][0], x)
    order = ready["order"].reshape(-1)
    return support.restore_rows(y, order, packed.shape[0])[:n].astype(dtype)


def product(values: Array, meta: Array, x: Array) -> Array:
    """f32[r, n] = W @ x^T in storage order.

    Args:
      values: [r, c] 16 bit, r a multiple of 64.
      meta: i32[r / 64, c / 64, 256], `layouts.tiles`.
      x: [n, 2 c], n a multiple of 8.
    """
    from jax.experimental import pallas as pl

    plgpu = support.mosaic()
    rows, n, dtype = values.shape[0], x.shape[0], values.dtype
    a_layout, b_layout = plgpu.Layout.MMA_LHS(dtype), plgpu.Layout.MMA_RHS(dtype)
    acc_layout = plgpu.Layout.MMA_ACC(dtype)
    word_layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
    held = plgpu.ShapeDtypeStruct((ROWS, TOKENS), jnp.float32, layout=acc_layout)
    multiply = [
        plgpu.inline_mgpu(
            arg_types=(acc_layout, a_layout, word_layout, b_layout, b_layout),
            return_type=held,
        )(_sparse_product(selector, dtype))
        for selector in range(2)
    ]

    def body(v_g, m_g, x_g, y_g):
        row = lax.axis_index("row")
        down = pl.ds(row * ROWS, ROWS)
        across = pl.ds(lax.axis_index("token") * TOKENS, TOKENS)

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        def step(k, acc):
            # One word per thread serves two instructions of 32 logical columns.
            block, half = lax.div(k, 2), lax.rem(k, 2)
            words = load(m_g.at[row, block, pl.ds(half * 128, 128)], word_layout)
            for selector in range(2):
                at = 2 * k + selector
                a = load(v_g.at[down, pl.ds(at * 16, 16)], a_layout)
                b = [
                    load(x_g.at[across, pl.ds(at * 32 + 16 * h, 16)].T, b_layout)
                    for h in range(2)
                ]
                acc = multiply[selector](acc, a, words, *b)
            return acc

        zero = jnp.zeros((ROWS, TOKENS), jnp.float32)
        acc = plgpu.layout_cast(zero, acc_layout)
        acc = lax.fori_loop(0, 2 * meta.shape[1], step, acc)
        if hasattr(plgpu, "store"):  # jax 0.12
            plgpu.store(y_g.at[down, across], acc, optimized=False)
        else:
            y_g[down, across] = acc

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        grid=(rows // ROWS, n // TOKENS),
        grid_names=("row", "token"),
    )(values, meta, x)


def _sparse_product(selector: int, dtype: Any) -> Any:
    """Adds A [64, 32] in 2:4 form @ B [32, 8] to acc: one instruction per warp."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]

    def multiply(ctx: Any, acc: Any, a: Any, meta: Any, b0: Any, b1: Any) -> Any:
        del ctx
        from jax.experimental.mosaic.gpu import fragmented_array as fa
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def element(register: Any, position: int) -> Any:
            return vector.extract(
                register,
                dynamic_position=[],
                static_position=ir.DenseI64ArrayAttr.get([position]),
            )

        sums = [element(r, p) for r in acc.registers.flat for p in range(2)]
        left = [utils.bitcast(r, i32) for r in a.registers.flat]
        right = [utils.bitcast(r, i32) for b in (b0, b1) for r in b.registers.flat]
        words = [element(r, 0) for r in meta.registers.flat]
        assert (len(sums), len(left), len(right), len(words)) == (4, 4, 4, 1)
        result: Any = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * 4),
            [*left, *right, *sums, *words],
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col"
            f".f32.{kind}.{kind}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, "
            f"{{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, {selector};",
            ",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4 + ["r"]),
            has_side_effects=False,
        )
        out = [llvm.extractvalue(f32, result, [i]) for i in range(4)]
        pair = ir.VectorType.get((2,), f32)
        registers = []
        for low in (0, 2):
            value = llvm.mlir_undef(pair)
            for i in range(2):
                value = llvm.insertelement(
                    value, out[low + i], position=utils.c(i, i32)
                )
            registers.append(value)
        return fa.FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(acc.registers.shape),
            _layout=acc.layout,
            _is_signed=None,
        )

    return multiply


KERNEL = Kernel(
    NAME,
    prepare,
    matmul,
    majors=(8, 9),
    cases=((1, 72, 6, 40, 11),),
)
