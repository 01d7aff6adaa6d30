"""The few instructions that Pallas has no words for, as inline PTX for Hopper.

Every function returns something to call in a kernel: PTX on a GPU, in the interpreter
its meaning in jax.numpy. They are the sparse product of two tiles in shared memory, the
ways of activations into shared memory, the sum over a cluster, and the scatter of a
result tile to rows of the output. Names of `jax.experimental.mosaic` are imported
inside.

Sources: PTX ISA, wgmma.mma_async.sp, cp.async, barrier.cluster and mapa; 16-bit types
only.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from flexhinm_jax.gpu import support
from flexhinm_jax.gpu.layouts import ABSENT, ROWS, from_sp_meta

CHUNK = 16
"""Bytes of one cp.async."""

PER_CHUNK = CHUNK // 2
"""Elements of one cp.async."""

LANES = 128
"""Threads of a warpgroup."""


def inline(
    function: Any, meaning: Any, arguments: Any = (), returns: Any = None
) -> Any:
    """A function of MLIR values to call in a kernel, or its meaning if interpreted.

    Args:
      function: (launch context, values) -> value.
      meaning: what to call in the interpreter.
      arguments: layouts and reference types of the values.
      returns: type of the result.
    """
    if support.interpreting():
        return meaning
    plgpu = support.mosaic()
    return plgpu.inline_mgpu(arg_types=arguments, return_type=returns)(function)


def _ref(transforms: Any = ()) -> Any:
    return support.mosaic().RefType(transforms)


def _splat() -> Any:
    return support.mosaic().Layout.WG_SPLAT


def _operator(operation: Callable[..., Any]) -> Callable[["Word", Any], "Word"]:
    """A method of words; the other operand may be a number."""

    def method(self: "Word", other: Any) -> "Word":
        if not isinstance(other, Word):
            other = _constant(other, self.value.type)
        return Word(operation(self.value, other.value))

    return method


@dataclasses.dataclass(frozen=True)
class Word:
    """An integer in a register of every thread: unsigned, but signed for `<`."""

    value: Any

    __add__, __mul__ = _operator(arith.addi), _operator(arith.muli)
    __floordiv__, __mod__ = _operator(arith.divui), _operator(arith.remui)
    __and__, __xor__ = _operator(arith.andi), _operator(arith.xori)
    __lshift__, __rshift__ = _operator(arith.shli), _operator(arith.shrui)
    __lt__ = _operator(functools.partial(arith.cmpi, arith.CmpIPredicate.slt))
    least = _operator(arith.minui)

    def where(self, true: Any, false: Any) -> "Word":
        """One of two words by this bit; numbers have 32 bits."""
        words = (
            w if isinstance(w, Word) else _constant(w, _i32()) for w in (true, false)
        )
        return Word(arith.select(self.value, *(w.value for w in words)))

    def wide(self, signed: bool = False) -> "Word":
        """With 64 bits."""
        extend = arith.extsi if signed else arith.extui
        return Word(extend(ir.IntegerType.get_signless(64), self.value))


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _constant(value: int, kind: Any) -> Word:
    return Word(arith.constant(kind, ir.IntegerAttr.get(kind, value)))


def _thread() -> Word:
    from jax.experimental.mosaic.gpu import utils

    return Word(utils.thread_idx())


def _scalar(splat: Any) -> Word:
    return Word(splat.registers.item())


def _at(ref: Any, index: Word, bits: int) -> Any:
    """Pointer to an element of so many bits; ref is a pointer or a reference."""
    from jax.experimental.mosaic.gpu import utils

    pointer = utils.memref_ptr(ref) if isinstance(ref.type, ir.MemRefType) else ref
    kind = ir.IntegerType.get_signless(bits)
    return utils.getelementptr(pointer, [index.value], kind)


def _shared(ref: Any) -> Word:
    """Address in shared memory."""
    from jax.experimental.mosaic.gpu import utils

    return Word(llvm.ptrtoint(_i32(), utils.memref_ptr(ref)))


def _load(ref: Any, index: Word, bits: int) -> Any:
    return llvm.load(ir.IntegerType.get_signless(bits), _at(ref, index, bits))


def _asm(text: str, kinds: str, *operands: Any, returns: Any = None) -> Any:
    """Inline PTX; operands are words or values."""
    values = [v.value if isinstance(v, Word) else v for v in operands]
    options = {"asm_dialect": 0, "has_side_effects": True}
    return llvm.inline_asm(returns, values, text, kinds, **options)


def _part(value: Any, place: int) -> Any:
    """An element of a vector."""
    at = ir.DenseI64ArrayAttr.get([place])
    return vector.extract(value, dynamic_position=[], static_position=at)


def _array(registers: list[Any], like: Any) -> Any:
    """Registers as an array in the layout of another one."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    return fa.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(like.registers.shape),
        _layout=like.layout,
        _is_signed=None,
    )


