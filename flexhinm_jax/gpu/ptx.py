"""The few instructions that Pallas has no words for, as inline PTX for Hopper.

Functions for `plgpu.inline_mgpu`, each beside its meaning in jax.numpy, which takes its
place in the interpreter: the sparse product of two tiles in shared memory, the ways of
activations into shared memory, the sum over a cluster, the scatter of a result tile to
rows of the output. All names of `jax.experimental.mosaic` are imported inside.

Sources: PTX ISA, wgmma.mma_async.sp, cp.async, barrier.cluster and mapa; 16-bit types
only.
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


def copy_columns(groups: int) -> Any:
    """Copies 128 columns of x into a shared tile, zeros for columns that x lacks.

    Args:
      groups: warpgroups of the block, which share the work.

    Returns:
      A function (ctx, x, start, column, tile): x [n, i] in global memory, i a multiple
      of 8; tile [rows, 128] in shared memory, 128-byte swizzle, in tiles of 8 rows by
      64 columns; start and column of its first element. Rows that x lacks stay as they
      are: no result that is stored depends on them. It starts cp.async copies, which
      the caller commits and awaits.
    """

    def copy(ctx: Any, x: Any, start: Any, column: Any, tile: Any) -> None:
        del ctx
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        half = ir.IntegerType.get_signless(16)
        c = lambda value: utils.c(value, i32)  # noqa: E731
        less = lambda a, b: arith.cmpi(arith.CmpIPredicate.slt, a, c(b))  # noqa: E731
        n, inputs = ir.MemRefType(x.type).shape
        rows, threads = 8 * ir.MemRefType(tile.type).shape[0], 128 * groups
        source, base = utils.memref_ptr(x), llvm.ptrtoint(i32, utils.memref_ptr(tile))
        start, column = start.registers.item(), column.registers.item()
        for step in range(-(-rows * CHUNK // threads)):  # a row has 16 chunks
            number = arith.addi(utils.thread_idx(), c(step * threads))
            row, chunk = (f(number, c(CHUNK)) for f in (arith.divui, arith.remui))
            token = arith.addi(start, row)
            at = arith.addi(column, arith.muli(chunk, c(8)))
            exists = less(at, inputs)
            offset = arith.addi(
                arith.muli(arith.extui(i64, token), utils.c(inputs, i64)),
                arith.extui(i64, arith.select(exists, at, c(0))),
            )
            live = arith.andi(less(row, rows), less(token, n))
            llvm.inline_asm(
                None,
                [
                    arith.addi(base, _in_tile(row, arith.muli(chunk, c(CHUNK)))),
                    utils.getelementptr(source, [offset], half),
                    arith.select(exists, c(CHUNK), c(0)),
                    arith.extui(i32, live),
                ],
                "{ .reg .pred p; setp.ne.s32 p, $3, 0; "
                "@p cp.async.cg.shared.global [$0], [$1], 16, $2; }",
                "r,l,r,r",
                asm_dialect=0,
                has_side_effects=True,
            )

    return copy


def _in_tile(row: Any, byte: Any) -> Any:
    """Where byte of a row of 256 lies in tiles [8, 64] of 16 bit, 128-byte swizzle."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    c = lambda value: utils.c(value, row.type)  # noqa: E731
    low = arith.andi(row, c(7))
    tiles = arith.addi(
        arith.muli(arith.shrui(row, c(3)), c(2048)),
        arith.muli(arith.shrui(byte, c(7)), c(1024)),
    )
    inside = arith.xori(arith.andi(byte, c(127)), arith.shli(low, c(4)))
    return arith.addi(tiles, arith.addi(arith.muli(low, c(128)), inside))


def copy_columns_meaning(x: Any, start: Array, column: Array, tile: Any) -> None:
    """`copy_columns` in Pallas, by the first warpgroup; x has whole tiles."""
    from jax.experimental import pallas as pl

    @pl.when(jax.lax.axis_index("group") == 0)
    def _copy() -> None:
        rows, columns = tile.shape
        tile[...] = x[pl.ds(start, rows), pl.ds(column, columns)]


def hold_chunks(groups: int) -> Any:
    """Copies 16 bytes per thread of x [n, i] to shared memory, one after the other.

    Args:
      groups: warpgroups of the block, which share the work.

    Returns:
      A function (ctx, x, k, held): the k-th such piece. It starts cp.async copies.
    """

    def hold(ctx: Any, x: Any, k: Any, held: Any) -> None:
        del ctx
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        c = lambda value: utils.c(value, i32)  # noqa: E731
        n, inputs = ir.MemRefType(x.type).shape
        first = arith.muli(k.registers.item(), c(128 * groups))
        number = arith.addi(first, utils.thread_idx())
        offset = arith.muli(number, c(CHUNK))
        base = llvm.ptrtoint(i32, utils.memref_ptr(held))
        llvm.inline_asm(
            None,
            [
                arith.addi(base, offset),
                utils.getelementptr(utils.memref_ptr(x), [offset], byte),
                number,
            ],
            f"{{ .reg .pred p; setp.lt.s32 p, $2, {n * inputs // 8}; "
            "@p cp.async.cg.shared.global [$0], [$1], 16; }",
            "r,l,r",
            asm_dialect=0,
            has_side_effects=True,
        )

    return hold


