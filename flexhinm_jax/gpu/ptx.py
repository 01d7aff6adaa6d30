"""The few instructions that Pallas has no words for, as inline PTX for Hopper.

Three functions for `plgpu.inline_mgpu`, each beside its meaning in jax.numpy, which
takes its place in the interpreter: the sparse product of two tiles in shared memory,
the gather of activation rows into shared memory, the scatter of a result tile to rows
of the output. All names of `jax.experimental.mosaic` are imported inside.

Sources: PTX ISA, wgmma.mma_async.sp and cp.async; 16-bit types only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.gpu.layouts import ABSENT, ROWS, from_sp_meta

CHUNK = 16
"""Bytes of one cp.async."""


def fence(ctx: Any, acc: Any) -> Any:
    """Orders the registers of a fresh accumulator before the first product."""
    del ctx
    from jax.experimental.mosaic import gpu as mgpu

    return mgpu.WGMMAAccumulator.from_registers(acc).value


def drain(ctx: Any, acc: Any) -> Any:
    """Waits for every product in flight; the accumulator may be read afterwards."""
    del ctx
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir.dialects import nvvm

    nvvm.wgmma_wait_group_sync_aligned(0)
    return fa.optimization_barrier(acc)


def sparse_product(in_flight: int, turned: bool) -> Any:
    """Adds A [64, 128] in 2:4 form @ B [128, n] to an accumulator.

    Args:
      in_flight: products that may still run when it returns. They read the registers of
        their metadata, of which neither LLVM nor ptxas knows when they are written
        again.
      turned: B lies in memory as [n, 128].

    Returns:
      A function (ctx, acc, meta, a_ref, b_ref) -> acc. acc: f32 registers in WGMMA
      layout, ordered by `fence` or by an earlier product. meta: two i32 words per
      thread, `layouts.to_sp_meta` of the 128 columns. a_ref: shared memory
      [1, 1, 64, 64] or in tiles of 8 rows, 128-byte swizzle: the stored columns, byte
      for byte a dense k = 64 tile. b_ref: shared memory, the 128 logical columns by n,
      in tiles; either dimension may be the contiguous one.
    """

    def multiply(ctx: Any, acc: Any, meta: Any, a_ref: Any, b_ref: Any) -> Any:
        del ctx
        from jax.experimental.mosaic import gpu as mgpu

        if turned:
            b_ref = mgpu.memref_transpose(b_ref, (1, 0, 3, 2))
        return _sparse_product(acc, meta, a_ref, b_ref, in_flight)

    return multiply


def _sparse_product(acc: Any, meta: Any, a_ref: Any, b_ref: Any, in_flight: int) -> Any:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import mma_utils, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, nvvm, vector

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    f32 = ir.F32Type.get()
    first = lambda x: vector.extract(  # noqa: E731
        x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
    )
    held = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
    layout, shape = held._value.layout, held._value.registers.shape
    registers = [first(r) for r in held._value.registers.flat]
    words = [first(r) for r in fa.optimization_barrier(meta).registers.flat]
    nvvm.wgmma_fence_aligned()  # the metadata are registers of the product, too
    n = acc.shape[1]
    assert len(registers) == n // 2 and len(words) == 2

    b_type = ir.MemRefType(b_ref.type)
    strides, _ = b_type.get_strides_and_offset()
    element = b_type.element_type
    k_tile, n_tile = b_type.shape[2:]
    swizzle = 2 * max(k_tile, n_tile)  # bytes; the other side of a tile has 8 rows
    (a_base, (_, a_strides)), _, a_fast = mma_utils.create_descriptor(
        a_ref, swizzle=128, group_size=(ROWS, 64), logical_k_major=False
    )
    (b_base, _), _, b_fast = mma_utils.create_descriptor(
        b_ref, swizzle=swizzle, group_size=(k_tile, n), logical_k_major=True
    )
    transposed = int(b_fast != mma_utils.Dim.K)
    assert a_fast == mma_utils.Dim.K and b_fast in mma_utils.Dim

    def b_offset(k: int) -> int:  # bytes from the first to the k-th logical column
        return 2 * (k // k_tile * strides[0] + k % k_tile * strides[2])

    text, constraints = _instruction(n, str(element), transposed)

    def advance(base: Any, offset: int) -> Any:
        step = utils.c(mma_utils.encode_addr(offset), i64)
        return llvm.add(base, step, overflow_flags=llvm.IntegerOverflowFlags.none)

    for i in range(4):  # k = 32 logical, 16 stored columns each
        selector_value = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, i % 2)).result
        result: Any = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * len(registers)),
            [
                *registers,
                advance(a_base, i * a_strides[-1]),
                advance(b_base, b_offset(32 * i)),
                words[i // 2],
                selector_value,
            ],
            text,
            constraints,
            asm_dialect=0,
            has_side_effects=True,
        )
        registers = [llvm.extractvalue(f32, result, [r]) for r in range(len(registers))]
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(in_flight)
    one = ir.VectorType.get((1,), f32)
    fresh = [vector.broadcast(one, r) for r in registers]
    value = fa.FragmentedArray(
        _registers=np.array(fresh, dtype=object).reshape(shape),
        _layout=layout,
        _is_signed=None,
    )
    return value.to_layout(held._original_layout)


def _instruction(n: int, kind: str, transposed: int) -> tuple[str, str]:
    """Inline PTX of one product, k = 32, and the constraints of its operands."""
    assert kind in ("bf16", "f16")
    sums = n // 2
    out = ",".join(f"${r}" for r in range(sums))
    a, b, word, selector = (f"${2 * sums + r}" for r in range(4))  # after tied inputs
    text = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
        f"wgmma.mma_async.sp.sync.aligned.m64n{n}k32.f32.{kind}.{kind} "
        f"{{{out}}}, {a}, {b}, {word}, {selector}, p, 1, 1, 0, {transposed}; }}\n"
    )
    ties = [str(r) for r in range(sums)]
    return text, ",".join(["=f"] * sums + ties + ["l", "l", "r", "n"])


def sparse_product_meaning(acc: Array, meta: Array, a: Array, b: Array) -> Array:
    """`sparse_product` in jax.numpy: a [64, 64] stored, b [128, n].

    Columns that a row does not keep are never read for it, as in the instruction.
    """
    words = from_sp_meta(meta.reshape(1, 2, 128))
    shift = 4 * jnp.arange(8, dtype=jnp.uint32)
    nibbles = ((words[..., None] >> shift) & 15).astype(jnp.int32).reshape(ROWS, -1)
    group = 4 * jnp.arange(nibbles.shape[1], dtype=jnp.int32)
    column = jnp.stack([group + (nibbles & 3), group + (nibbles >> 2)], axis=-1)
    read = b[column.reshape(ROWS, -1)]
    return acc + jnp.einsum("rc,rcn->rn", a, read, preferred_element_type=jnp.float32)


def gather_rows(groups: int) -> Any:
    """Copies rows of x^T by index into a shared tile, zeros where the index is ABSENT.

    Args:
      groups: warpgroups of the block, which share the work.

    Returns:
      A function (ctx, index, x, start, tile): index i32[rows] and tile [rows, n] in
      shared memory, x^T [k, n_all] in global memory, start the first column of the
      tile in x^T. It starts cp.async copies, which the caller commits and awaits.
    """

    def gather(ctx: Any, index: Any, x: Any, start: Any, tile: Any) -> None:
        del ctx
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        c = lambda value: utils.c(value, i32)  # noqa: E731
        k_tiles, n_tiles, eight, wide = ir.MemRefType(tile.type).shape
        assert eight == 8
        rows, chunks, per_tile = 8 * k_tiles, 2 * wide * n_tiles // CHUNK, wide // 8
        stride = ir.MemRefType(x.type).get_strides_and_offset()[0][0]
        mask = {32: 1, 64: 3, 128: 7}[2 * wide]
        per_pass = groups * 128 // chunks
        source, index = utils.memref_ptr(x), utils.memref_ptr(index)
        base = llvm.ptrtoint(i32, utils.memref_ptr(tile))
        thread = utils.thread_idx()
        column = arith.remui(thread, c(chunks))
        start = start.registers.item()
        # Row tiles are contiguous over the column tiles, then 8 rows of `wide`.
        inside = arith.addi(
            arith.muli(arith.divui(column, c(per_tile)), c(16 * wide)),
            arith.muli(arith.remui(column, c(per_tile)), c(CHUNK)),
        )
        for step in range(-(-rows // per_pass)):
            row = arith.addi(arith.divui(thread, c(chunks)), c(step * per_pass))
            at = llvm.load(i32, utils.getelementptr(index, [row], i32))
            live = arith.cmpi(arith.CmpIPredicate.sge, at, c(0))
            safe = arith.extui(i64, arith.select(live, at, c(0)))
            bytes_read = arith.select(live, c(CHUNK), c(0))
            first = arith.extui(i64, arith.addi(start, arith.muli(column, c(8))))
            element = arith.addi(arith.muli(safe, utils.c(stride, i64)), first)
            address = utils.getelementptr(
                source, [element], ir.IntegerType.get_signless(16)
            )
            to = arith.addi(
                inside,
                arith.addi(
                    arith.muli(arith.shrui(row, c(3)), c(16 * wide * n_tiles)),
                    arith.muli(arith.andi(row, c(7)), c(2 * wide)),
                ),
            )
            # The swizzle of TMA and wgmma: bits 7-9 of the address onto bits 4-6.
            flip = arith.andi(arith.shrui(to, c(7)), c(mask))
            to = arith.xori(to, arith.shli(flip, c(4)))
            llvm.inline_asm(
                None,
                [arith.addi(base, to), address, bytes_read],
                "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                "r,l,r",
                asm_dialect=0,
                has_side_effects=True,
            )

    return gather


def gather_rows_meaning(groups: int) -> Any:
    """`gather_rows` in Pallas: row after row, each copied by one of the warpgroups."""
    from jax.experimental import pallas as pl

    def gather(index: Any, x: Any, start: Array, tile: Any) -> None:
        n = tile.shape[-1]
        group = jax.lax.axis_index("group")

        def row(step: Array, _: None) -> None:
            r = step * groups + group
            at = index[r]
            values = x[pl.ds(jnp.maximum(at, 0), 1), pl.ds(start, n)]
            absent = jnp.zeros_like(values)
            tile[pl.ds(r, 1), :] = jnp.where(at == ABSENT, absent, values)

        jax.lax.fori_loop(0, tile.shape[0] // groups, row, None)

    return gather


def commit_gather(ctx: Any) -> None:
    """Closes the group of the gathers since the last one."""
    del ctx
    from jaxlib.mlir.dialects import nvvm

    nvvm.cp_async_commit_group()


def await_gather(pending: int) -> Any:
    """Waits until at most `pending` groups of this thread are in flight."""

    def wait(ctx: Any) -> None:
        del ctx
        from jaxlib.mlir.dialects import nvvm

        nvvm.cp_async_wait_group(pending)

    return wait


def scatter_rows(ctx: Any, acc: Any, order: Any, out: Any, start: Any) -> None:
    """Stores row r of acc [64, n] to out[order[r], start:start + n], unless negative.

    Args:
      ctx: launch context, unused.
      acc: f32 registers in WGMMA layout, two neighbours of a row each.
      order: i32[64], row of the output, in the row layout of acc.
      out: global memory [rows, n_all], float32 or 16 bit.
      start: first column.
    """
    del ctx
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    out_type = ir.MemRefType(out.type)
    element = out_type.element_type
    stride = out_type.get_strides_and_offset()[0][0]
    places = order.broadcast_in_dim(acc.shape, (0,), acc.layout)
    values = acc.astype(element)
    base, start = utils.memref_ptr(out), start.registers.item()
    first = lambda x: vector.extract(  # noqa: E731
        x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
    )
    wide = utils.bitwidth(element) == 32
    store = "st.global.v2.b32 [$1], {$2, $3}" if wide else "st.global.b32 [$1], $2"
    ptx = f"{{ .reg .pred p; setp.ge.s32 p, $0, 0; @p {store}; }}"
    indices = acc.layout.thread_idxs(acc.shape)
    for value, place, (_, column) in zip(
        values.registers.flat, places.registers.flat, indices, strict=True
    ):
        row = first(place)
        column = arith.addi(arith.index_cast(i32, column), start)
        at = arith.addi(
            arith.muli(arith.extsi(i64, row), utils.c(stride, i64)),
            arith.extui(i64, column),
        )
        address = utils.getelementptr(base, [at], element)
        if wide:
            pair = utils.bitcast(value, ir.VectorType.get((2,), i32))
            second = vector.extract(
                pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([1])
            )
            words = [first(pair), second]
        else:
            words = [utils.bitcast(value, i32)]
        llvm.inline_asm(
            None,
            [row, address, *words],
            ptx,
            ",".join(["r", "l"] + ["r"] * len(words)),
            asm_dialect=0,
            has_side_effects=True,
        )


def scatter_rows_meaning(acc: Array, order: Array, out: Any, start: Array) -> None:
    """`scatter_rows` in Pallas: one row after the other."""
    from jax.experimental import pallas as pl

    def row(r: Array, _: None) -> None:
        @pl.when(order[r] >= 0)
        def _store() -> None:
            values = jax.lax.dynamic_slice_in_dim(acc, r, 1).astype(out.dtype)
            out[pl.ds(order[r], 1), pl.ds(start, acc.shape[1])] = values

    jax.lax.fori_loop(0, acc.shape[0], row, None)