def _by_first_warpgroup(body: Callable[..., None]) -> Callable[..., None]:
    """What a copy means: the first warpgroup does all of it."""
    from jax.experimental import pallas as pl

    def meaning(*arguments: Any) -> None:
        @pl.when(jax.lax.axis_index("group") == 0)
        def _copy() -> None:
            body(*arguments)

    return meaning


def fence(kind: Any) -> Any:
    """Orders the registers of a fresh accumulator before the first product.

    Args:
      kind: its type.

    Returns:
      A function acc -> acc.
    """

    def order(ctx: Any, acc: Any) -> Any:
        del ctx
        from jax.experimental.mosaic import gpu as mgpu

        return mgpu.WGMMAAccumulator.from_registers(acc).value

    return inline(order, lambda acc: acc, (kind.layout,), kind)


def drain(kind: Any) -> Any:
    """Waits for every product in flight; the accumulator may be read afterwards.

    Args:
      kind: type of the accumulator.

    Returns:
      A function acc -> acc.
    """

    def wait(ctx: Any, acc: Any) -> Any:
        del ctx
        from jax.experimental.mosaic.gpu import fragmented_array as fa

        nvvm.wgmma_wait_group_sync_aligned(0)
        return fa.optimization_barrier(acc)

    return inline(wait, lambda acc: acc, (kind.layout,), kind)


def sparse_product(
    kind: Any,
    words: Any,
    of_a: Any,
    of_b: Any,
    in_flight: int,
    turned: bool,
    selectors: int = 2,
) -> Any:
    """Adds A [64, 2 c] in 2:4 form @ B [2 c, n] to an accumulator; c is 32 or 64.

    Args:
      kind: type of the accumulator.
      words: layout of the metadata.
      of_a: how A lies in shared memory.
      of_b: how B lies there.
      in_flight: products that may still run when it returns. They read the registers of
        their metadata, of which neither LLVM nor ptxas knows when they are written
        again.
      turned: B lies in memory as [n, 2 c].
      selectors: sparsity selectors in use; with 1 the metadata that selector 1 reads
        are moved to the lanes of selector 0.

    Returns:
      A function (acc, meta, a, b) -> acc. acc: f32 registers in WGMMA layout, ordered
      by `fence` or by an earlier product. meta: an i32 word per thread for every 32
      stored columns, `layouts.to_sp_meta`. a: shared memory [64, c] in tiles of 8 rows,
      the stored columns, byte for byte a dense tile. b: shared memory, the 2 c logical
      columns by n, in tiles; either dimension may be the contiguous one.
    """

    def multiply(ctx: Any, acc: Any, meta: Any, a: Any, b: Any) -> Any:
        del ctx
        from jax.experimental.mosaic import gpu as mgpu

        b = mgpu.memref_transpose(b, (1, 0, 3, 2)) if turned else b
        return _sparse_product(acc, meta, a, b, in_flight, selectors)

    def meaning(acc: Array, meta: Array, a: Any, b: Any) -> Array:
        return _product_meaning(acc, meta, a[...], b[...].T if turned else b[...])

    return inline(multiply, meaning, (kind.layout, words, _ref(of_a), _ref(of_b)), kind)