def hold_chunks_meaning(x: Any, k: Array, held: Any) -> None:
    """`hold_chunks` in Pallas: everything at once, by the first warpgroup."""
    from jax.experimental import pallas as pl

    del k

    @pl.when(jax.lax.axis_index("group") == 0)
    def _hold() -> None:
        held[...] = x[...]


def take_columns(groups: int) -> Any:
    """Columns of x in shared memory by index into a tile, zeros where it is ABSENT.

    Args:
      groups: warpgroups of the block; they take the tokens in turn.

    Returns:
      A function (ctx, index, held, tile): index i32[128], held [n, i] and tile
      [rows, 128], all in shared memory, the tile as in `copy_columns`.
    """

    def take(ctx: Any, index: Any, held: Any, tile: Any) -> None:
        del ctx
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32, half = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
        byte = ir.IntegerType.get_signless(8)
        c = lambda value: utils.c(value, i32)  # noqa: E731
        n, inputs = ir.MemRefType(held.type).shape
        index, held, tile = (utils.memref_ptr(r) for r in (index, held, tile))
        thread = utils.thread_idx()
        column, group = (f(thread, c(128)) for f in (arith.remui, arith.divui))
        at = llvm.load(i32, utils.getelementptr(index, [column], i32))
        live = arith.cmpi(arith.CmpIPredicate.sge, at, c(0))
        safe = arith.select(live, at, c(0))
        for step in range(-(-n // groups)):
            # The last one of an odd number is taken twice, with the same result.
            turn = arith.addi(group, c(step * groups)) if groups > 1 else c(step)
            token = arith.minui(turn, c(n - 1))
            element = arith.addi(arith.muli(token, c(inputs)), safe)
            value = llvm.load(half, utils.getelementptr(held, [element], half))
            value = arith.select(live, value, utils.c(0, half))
            place = _in_tile(token, arith.muli(column, c(2)))
            llvm.store(value, utils.getelementptr(tile, [place], byte))

    return take


def take_columns_meaning(index: Any, held: Any, tile: Any) -> None:
    """`take_columns` in Pallas, by the first warpgroup."""
    from jax.experimental import pallas as pl

    @pl.when(jax.lax.axis_index("group") == 0)
    def _take() -> None:
        at = index[...]
        taken = jnp.take(held[...], jnp.maximum(at, 0), axis=1)
        tile[pl.ds(0, held.shape[0]), :] = jnp.where(
            at == ABSENT, jnp.zeros_like(taken), taken
        )


def commit_copies(ctx: Any) -> None:
    """Closes the group of the cp.async copies since the last one."""
    del ctx
    from jaxlib.mlir.dialects import nvvm

    nvvm.cp_async_commit_group()


def await_copies(pending: int) -> Any:
    """Waits until at most `pending` groups of this thread are in flight."""

    def wait(ctx: Any) -> None:
        del ctx
        from jaxlib.mlir.dialects import nvvm

        nvvm.cp_async_wait_group(pending)

    return wait


def meet(ctx: Any) -> None:
    """All threads of a cluster come to here before one of them goes on."""
    del ctx
    from jaxlib.mlir.dialects import llvm

    for text in ("arrive.release", "wait.acquire"):
        llvm.inline_asm(
            None,
            [],
            f"barrier.cluster.{text}.aligned;",
            "",
            asm_dialect=0,
            has_side_effects=True,
        )


def combine(splits: int) -> Any:
    """Adds the accumulators of all blocks of a cluster to that of the first one.

    Args:
      splits: blocks, in one line.

    Returns:
      A function (ctx, acc, scratch, split, first) -> acc. scratch: shared memory that
      nobody else uses, 4 bytes per sum of the block; first: rank of split 0 in the
      cluster. The result is that of split 0, the others return anything. Sums are added
      in the order of the splits. There is no such function in the interpreter, which
      sees no memory of another block.
    """

    def add(ctx: Any, acc: Any, scratch: Any, split: Any, first: Any) -> Any:
        from jax.experimental.mosaic.gpu import fragmented_array as fa
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        c = lambda value: utils.c(value, i32)  # noqa: E731
        two = ir.VectorType.get((2,), f32)
        asm = lambda *a: llvm.inline_asm(*a, asm_dialect=0, has_side_effects=True)  # noqa: E731
        pairs = list(acc.registers.flat)
        assert all(pair.type == two for pair in pairs)
        thread = utils.thread_idx()
        warpgroup, lane = (f(thread, c(128)) for f in (arith.divui, arith.remui))
        start = arith.addi(
            arith.muli(warpgroup, c(1024 * len(pairs))), arith.muli(lane, c(8))
        )
        own = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(scratch)), start)

        def halves(pair: Any) -> list[Any]:
            at = (ir.DenseI64ArrayAttr.get([k]) for k in (0, 1))
            return [
                vector.extract(pair, dynamic_position=[], static_position=k) for k in at
            ]

        for j, pair in enumerate(pairs):
            text = f"st.shared.v2.f32 [$0+{1024 * j}], {{$1, $2}};"
            asm(None, [own, *halves(pair)], text, "r,f,f")
        meet(ctx)
        sums = [halves(pair) for pair in pairs]
        for other in range(1, splits):
            there = asm(
                i32,
                [own, arith.addi(first.registers.item(), c(other))],
                "mapa.shared::cluster.u32 $0, $1, $2;",
                "=r,r,r",
            )
            for j in range(len(pairs)):
                both: Any = asm(
                    llvm.StructType.get_literal([f32] * 2),
                    [there, split.registers.item()],
                    "{ .reg .pred p; mov.b32 $0, 0; mov.b32 $1, 0; "
                    "setp.eq.s32 p, $3, 0; "
                    f"@p ld.shared::cluster.v2.f32 {{$0, $1}}, [$2+{1024 * j}]; }}",
                    "=&f,=&f,r,r",
                )
                more = [llvm.extractvalue(f32, both, [k]) for k in (0, 1)]
                sums[j] = [arith.addf(a, b) for a, b in zip(sums[j], more, strict=True)]
        # The shared memory that was read lives as long as its block.
        meet(ctx)
        registers = np.array([vector.from_elements(two, s) for s in sums], dtype=object)
        return fa.FragmentedArray(
            _registers=registers.reshape(acc.registers.shape),
            _layout=acc.layout,
            _is_signed=None,
        )

    return add


