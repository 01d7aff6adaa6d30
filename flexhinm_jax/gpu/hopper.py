"""The sparse tensor-core kernel of Hopper: one pipeline for every 2:4 stream.

A block owns 64 or 128 rows of a tile and some tokens, and walks over the stored columns
in steps of 64. The tensor memory engine brings values and metadata; how activations
come is a `Source`. Products are `wgmma.mma_async.sp`, each awaited before the metadata
of the next one are loaded: the instruction reads them from registers while it is in
flight. Few tokens leave most of the chip idle, so their columns are split over the
blocks of a cluster; the first of them reads the sums of the others from their shared
memory and adds them in a fixed order: no atomics, results are reproducible. Every row
goes to its original place in y [n, o], so no other program follows.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.gpu import ptx, support
from flexhinm_jax.gpu.layouts import ROWS, STEP

MOST_BLOCKS = 8
"""Blocks of a cluster that every Hopper GPU can place."""


class Source(enum.Enum):
    """How the activations of a step come into shared memory."""

    STREAM = "x in the order of the stream, by the tensor memory engine"
    PLAIN = "x as it is, in the order of the stream, by cp.async: any number of tokens"
    LISTED = "rows of x^T by the index list of the tile, by cp.async"
    HELD = "all of x once per block, its columns by the index list of each step"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut into blocks.

    Attributes:
      row_groups: warpgroups along the rows, 64 rows each; 1 or 2.
      token_groups: warpgroups along the tokens; 1 or 2, not both groups 2.
      tokens: tokens of one warpgroup; 8, 16, 32, 64 or 128.
      splits: blocks that share the columns of one tile of the result, one cluster.
      depth: pipeline slots, at least 4: one is in use, `in_flight` are still read, the
        others are fetched ahead.
      in_flight: products that may run while the metadata of the next one are loaded: 0,
        or 1 to try on a GPU. The registers of their metadata may be written again by
        then; whether an instruction has read them when it begins is not documented.
      held: x lies in shared memory, if tiles read it by an index (`Source.HELD`).
      sharing: blocks along the rows, of one cluster, that fetch tiles of x together,
        a part each for all of them (`Source.STREAM`).
    """

    row_groups: int = 1
    token_groups: int = 1
    tokens: int = 64
    splits: int = 1
    depth: int = 4
    in_flight: int = 0
    held: bool = False
    sharing: int = 1

    def __post_init__(self) -> None:
        """Checks the numbers against each other."""
        if self.tokens not in (8, 16, 32, 64, 128):
            raise ValueError(f"tokens={self.tokens} must be 8, 16, 32, 64 or 128")
        if self.row_groups * self.token_groups not in (1, 2):
            raise ValueError(
                f"{self.row_groups} x {self.token_groups} warpgroups; 1 or 2 in all"
            )
        if self.depth < 4 or not 1 <= self.splits <= MOST_BLOCKS:
            raise ValueError(
                f"depth={self.depth} must be >= 4, splits={self.splits} "
                f"between 1 and {MOST_BLOCKS}"
            )
        cluster = self.splits * self.sharing
        if (
            self.sharing not in (1, 2, 4)
            or cluster > MOST_BLOCKS
            or (self.sharing > 1 and (self.in_flight or self.width < 8 * self.sharing))
        ):
            raise ValueError(
                f"sharing={self.sharing} must be 1, 2 or 4, with splits {cluster} <= "
                f"{MOST_BLOCKS} blocks, nothing in flight and 8 tokens for each block"
            )
        if self.in_flight not in (0, 1):
            raise ValueError(f"in_flight={self.in_flight} must be 0 or 1")

    @property
    def groups(self) -> int:
        """Warpgroups of a block."""
        return self.row_groups * self.token_groups

    @property
    def width(self) -> int:
        """Tokens of a block."""
        return self.tokens * self.token_groups

    @property
    def ahead(self) -> int:
        """Steps that are fetched before the one in use."""
        return self.depth - 1 - self.in_flight

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the pipeline, without index lists and barriers."""
        values = self.row_groups * ROWS * STEP * 2
        return self.depth * (
            values + self.row_groups * 1024 + 2 * STEP * self.width * 2
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """Static numbers of one kernel.

    Attributes:
      tiling: how the product is cut.
      source: how activations come.
      tiles: row tiles.
      rows: rows of a tile that one copy brings.
      blocks: blocks per tile.
      steps: steps of 64 stored columns.
      x: shape of the activations as the kernel reads them.
      dtype: of values and activations.
    """

    tiling: Tiling
    source: Source
    tiles: int
    rows: int
    blocks: int
    steps: int
    x: tuple[int, ...]
    dtype: Any

    @property
    def per(self) -> int:
        """Steps of one block, the last one of a tile may have fewer."""
        return -(-self.steps // self.tiling.splits)

    @property
    def splits(self) -> int:
        """Blocks that share the columns of a tile, none without a step."""
        return -(-self.steps // self.per)

    @property
    def sharing(self) -> int:
        """Blocks that fetch x together; the interpreter knows no such copies."""
        return 1 if support.interpreting() else self.tiling.sharing

    @property
    def by_threads(self) -> bool:
        """Whether threads start copies of every step of x."""
        return self.source in (Source.PLAIN, Source.LISTED)

    @property
    def turned(self) -> bool:
        """Whether a tile of x has its tokens in memory order."""
        return self.source is Source.LISTED


def product(
    values: Array,
    meta: Array,
    x: Array,
    order: Array,
    out: int,
    dtype: Any,
    tiling: Tiling,
    source: Source,
    index: Array | None = None,
) -> Array:
    """The product of x with all tiles, [n, out], rows in original order.

    Args:
      values: [t, r, c] 16 bit, the layout `layouts.tiles`.
      meta: i32[t, b, s, 256].
      x: activations, with STREAM [n, 2 c] in the order of the stream, else [n, i]; i a
        multiple of 8 with PLAIN and HELD.
      order: i32[t, 64 b], original row of each row, negative for padding.
      out: number of original rows.
      dtype: of the result; sums are float32.
      tiling: how to cut.
      source: how activations come.
      index: i32[t, s, 128], input of each logical column, negative for none, or None.
    """
    t, rows, _ = values.shape
    blocks, steps = meta.shape[1:3]
    n, interpreted = x.shape[0], support.interpreting()
    whole = n + -n % tiling.width
    # The interpreter knows tiles alone, and no shared memory of another block.
    written = whole if interpreted else n
    if source in (Source.STREAM, Source.LISTED) or interpreted:
        x = support.pad_rows(x, tiling.width)
    if source is Source.PLAIN and interpreted:
        x = jnp.pad(x, ((0, 0), (0, 2 * STEP * steps - x.shape[1])))
    x = x.T if source is Source.LISTED else x
    launch = Launch(
        tiling=tiling,
        source=source,
        tiles=t,
        rows=min(rows, tiling.row_groups * ROWS),
        blocks=blocks // tiling.row_groups,
        steps=steps,
        x=x.shape,
        dtype=values.dtype,
    )
    parts = (launch.splits,) if interpreted and launch.splits > 1 else ()
    kind = jnp.dtype(jnp.float32) if parts else jnp.dtype(dtype)
    result = jax.ShapeDtypeStruct((*parts, written, out), kind)
    order = order.reshape(t, blocks, ROWS)
    lists = () if index is None else (index,)
    y = _kernel(launch, result)(values, meta, x, order, *lists)
    y = jnp.sum(y, axis=0, dtype=jnp.float32).astype(dtype) if parts else y
    return y[:n]


def _kernel(launch: Launch, result: jax.ShapeDtypeStruct) -> Any:
    """The Pallas kernel for static sizes."""
    plgpu, tiling = support.mosaic(), launch.tiling
    instructions = _instructions(launch)
    together = result.ndim == 2  # the interpreter sums outside

    def body(*references: Any, **scratch: Any) -> None:
        block = _Block(launch, instructions, references, scratch)
        block.start()
        acc = block.multiply()
        block.store(block.combine(acc) if together else acc)

    sharing = launch.sharing
    columns = -(-result.shape[-2] // tiling.width)
    rows = launch.tiles * launch.blocks // sharing
    grid: dict[str, int] = {"row": rows, "token": columns}
    cluster = {"peer": sharing, "split": launch.splits}
    if not together or sharing * launch.splits == 1:
        grid, cluster = grid | {"split": launch.splits}, {}
    return plgpu.kernel(
        body,
        out_type=result,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=tiling.groups,
        thread_name="group",
        scratch_types=_scratch(launch),
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )


def _transforms(launch: Launch) -> tuple[Any, Any]:
    """How tiles of values and of activations lie in shared memory."""
    across = launch.tiling.tokens if launch.turned else STEP
    dtype = launch.dtype
    return support.swizzled(STEP, dtype), support.swizzled(across, dtype)


def _scratch(launch: Launch) -> dict[str, Any]:
    """Slots of values a_s, metadata m_s and activations x_s, and their barriers."""
    plgpu, tiling, source = support.mosaic(), launch.tiling, launch.source
    depth, indices = tiling.depth, (2 * STEP,)
    of_values, of_x = _transforms(launch)
    x_shape = (2 * STEP, tiling.width) if launch.turned else (tiling.width, 2 * STEP)
    values = (depth, tiling.row_groups * ROWS, STEP)
    copies = 2 if launch.by_threads else 3
    scratch = {
        "a_s": plgpu.SMEM(values, launch.dtype, transforms=of_values),
        "m_s": plgpu.SMEM((depth, tiling.row_groups, 256), jnp.int32),
        "x_s": plgpu.SMEM((depth, *x_shape), launch.dtype, transforms=of_x),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=depth),
        "sync": plgpu.Barrier(num_arrivals=tiling.groups),
    }
    if launch.sharing > 1:
        scratch["free"] = plgpu.ClusterBarrier(
            collective_axes=("peer",), num_arrivals=tiling.groups, num_barriers=depth
        )
    if source is Source.LISTED:
        scratch["i_s"] = plgpu.SMEM((launch.per, *indices), jnp.int32)
        scratch["ready"] = plgpu.Barrier(num_arrivals=1)
    if source is Source.HELD:
        scratch["i_s"] = plgpu.SMEM((depth, *indices), jnp.int32)
        scratch["h_s"] = plgpu.SMEM(launch.x, launch.dtype)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Instructions:
    """What `ptx` has no Pallas words for; in the interpreter, what it means.

    Attributes:
      words: layout of the metadata in registers.
      acc: layout of an accumulator.
      fence: orders the registers of a fresh accumulator.
      multiply: (accumulator, metadata, values, activations) -> accumulator.
      drain: waits for every product.
      gather: starts the copies of one step of rows of x^T.
      copy: starts the copies of one step of columns of x.
      hold: starts some of the copies of all of x.
      take: columns of x that is held into the tile of a step.
      commit: closes the group of copies.
      arrive: waits for the copies of the step in use.
      drained: waits for all copies.
      combine: adds the sums of the other blocks of a cluster to those of the first.
      meet: waits for all blocks of the cluster.
      scatter: stores an accumulator to rows of the result.
    """

    words: Any
    acc: Any
    fence: Any
    multiply: Any
    drain: Any
    gather: Any
    copy: Any
    hold: Any
    take: Any
    commit: Any
    arrive: Any
    drained: Any
    combine: Any
    meet: Any
    scatter: Any


def _instructions(launch: Launch) -> _Instructions:
    plgpu, tiling = support.mosaic(), launch.tiling
    wgmma, ref = plgpu.Layout.WGMMA, plgpu.RefType
    words = plgpu.Layout.WG_STRIDED((256,), vec_size=1)
    of_values, of_x = _transforms(launch)
    held = plgpu.ShapeDtypeStruct((ROWS, tiling.tokens), jnp.float32, layout=wgmma)
    interpreted = support.interpreting()

    def inline(function: Any, arguments: Any, meaning: Any, returns: Any = None) -> Any:
        if interpreted:
            return meaning
        return plgpu.inline_mgpu(arg_types=arguments, return_type=returns)(function)

    def same(acc: Array) -> Array:
        return acc

    def nothing() -> None:
        return None

    def meaning(acc: Array, words: Array, a: Any, x: Any) -> Array:
        read = x[...] if launch.turned else x[...].T
        return ptx.sparse_product_meaning(acc, words, a[...], read)

    groups = tiling.groups
    multiply = ptx.sparse_product(tiling.in_flight, turned=not launch.turned)
    scalar = plgpu.Layout.WG_SPLAT
    return _Instructions(
        words=words,
        acc=wgmma,
        fence=inline(ptx.fence, (wgmma,), same, held),
        multiply=inline(
            multiply, (wgmma, words, ref(of_values), ref(of_x)), meaning, held
        ),
        drain=inline(ptx.drain, (wgmma,), same, held),
        gather=inline(
            ptx.gather_rows(groups),
            (ref(), ref(), scalar, ref(of_x)),
            ptx.gather_rows_meaning(groups),
        ),
        copy=inline(
            ptx.copy_columns(groups),
            (ref(), scalar, scalar, ref(of_x)),
            ptx.copy_columns_meaning,
        ),
        hold=inline(
            ptx.hold_chunks(groups), (ref(), scalar, ref()), ptx.hold_chunks_meaning
        ),
        take=inline(
            ptx.take_columns(groups),
            (ref(), ref(), ref(of_x)),
            ptx.take_columns_meaning,
        ),
        commit=inline(ptx.commit_copies, (), nothing),
        arrive=inline(ptx.await_copies(tiling.ahead - 1), (), nothing),
        drained=inline(ptx.await_copies(0), (), nothing),
        combine=inline(
            ptx.combine(launch.splits),
            (wgmma, ref(of_values), scalar, scalar),
            None,
            held,
        ),
        meet=inline(ptx.meet, (), nothing),
        scatter=inline(
            ptx.scatter_rows,
            (wgmma, wgmma.reduce(1), ref(), scalar),
            ptx.scatter_rows_meaning,
        ),
    )


class _Block:
    """One block while its program is traced: where it is, what it reads and writes.

    Args:
      launch: static numbers.
      do: the instructions.
      references: values, metadata, x, order, the index list if there is one, result.
      scratch: `_scratch`.
    """

    def __init__(
        self,
        launch: Launch,
        do: _Instructions,
        references: tuple[Any, ...],
        scratch: dict[str, Any],
    ) -> None:
        self.launch, self.tiling, self.do = launch, launch.tiling, do
        self.v_g, self.m_g, self.x_g, self.o_g, *rest = references
        self.y_g, self.lists = rest[-1], rest[:-1]
        self.scratch = scratch
        self.group = lax.axis_index("group")
        row, token, split = (lax.axis_index(a) for a in ("row", "token", "split"))
        self.peer = lax.axis_index("peer") if launch.sharing > 1 else jnp.int32(0)
        row = row * launch.sharing + self.peer
        self.tile, self.block = lax.div(row, launch.blocks), lax.rem(row, launch.blocks)
        self.split, self.first = split, split * launch.per
        self.count = jnp.minimum(launch.per, launch.steps - self.first)
        self.token = token * self.tiling.width  # first of this block
        self.row_group = self.group if self.tiling.row_groups == 2 else 0
        self.token_group = self.group if self.tiling.token_groups == 2 else 0

    def start(self) -> None:
        """Fetches the first steps."""
        from jax.experimental import pallas as pl

        plgpu, launch = support.mosaic(), self.launch
        if launch.source is Source.LISTED:

            @pl.when(self.group == 0)
            def _indices() -> None:
                listed = self.lists[0].at[self.tile, pl.ds(self.first, launch.per)]
                ready = self.scratch["ready"]
                plgpu.copy_gmem_to_smem(listed, self.scratch["i_s"], ready)

        for k in range(self.tiling.ahead):
            self.weights(jnp.int32(k))
        if launch.source is Source.HELD:
            self._hold()
        if launch.source is Source.LISTED:
            plgpu.barrier_wait(self.scratch["ready"])
        if launch.by_threads:
            for k in range(self.tiling.ahead):
                self.activations(jnp.int32(k))

    def _hold(self) -> None:
        """Brings all of x and hands it to every thread."""
        n, i = self.launch.x
        chunks = -(-n * i // (8 * 128 * self.tiling.groups))

        def some(k: Any, _: None) -> None:
            self.do.hold(self.x_g, k, self.scratch["h_s"])

        lax.fori_loop(0, 1 if support.interpreting() else chunks, some, None)
        self.do.commit()
        self.do.drained()
        self._meet()

    def _meet(self) -> None:
        """All warps of the block come to here before one of them goes on.

        What they wrote to shared memory may be read by every thread, and by products.
        """
        plgpu = support.mosaic()
        plgpu.commit_smem()
        if self.tiling.groups == 2:
            plgpu.barrier_arrive(self.scratch["sync"])
            plgpu.barrier_wait(self.scratch["sync"])

    def weights(self, k: Any) -> None:
        """Has the tensor memory engine fetch step k, if there is one."""
        from jax.experimental import pallas as pl

        @pl.when((k < self.count) & (self.group == 0))
        def _fetch() -> None:
            self._copy(lax.rem(k, self.tiling.depth), self.first + k)

    def _copy(self, slot: Any, at: Any) -> None:
        from jax.experimental import pallas as pl

        copy, tiling = support.mosaic().copy_gmem_to_smem, self.tiling
        full, rows = self.scratch["full"].at[slot], self.launch.rows
        copy(
            self.v_g.at[
                self.tile, pl.ds(self.block * rows, rows), pl.ds(at * STEP, STEP)
            ],
            self.scratch["a_s"].at[slot, pl.ds(0, rows)],
            full,
        )
        down = pl.ds(self.block * tiling.row_groups, tiling.row_groups)
        copy(self.m_g.at[self.tile, down, at], self.scratch["m_s"].at[slot], full)
        if self.launch.source is Source.STREAM:
            columns = pl.ds(at * 2 * STEP, 2 * STEP)
            tokens = pl.ds(self.token, tiling.width)
            copy(
                self.x_g.at[tokens, columns],
                self.scratch["x_s"].at[slot],
                full,
                collective_axes="peer" if self.launch.sharing > 1 else None,
            )
        if self.launch.source is Source.HELD:
            copy(self.lists[0].at[self.tile, at], self.scratch["i_s"].at[slot], full)

    def activations(self, k: Any) -> None:
        """Starts this thread's copies of step k, if there is one."""
        from jax.experimental import pallas as pl

        @pl.when(k < self.count)
        def _gather() -> None:
            slot = self.scratch["x_s"].at[lax.rem(k, self.tiling.depth)]
            if self.launch.source is Source.LISTED:
                self.do.gather(self.scratch["i_s"].at[k], self.x_g, self.token, slot)
            else:
                column = (self.first + k) * 2 * STEP
                self.do.copy(self.x_g, self.token, column, slot)

        self.do.commit()

    def multiply(self) -> Array:
        """All steps: the accumulator of this warpgroup."""
        plgpu = support.mosaic()
        zero = jnp.zeros((ROWS, self.tiling.tokens), jnp.float32)
        acc = self.do.fence(plgpu.layout_cast(zero, self.do.acc))
        return self.do.drain(lax.fori_loop(0, self.count, self._step, acc))

    def _step(self, k: Any, acc: Array) -> Array:
        from jax.experimental import pallas as pl

        plgpu, tiling = support.mosaic(), self.tiling
        slot, full = lax.rem(k, tiling.depth), self.scratch["full"]
        if self.launch.source is Source.HELD:
            plgpu.barrier_wait(full.at[slot])
            x_s, i_s = self.scratch["x_s"].at[slot], self.scratch["i_s"].at[slot]
            self.do.take(i_s, self.scratch["h_s"], x_s)
        elif self.launch.by_threads:
            self.do.arrive()
        # Hands what threads wrote to the tensor cores, and the slots that were read to
        # the copy engine: products up to the one before `in_flight` have ended in both
        # warpgroups, so the slot filled below is free.
        self._meet()
        if self.launch.source is not Source.HELD:
            plgpu.barrier_wait(full.at[slot])
        words = plgpu.load(
            self.scratch["m_s"].at[slot, self.row_group], layout=self.do.words
        )
        x_s, x = self.scratch["x_s"], self.scratch["x_s"].at[slot]
        if tiling.token_groups == 2:
            part = pl.ds(self.token_group * tiling.tokens, tiling.tokens)
            x = x_s.at[slot, :, part] if self.launch.turned else x_s.at[slot, part]
        a = self.scratch["a_s"].at[slot, pl.ds(self.row_group * ROWS, ROWS)]
        acc = self.do.multiply(acc, words, a, x)
        if self.launch.sharing > 1:
            self._free(k)
        self.weights(k + tiling.ahead)
        if self.launch.by_threads:
            self.activations(k + tiling.ahead)
        return acc

    def _free(self, k: Any) -> None:
        """Gives the slot of step k to all that share x, takes the one filled next.

        That is the slot of the step before: all of them have ended its product.
        """
        from jax.experimental import pallas as pl

        plgpu, depth, free = support.mosaic(), self.tiling.depth, self.scratch["free"]
        plgpu.barrier_arrive(free.at[lax.rem(k, depth)])
        filled = (k > 0) & (k + self.tiling.ahead < self.count)

        @pl.when(filled & (self.group == 0))
        def _take() -> None:
            plgpu.barrier_wait(free.at[lax.rem(k + self.tiling.ahead, depth)])

    def combine(self, acc: Array) -> Array:
        """The sums of the blocks that share a tile, in the first one.

        They lie where the values were, which no product reads any more.
        """
        splits = self.launch.splits
        if splits > 1:
            self._meet()
            first = self.peer * splits
            return self.do.combine(acc, self.scratch["a_s"], self.split, first)
        if self.launch.sharing > 1:  # nobody ends while others signal to it
            self.do.meet()
        return acc

    def store(self, acc: Array) -> None:
        """Writes the accumulator to the original rows."""
        from jax.experimental import pallas as pl

        plgpu, tiling = support.mosaic(), self.tiling
        parts = len(self.y_g.shape) == 3
        alone = parts or self.launch.splits == 1

        @pl.when(True if alone else self.split == 0)
        def _store() -> None:
            places = plgpu.load(
                self.o_g.at[self.tile, self.block * tiling.row_groups + self.row_group],
                layout=self.do.acc.reduce(1),
                optimized=False,
            )
            start = self.token + self.token_group * tiling.tokens
            y_g = self.y_g.at[self.split] if parts else self.y_g
            self.do.scatter(acc, places, y_g, start)
