"""The sparse tensor-core kernel of Hopper: one pipeline for every 2:4 stream.

A block owns 64 or 128 rows of a tile and some tokens, and walks over the stored columns
in steps of 64 or 32. The tensor memory engine brings values and metadata; how
activations come is a `Source`. Products are `wgmma.mma_async.sp`, each awaited before
the metadata of the next one are loaded: the instruction reads them from registers while
it is in flight. Warpgroups wait for each other only where their threads write tiles of
x; else each gives a slot back when its own product has ended, so one multiplies while
the other one waits. Few tokens leave most of the chip idle, so their columns are split
over the blocks of a cluster; the first of them reads the sums of the others from their
shared memory and adds them in a fixed order: no atomics, results are reproducible.
Every row goes to its original place in y [n, o], so no other program follows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.gpu import ptx, support
from flexhinm_jax.gpu.layouts import ROWS
from flexhinm_jax.gpu.tilings import Source, Tiling


@dataclasses.dataclass(frozen=True)
class Launch:
    """Static numbers of one kernel.

    Attributes:
      tiling: how the product is cut.
      source: how activations come.
      tiles: row tiles.
      rows: rows of a tile that one copy brings.
      blocks: blocks per tile.
      steps: steps of a tile.
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
        """Blocks that fetch together; the interpreter knows no such copies."""
        return 1 if support.interpreting() else self.tiling.sharing

    @property
    def by_threads(self) -> bool:
        """Whether threads start copies of every step of x."""
        return self.source in (Source.PLAIN, Source.LISTED)

    @property
    def turned(self) -> bool:
        """Whether a tile of x has its tokens in memory order."""
        return self.source is Source.LISTED

    @property
    def frees(self) -> bool:
        """Whether slots are given back: threads of the block do not meet, or others."""
        return self.source is Source.STREAM or self.sharing > 1


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
    blocks, step = meta.shape[1], tiling.step
    meta = meta.reshape(t, blocks, -1, 4 * step)
    n, interpreted = x.shape[0], support.interpreting()
    together = tiling.tokens * (tiling.sharing if source is Source.LISTED else 1)
    whole = n + -n % together
    # The interpreter knows tiles alone, and no shared memory of another block.
    written = whole if interpreted else n
    if source in (Source.STREAM, Source.LISTED) or interpreted:
        x = support.pad_rows(x, together)
    if source is Source.PLAIN and interpreted:
        x = jnp.pad(x, ((0, 0), (0, 2 * values.shape[2] - x.shape[1])))
    x = x.T if source is Source.LISTED else x
    launch = Launch(
        tiling=tiling,
        source=source,
        tiles=t,
        rows=min(rows, tiling.groups * ROWS),
        blocks=blocks // tiling.groups,
        steps=meta.shape[2],
        x=x.shape,
        dtype=values.dtype,
    )
    parts = (launch.splits,) if interpreted and launch.splits > 1 else ()
    kind = jnp.dtype(jnp.float32) if parts else jnp.dtype(dtype)
    result = jax.ShapeDtypeStruct((*parts, written, out), kind)
    order = order.reshape(t, blocks, ROWS)
    lists = () if index is None else (index.reshape(t, -1, 2 * step),)
    y = _kernel(launch, result)(values, meta, x, order, *lists)
    y = jnp.sum(y, axis=0, dtype=jnp.float32).astype(dtype) if parts else y
    return y[:n]