def scatter_rows(ctx: Any, acc: Any, order: Any, out: Any, start: Any) -> None:
    """Stores row r of acc [64, n] to column order[r] of out, unless negative.

    Args:
      ctx: launch context, unused.
      acc: f32 registers in WGMMA layout, two neighbours of a row each.
      order: i32[64], column of the output, in the row layout of acc.
      out: global memory [n_all, columns], float32 or 16 bit.
      start: row of the output for the first column of acc; those from n_all on are not
        stored.
    """
    del ctx
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    out_type = ir.MemRefType(out.type)
    element, (rows, columns) = out_type.element_type, out_type.shape
    bits = utils.bitwidth(element)
    places = order.broadcast_in_dim(acc.shape, (0,), acc.layout)
    values = acc.astype(element)
    base, start = utils.memref_ptr(out), start.registers.item()
    first = lambda x: vector.extract(  # noqa: E731
        x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
    )
    store = f"st.global.b{bits}"
    text = (
        "{ .reg .pred p; setp.ge.s32 p, $0, 0; "
        f"setp.lt.and.s32 p, $1, {rows}, p; @p {store} [$2], $3; "
        f"setp.lt.and.s32 p, $1, {rows - 1}, p; "
        f"@p {store} [$2+{columns * bits // 8}], $4; }}"
    )
    indices = acc.layout.thread_idxs(acc.shape)
    for value, place, (_, token) in zip(
        values.registers.flat, places.registers.flat, indices, strict=True
    ):
        column = first(place)
        token = arith.addi(arith.index_cast(i32, token), start)
        at = arith.addi(
            arith.muli(arith.extui(i64, token), utils.c(columns, i64)),
            arith.extsi(i64, column),
        )
        address = utils.getelementptr(base, [at], element)
        if bits == 32:
            pair = utils.bitcast(value, ir.VectorType.get((2,), i32))
            second = vector.extract(
                pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([1])
            )
            words = [first(pair), second]
        else:  # a store of 16 bits takes the low half of a register
            word = utils.bitcast(value, i32)
            words = [word, arith.shrui(word, utils.c(16, i32))]
        llvm.inline_asm(
            None,
            [column, token, address, *words],
            text,
            "r,r,l,r,r",
            asm_dialect=0,
            has_side_effects=True,
        )


def scatter_rows_meaning(acc: Array, order: Array, out: Any, start: Array) -> None:
    """`scatter_rows` in Pallas: one row after the other; out has whole tiles."""
    from jax.experimental import pallas as pl

    def row(r: Array, _: None) -> None:
        @pl.when(order[r] >= 0)
        def _store() -> None:
            values = jax.lax.dynamic_slice_in_dim(acc, r, 1).astype(out.dtype).T
            out[pl.ds(start, acc.shape[1]), pl.ds(order[r], 1)] = values

    jax.lax.fori_loop(0, acc.shape[0], row, None)