def _sparse_product(
    acc: Any, meta: Any, a_ref: Any, b_ref: Any, in_flight: int, selectors: int
) -> Any:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import mma_utils, utils

    f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
    held = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
    registers = [_part(r, 0) for r in held._value.registers.flat]
    words = [_part(r, 0) for r in fa.optimization_barrier(meta).registers.flat]
    n, stored = acc.shape[1], 32 * len(words)
    if selectors == 1:
        words = [w for word in words for w in (word, utils.shfl_bfly(word, 2))]
    nvvm.wgmma_fence_aligned()  # the metadata are registers of the product, too
    assert len(registers) == n // 2

    b_type = ir.MemRefType(b_ref.type)
    strides, _ = b_type.get_strides_and_offset()
    k_tile, n_tile = b_type.shape[2:]
    swizzle = 2 * max(k_tile, n_tile)  # bytes; the other side of a tile has 8 rows
    (a_base, (_, a_strides)), _, a_fast = mma_utils.create_descriptor(
        a_ref, swizzle=2 * stored, group_size=(ROWS, stored), logical_k_major=False
    )
    (b_base, _), _, b_fast = mma_utils.create_descriptor(
        b_ref, swizzle=swizzle, group_size=(k_tile, n), logical_k_major=True
    )
    transposed = int(b_fast != mma_utils.Dim.K)
    assert a_fast == mma_utils.Dim.K and b_fast in mma_utils.Dim

    def b_offset(k: int) -> int:  # bytes from the first to the k-th logical column
        return 2 * (k // k_tile * strides[0] + k % k_tile * strides[2])

    text, constraints = _instruction(n, str(b_type.element_type), transposed)

    def advance(base: Any, offset: int) -> Any:
        step = utils.c(mma_utils.encode_addr(offset), i64)
        return llvm.add(base, step, overflow_flags=llvm.IntegerOverflowFlags.none)

    for i in range(stored // 16):  # k = 32 logical, 16 stored columns each
        result = _asm(
            text,
            constraints,
            *registers,
            advance(a_base, i * a_strides[-1]),
            advance(b_base, b_offset(32 * i)),
            words[i // selectors],
            llvm.ConstantOp(_i32(), ir.IntegerAttr.get(_i32(), i % selectors)).result,
            returns=llvm.StructType.get_literal([f32] * len(registers)),
        )
        registers = [llvm.extractvalue(f32, result, [r]) for r in range(len(registers))]
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(in_flight)
    one = ir.VectorType.get((1,), f32)
    fresh = [vector.broadcast(one, r) for r in registers]
    return _array(fresh, held._value).to_layout(held._original_layout)


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


def _product_meaning(acc: Array, meta: Array, a: Array, b: Array) -> Array:
    """`sparse_product` in jax.numpy: a [64, c] stored, b [2 c, n].

    Columns that a row does not keep are never read for it, as in the instruction.
    """
    words = from_sp_meta(meta.reshape(1, -1, LANES))
    shift = 4 * jnp.arange(8, dtype=jnp.uint32)
    nibbles = ((words[..., None] >> shift) & 15).astype(jnp.int32).reshape(ROWS, -1)
    group = 4 * jnp.arange(nibbles.shape[1], dtype=jnp.int32)
    column = jnp.stack([group + (nibbles & 3), group + (nibbles >> 2)], axis=-1)
    read = b[column.reshape(ROWS, -1)]
    return acc + jnp.einsum("rc,rcn->rn", a, read, preferred_element_type=jnp.float32)


def gather_rows(groups: int, of_tile: Any) -> Any:
    """Copies rows of x^T by index into a shared tile, zeros where the index is ABSENT.

    Args:
      groups: warpgroups of the block, which share the work.
      of_tile: how the tile lies in shared memory.

    Returns:
      A function (index, x, start, tile): index i32[rows] and tile [rows, n] in shared
      memory, x^T [k, n_all] in global memory, start the first column of the tile in
      x^T. It starts cp.async copies, which the caller commits and awaits.
    """

    def gather(ctx: Any, index: Any, x: Any, start: Any, tile: Any) -> None:
        del ctx
        k_tiles, n_tiles, eight, wide = ir.MemRefType(tile.type).shape
        assert eight == 8
        per_tile, row_bytes = wide // PER_CHUNK, 2 * wide
        chunks = per_tile * n_tiles
        stride = ir.MemRefType(x.type).get_strides_and_offset()[0][0]
        mask = row_bytes // CHUNK - 1
        per_pass = groups * LANES // chunks
        base, thread = _shared(tile), _thread()
        column = thread % chunks
        first = (_scalar(start) + column * PER_CHUNK).wide()
        # Row tiles are contiguous over the column tiles, then 8 rows of `wide`.
        inside = column // per_tile * (8 * row_bytes) + column % per_tile * CHUNK
        for step in range(-(-8 * k_tiles // per_pass)):
            row = thread // chunks + step * per_pass
            at = Word(_load(index, row, 32))
            absent = at < 0
            element = absent.where(0, at).wide() * stride + first
            down = (row >> 3) * (8 * row_bytes * n_tiles) + (row & 7) * row_bytes
            to = inside + down
            # The swizzle of TMA and wgmma: bits 7-9 of the address onto bits 4-6.
            to = to ^ (((to >> 7) & mask) << 4)
            _asm(
                "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                "r,l,r",
                base + to,
                _at(x, element, 16),
                absent.where(0, CHUNK),
            )

    def meaning(index: Any, x: Any, start: Array, tile: Any) -> None:
        """Row after row, each copied by one of the warpgroups."""
        from jax.experimental import pallas as pl

        n = tile.shape[-1]
        group = jax.lax.axis_index("group")

        def row(step: Array, _: None) -> None:
            r = step * groups + group
            at = index[r]
            values = x[pl.ds(jnp.maximum(at, 0), 1), pl.ds(start, n)]
            absent = jnp.zeros_like(values)
            tile[pl.ds(r, 1), :] = jnp.where(at == ABSENT, absent, values)

        jax.lax.fori_loop(0, tile.shape[0] // groups, row, None)

    return inline(gather, meaning, (_ref(), _ref(), _splat(), _ref(of_tile)))


def copy_columns(groups: int, of_tile: Any) -> Any:
    """Copies 128 columns of x into a shared tile, zeros for columns that x lacks.

    Args:
      groups: warpgroups of the block, which share the work.
      of_tile: how the tile lies in shared memory.

    Returns:
      A function (x, start, column, tile): x [n, i] in global memory, i a multiple of 8;
      tile [rows, 128] in shared memory, 128-byte swizzle, in tiles of 8 rows by 64
      columns; start and column of its first element. Rows that x lacks stay as they
      are: no result that is stored depends on them. It starts cp.async copies, which
      the caller commits and awaits. In the interpreter x has whole tiles.
    """

    def copy(ctx: Any, x: Any, start: Any, column: Any, tile: Any) -> None:
        del ctx
        n, inputs = ir.MemRefType(x.type).shape
        rows, threads = 8 * ir.MemRefType(tile.type).shape[0], LANES * groups
        base, start, column = _shared(tile), _scalar(start), _scalar(column)
        for step in range(-(-rows * CHUNK // threads)):  # a row has 16 chunks
            number = _thread() + step * threads
            row, chunk = number // CHUNK, number % CHUNK
            token, at = start + row, column + chunk * PER_CHUNK
            exists = at < inputs
            offset = token.wide() * inputs + exists.where(at, 0).wide()
            live = (row < rows) & (token < n)
            _asm(
                "{ .reg .pred p; setp.ne.s32 p, $3, 0; "
                "@p cp.async.cg.shared.global [$0], [$1], 16, $2; }",
                "r,l,r,r",
                base + _in_tile(row, chunk * CHUNK),
                _at(x, offset, 16),
                exists.where(CHUNK, 0),
                live.where(1, 0),
            )

    @_by_first_warpgroup
    def meaning(x: Any, start: Array, column: Array, tile: Any) -> None:
        from jax.experimental import pallas as pl

        rows, columns = tile.shape
        tile[...] = x[pl.ds(start, rows), pl.ds(column, columns)]

    return inline(copy, meaning, (_ref(), _splat(), _splat(), _ref(of_tile)))


def _in_tile(row: Word, byte: Word) -> Word:
    """Where byte of a row of 256 lies in tiles [8, 64] of 16 bit, 128-byte swizzle."""
    low = row & 7
    tiles = (row >> 3) * 2048 + (byte >> 7) * 1024
    return tiles + low * 128 + ((byte & 127) ^ (low << 4))


def hold_chunks(groups: int) -> Any:
    """Copies 16 bytes per thread of x [n, i] to shared memory, one after the other.

    Args:
      groups: warpgroups of the block, which share the work.

    Returns:
      A function (x, k, held): the k-th such piece, in the interpreter all of them. It
      starts cp.async copies.
    """

    def hold(ctx: Any, x: Any, k: Any, held: Any) -> None:
        del ctx
        n, inputs = ir.MemRefType(x.type).shape
        number = _scalar(k) * (LANES * groups) + _thread()
        offset = number * CHUNK
        _asm(
            f"{{ .reg .pred p; setp.lt.s32 p, $2, {n * inputs // PER_CHUNK}; "
            "@p cp.async.cg.shared.global [$0], [$1], 16; }",
            "r,l,r",
            _shared(held) + offset,
            _at(x, offset, 8),
            number,
        )

    @_by_first_warpgroup
    def meaning(x: Any, k: Array, held: Any) -> None:
        del k
        held[...] = x[...]

    return inline(hold, meaning, (_ref(), _splat(), _ref()))


def take_columns(groups: int, of_tile: Any) -> Any:
    """Columns of x in shared memory by index into a tile, zeros where it is ABSENT.

    Args:
      groups: warpgroups of the block; they take the tokens in turn.
      of_tile: how the tile lies in shared memory.

    Returns:
      A function (index, held, tile): index i32[128], held [n, i] and tile [rows, 128],
      all in shared memory, the tile as in `copy_columns`.
    """

    def take(ctx: Any, index: Any, held: Any, tile: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        del ctx
        n, inputs = ir.MemRefType(held.type).shape
        half = ir.IntegerType.get_signless(16)
        held, tile = utils.memref_ptr(held), utils.memref_ptr(tile)
        column, group = _thread() % LANES, _thread() // LANES
        at = Word(_load(index, column, 32))
        absent = at < 0
        safe = absent.where(0, at)
        for step in range(-(-n // groups)):
            # The last one of an odd number is taken twice, with the same result.
            token = (group + step * groups).least(n - 1)
            value = Word(_load(held, token * inputs + safe, 16))
            value = absent.where(_constant(0, half), value)
            llvm.store(value.value, _at(tile, _in_tile(token, column * 2), 8))

    @_by_first_warpgroup
    def meaning(index: Any, held: Any, tile: Any) -> None:
        from jax.experimental import pallas as pl

        at = index[...]
        taken = jnp.take(held[...], jnp.maximum(at, 0), axis=1)
        tile[pl.ds(0, held.shape[0]), :] = jnp.where(
            at == ABSENT, jnp.zeros_like(taken), taken
        )

    return inline(take, meaning, (_ref(), _ref(), _ref(of_tile)))


def commit_copies() -> Any:
    """Closes the group of the cp.async copies since the last one."""

    def commit(ctx: Any) -> None:
        del ctx
        nvvm.cp_async_commit_group()

    return inline(commit, lambda: None)


def await_copies(pending: int) -> Any:
    """Waits until at most `pending` groups of this thread are in flight."""

    def wait(ctx: Any) -> None:
        del ctx
        nvvm.cp_async_wait_group(pending)

    return inline(wait, lambda: None)


def meet() -> Any:
    """All threads of a cluster come to here before one of them goes on."""
    return inline(_meet, lambda: None)


def _meet(ctx: Any) -> None:
    del ctx
    for text in ("arrive.release", "wait.acquire"):
        _asm(f"barrier.cluster.{text}.aligned;", "")


def combine(kind: Any, of_scratch: Any, splits: int) -> Any:
    """Adds the accumulators of all blocks of a cluster to that of the first one.

    Args:
      kind: type of the accumulator.
      of_scratch: how the shared memory is declared that is used.
      splits: blocks, in one line.

    Returns:
      A function (acc, scratch, split, first) -> acc. scratch: shared memory that nobody
      else uses, 4 bytes per sum of the block; first: rank of split 0 in the cluster.
      The result is that of split 0, the others return anything. Sums are added in the
      order of the splits. There is no such function in the interpreter, which sees no
      memory of another block.
    """

    def add(ctx: Any, acc: Any, scratch: Any, split: Any, first: Any) -> Any:
        f32 = ir.F32Type.get()
        two = ir.VectorType.get((2,), f32)
        pairs = list(acc.registers.flat)
        assert all(pair.type == two for pair in pairs)
        warpgroup, lane = _thread() // LANES, _thread() % LANES
        start = warpgroup * (1024 * len(pairs)) + lane * 8
        own = _shared(scratch) + start
        sums = [[_part(pair, k) for k in (0, 1)] for pair in pairs]
        for j, pair in enumerate(sums):
            text = f"st.shared.v2.f32 [$0+{1024 * j}], {{$1, $2}};"
            _asm(text, "r,f,f", own, *pair)
        _meet(ctx)
        for other in range(1, splits):
            there = _asm(
                "mapa.shared::cluster.u32 $0, $1, $2;",
                "=r,r,r",
                own,
                _scalar(first) + other,
                returns=_i32(),
            )
            for j in range(len(sums)):
                both = _asm(
                    "{ .reg .pred p; mov.b32 $0, 0; mov.b32 $1, 0; "
                    "setp.eq.s32 p, $3, 0; "
                    f"@p ld.shared::cluster.v2.f32 {{$0, $1}}, [$2+{1024 * j}]; }}",
                    "=&f,=&f,r,r",
                    there,
                    _scalar(split),
                    returns=llvm.StructType.get_literal([f32] * 2),
                )
                more = [llvm.extractvalue(f32, both, [k]) for k in (0, 1)]
                sums[j] = [arith.addf(a, b) for a, b in zip(sums[j], more, strict=True)]
        # The shared memory that was read lives as long as its block.
        _meet(ctx)
        return _array([vector.from_elements(two, s) for s in sums], acc)

    arguments = (kind.layout, _ref(of_scratch), _splat(), _splat())
    return inline(add, None, arguments, kind)


def scatter_rows(layout: Any) -> Any:
    """Stores row r of an accumulator [64, n] to column order[r] of the result.

    Args:
      layout: of the accumulator.

    Returns:
      A function (acc, order, out, start). acc: f32 registers in WGMMA layout, two
      neighbours of a row each. order: i32[64], column of the output, negative for a row
      that is not stored, in the row layout of acc. out: global memory [n_all, columns],
      float32 or 16 bit. start: row of the output for the first column of acc; those
      from n_all on are not stored. In the interpreter out has whole tiles.
    """

    def scatter(ctx: Any, acc: Any, order: Any, out: Any, start: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        del ctx
        out_type = ir.MemRefType(out.type)
        element, (rows, columns) = out_type.element_type, out_type.shape
        bits = utils.bitwidth(element)
        places = order.broadcast_in_dim(acc.shape, (0,), acc.layout)
        values = acc.astype(element)
        base, start = utils.memref_ptr(out), _scalar(start)
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
            column = Word(_part(place, 0))
            row = Word(arith.index_cast(_i32(), token)) + start
            at = row.wide() * columns + column.wide(signed=True)
            if bits == 32:
                pair = utils.bitcast(value, ir.VectorType.get((2,), _i32()))
                words = [_part(pair, 0), _part(pair, 1)]
            else:  # a store of 16 bits takes the low half of a register
                word = Word(utils.bitcast(value, _i32()))
                words = [word, word >> 16]
            address = utils.getelementptr(base, [at.value], element)
            _asm(text, "r,r,l,r,r", column, row, address, *words)

    def meaning(acc: Array, order: Array, out: Any, start: Array) -> None:
        """One row after the other."""
        from jax.experimental import pallas as pl

        def row(r: Array, _: None) -> None:
            @pl.when(order[r] >= 0)
            def _store() -> None:
                values = jax.lax.dynamic_slice_in_dim(acc, r, 1).astype(out.dtype).T
                out[pl.ds(start, acc.shape[1]), pl.ds(order[r], 1)] = values

        jax.lax.fori_loop(0, acc.shape[0], row, None)

    return inline(scatter, meaning, (layout, layout.reduce(1), _ref(), _splat()))