def _kernel(launch: Launch, result: jax.ShapeDtypeStruct) -> Any:
    """The Pallas kernel for static sizes."""
    plgpu, tiling = support.mosaic(), launch.tiling
    together = result.ndim == 2  # the interpreter sums outside

    def body(*references: Any, **scratch: Any) -> None:
        block = _Block(launch, references, scratch)
        block.start()
        acc = block.multiply()
        block.store(block.combine(acc) if together else acc)

    sharing = launch.sharing
    grid = {
        "row": launch.tiles * launch.blocks,
        "token": -(-result.shape[-2] // tiling.tokens),
    }
    along = "token" if launch.source is Source.LISTED else "row"
    grid[along] = -(-grid[along] // sharing)
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
    tiling = launch.tiling
    across = tiling.tokens if launch.turned else 2 * tiling.step
    of_values = support.swizzled(tiling.step, launch.dtype)
    return of_values, support.swizzled(across, launch.dtype)


def _scratch(launch: Launch) -> dict[str, Any]:
    """Slots of values a_s, metadata m_s and activations x_s, and their barriers."""
    plgpu, tiling, source = support.mosaic(), launch.tiling, launch.source
    depth, groups, columns = tiling.depth, tiling.groups, 2 * tiling.step
    of_values, of_x = _transforms(launch)
    x_shape = (columns, tiling.tokens) if launch.turned else (tiling.tokens, columns)
    values = (depth, groups * ROWS, tiling.step)
    copies = 2 if launch.by_threads else 3
    scratch = {
        "a_s": plgpu.SMEM(values, launch.dtype, transforms=of_values),
        "m_s": plgpu.SMEM((depth, groups, 4 * tiling.step), jnp.int32),
        "x_s": plgpu.SMEM((depth, *x_shape), launch.dtype, transforms=of_x),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=depth),
        "sync": plgpu.Barrier(num_arrivals=groups),
    }
    if launch.frees:
        counts = {"num_arrivals": groups, "num_barriers": depth}
        scratch["free"] = (
            plgpu.ClusterBarrier(collective_axes=("peer",), **counts)
            if launch.sharing > 1
            else plgpu.Barrier(**counts)
        )
    if source is Source.LISTED:
        scratch["i_s"] = plgpu.SMEM((launch.per, columns), jnp.int32)
        scratch["ready"] = plgpu.Barrier(num_arrivals=1)
    if source is Source.HELD:
        scratch["i_s"] = plgpu.SMEM((depth, columns), jnp.int32)
        scratch["h_s"] = plgpu.SMEM(launch.x, launch.dtype)
    return scratch


class _Block:
    """One block while its program is traced: where it is, what it reads and writes.

    Args:
      launch: static numbers.
      references: values, metadata, x, order, the index list if there is one, result.
      scratch: `_scratch`.
    """

    def __init__(
        self, launch: Launch, references: tuple[Any, ...], scratch: dict[str, Any]
    ) -> None:
        self.launch, self.tiling, self.scratch = launch, launch.tiling, scratch
        self.v_g, self.m_g, self.x_g, self.o_g, *self.lists, self.y_g = references
        layout = support.mosaic().Layout
        self.of_values, self.of_x = _transforms(launch)
        self.words = layout.WG_STRIDED((4 * self.tiling.step,), vec_size=1)
        self.sums = support.mosaic().ShapeDtypeStruct(
            (ROWS, self.tiling.tokens), jnp.float32, layout=layout.WGMMA
        )
        self.thread = lax.axis_index("group")
        self.group = self.thread if self.tiling.groups == 2 else 0
        row, token, split = (lax.axis_index(a) for a in ("row", "token", "split"))
        self.peer = jnp.int32(0)
        if launch.sharing > 1:
            self.peer = lax.axis_index("peer")
            if launch.source is Source.LISTED:
                token = token * launch.sharing + self.peer
            else:
                row = row * launch.sharing + self.peer
        self.tile, self.block = lax.div(row, launch.blocks), lax.rem(row, launch.blocks)
        self.split, self.first = split, split * launch.per
        self.count = jnp.minimum(launch.per, launch.steps - self.first)
        self.token = token * self.tiling.tokens  # first of this block

    def start(self) -> None:
        """Fetches the first steps."""
        from jax.experimental import pallas as pl

        plgpu, launch = support.mosaic(), self.launch
        if launch.source is Source.LISTED:

            @pl.when(self.thread == 0)
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
        pieces = -(-n * i // (ptx.PER_CHUNK * ptx.LANES * self.tiling.groups))
        hold = ptx.hold_chunks(self.tiling.groups)

        def some(k: Any, _: None) -> None:
            hold(self.x_g, k, self.scratch["h_s"])

        lax.fori_loop(0, 1 if support.interpreting() else pieces, some, None)
        ptx.commit_copies()()
        ptx.await_copies(0)()
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

        @pl.when((k < self.count) & (self.thread == 0))
        def _fetch() -> None:
            self._copy(lax.rem(k, self.tiling.depth), self.first + k)

    def _copy(self, slot: Any, at: Any) -> None:
        from jax.experimental import pallas as pl

        launch, step, groups = self.launch, self.tiling.step, self.tiling.groups
        full, rows = self.scratch["full"].at[slot], launch.rows

        def copy(source: Any, name: str, shared: bool = False) -> None:
            to = self.scratch[name].at[slot]
            to = to.at[pl.ds(0, rows)] if name == "a_s" else to
            axes = "peer" if shared and launch.sharing > 1 else None
            support.mosaic().copy_gmem_to_smem(source, to, full, collective_axes=axes)

        listed = launch.source is Source.LISTED
        down, across = pl.ds(self.block * rows, rows), pl.ds(at * step, step)
        copy(self.v_g.at[self.tile, down, across], "a_s", listed)
        down = pl.ds(self.block * groups, groups)
        copy(self.m_g.at[self.tile, down, at], "m_s", listed)
        if launch.source is Source.STREAM:
            tokens = pl.ds(self.token, self.tiling.tokens)
            copy(self.x_g.at[tokens, pl.ds(at * 2 * step, 2 * step)], "x_s", True)
        if launch.source is Source.HELD:
            copy(self.lists[0].at[self.tile, at], "i_s")

    def activations(self, k: Any) -> None:
        """Starts this thread's copies of step k, if there is one."""
        from jax.experimental import pallas as pl

        groups, of_x = self.tiling.groups, self.of_x

        @pl.when(k < self.count)
        def _start() -> None:
            slot = self.scratch["x_s"].at[lax.rem(k, self.tiling.depth)]
            if self.launch.source is Source.LISTED:
                gather, index = ptx.gather_rows(groups, of_x), self.scratch["i_s"].at[k]
                gather(index, self.x_g, self.token, slot)
            else:
                column = (self.first + k) * 2 * self.tiling.step
                ptx.copy_columns(groups, of_x)(self.x_g, self.token, column, slot)

        ptx.commit_copies()()

    def multiply(self) -> Array:
        """All steps: the accumulator of this warpgroup."""
        zero = jnp.zeros(self.sums.shape, jnp.float32)
        acc = support.mosaic().layout_cast(zero, self.sums.layout)
        acc = lax.fori_loop(0, self.count, self._step, ptx.fence(self.sums)(acc))
        return ptx.drain(self.sums)(acc)

    def _step(self, k: Any, acc: Array) -> Array:
        from jax.experimental import pallas as pl

        plgpu, launch, tiling = support.mosaic(), self.launch, self.tiling
        slot, full = lax.rem(k, tiling.depth), self.scratch["full"]
        a, m, x = (self.scratch[name].at[slot] for name in ("a_s", "m_s", "x_s"))
        if launch.source is Source.HELD:
            plgpu.barrier_wait(full.at[slot])
            take = ptx.take_columns(tiling.groups, self.of_x)
            take(self.scratch["i_s"].at[slot], self.scratch["h_s"], x)
        if launch.by_threads:
            ptx.await_copies(tiling.ahead - 1)()
        if launch.source is not Source.STREAM:
            # Hands what threads wrote to the tensor cores, and the slots that were read
            # to the copy engine: products up to the one before `in_flight` have ended
            # in both warpgroups, so the slot filled below is free.
            self._meet()
        if launch.source is not Source.HELD:
            plgpu.barrier_wait(full.at[slot])
        words = plgpu.load(m.at[self.group], layout=self.words)
        how = (self.of_values, self.of_x, tiling.in_flight, not launch.turned)
        multiply = ptx.sparse_product(self.sums, self.words, *how, tiling.selectors)
        acc = multiply(acc, words, a.at[pl.ds(self.group * ROWS, ROWS)], x)
        if launch.frees:
            self._free(k)
        self.weights(k + tiling.ahead)
        if launch.by_threads:
            self.activations(k + tiling.ahead)
        return acc

    def _free(self, k: Any) -> None:
        """Gives back the slot whose product has ended, takes the one filled next.

        That is the slot of the step before: all who read it have ended its product.
        """
        from jax.experimental import pallas as pl

        plgpu, depth, free = support.mosaic(), self.tiling.depth, self.scratch["free"]
        ended, filled = k - self.tiling.in_flight, k + self.tiling.ahead

        @pl.when(ended >= 0)
        def _give() -> None:
            plgpu.barrier_arrive(free.at[lax.rem(ended, depth)])

        @pl.when((ended > 0) & (filled < self.count) & (self.thread == 0))
        def _take() -> None:
            plgpu.barrier_wait(free.at[lax.rem(filled, depth)])

    def combine(self, acc: Array) -> Array:
        """The sums of the blocks that share a tile, in the first one.

        They lie where the activations were, which no product reads any more.
        """
        splits = self.launch.splits
        if splits > 1:
            self._meet()
            add = ptx.combine(self.sums, self.of_x, splits)
            return add(acc, self.scratch["x_s"], self.split, self.peer * splits)
        if self.launch.sharing > 1:  # nobody ends while others signal to it
            ptx.meet()()
        return acc

    def store(self, acc: Array) -> None:
        """Writes the accumulator to the original rows."""
        from jax.experimental import pallas as pl

        plgpu, layout = support.mosaic(), self.sums.layout
        parts = len(self.y_g.shape) == 3
        alone = parts or self.launch.splits == 1

        @pl.when(True if alone else self.split == 0)
        def _store() -> None:
            block = self.block * self.tiling.groups + self.group
            rows = self.o_g.at[self.tile, block]
            places = plgpu.load(rows, layout=layout.reduce(1), optimized=False)
            y_g = self.y_g.at[self.split] if parts else self.y_g
            ptx.scatter_rows(layout)(acc, places, y_g, self.token)
