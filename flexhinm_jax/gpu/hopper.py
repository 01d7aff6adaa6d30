"""The sparse tensor-core kernel of Hopper: one pipeline for every 2:4 stream.

A block owns 64 or 128 rows of a tile and some tokens, and walks over the stored columns
in steps of 64. The tensor memory engine brings values and metadata. Activations come by
the same engine where the stream is in the order of x, else every thread gathers rows of
x^T with cp.async, by the index list of the tile. Products are `wgmma.mma_async.sp`; one
stays in flight while the next step is fetched. Few tokens leave most of the chip idle,
so their columns are split over blocks that write partial sums, added afterwards in a
fixed order: no atomics, results are reproducible.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.gpu import ptx, support
from flexhinm_jax.gpu.layouts import ROWS, STEP


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut into blocks.

    Attributes:
      row_groups: warpgroups along the rows, 64 rows each; 1 or 2.
      token_groups: warpgroups along the tokens; 1 or 2, not both groups 2.
      tokens: tokens of one warpgroup; 16, 32, 64 or 128.
      splits: blocks that share the columns of one tile of the result.
      depth: pipeline slots, at least 4: two steps are fetched ahead, one is in use,
        one is still read by the product in flight.
    """

    row_groups: int = 1
    token_groups: int = 1
    tokens: int = 64
    splits: int = 1
    depth: int = 4

    def __post_init__(self) -> None:
        """Checks the numbers against each other."""
        if self.tokens not in (16, 32, 64, 128):
            raise ValueError(f"tokens={self.tokens} must be 16, 32, 64 or 128")
        if self.row_groups * self.token_groups not in (1, 2):
            raise ValueError(
                f"{self.row_groups} x {self.token_groups} warpgroups; 1 or 2 in all"
            )
        if self.depth < 4 or self.splits < 1:
            raise ValueError(f"depth={self.depth} must be >= 4, splits={self.splits}")

    @property
    def groups(self) -> int:
        """Warpgroups of a block."""
        return self.row_groups * self.token_groups

    @property
    def width(self) -> int:
        """Tokens of a block."""
        return self.tokens * self.token_groups

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the pipeline, without index lists and barriers."""
        values = self.row_groups * ROWS * STEP * 2
        return self.depth * (
            values + self.row_groups * 1024 + 2 * STEP * self.width * 2
        )


def product(
    values: Array,
    meta: Array,
    x: Array,
    order: Array,
    out: int,
    dtype: Any,
    tiling: Tiling,
    index: Array | None = None,
) -> Array:
    """The product of all tiles with x, [out, n], rows in original order.

    Args:
      values: [t, r, c] 16 bit, the layout `layouts.tiles`.
      meta: i32[t, b, s, 256].
      x: activations, n a multiple of `tiling.width`. Without an index [n, 2 c], columns
        in the order of the stream; with one x^T, [i, n].
      order: i32[t, 64 b], original row of each row, negative for padding.
      out: number of original rows.
      dtype: of the result; partial sums are float32.
      tiling: how to cut.
      index: i32[t, s, 128], input of each logical column, negative for none, or None.
    """
    t, rows, _ = values.shape
    blocks, steps = meta.shape[1:3]
    n = x.shape[0] if index is None else x.shape[1]
    per = -(-steps // tiling.splits)
    splits = -(-steps // per)
    partial = jnp.dtype(dtype) if splits == 1 else jnp.dtype(jnp.float32)
    run = _kernel(
        t=t,
        rows=min(rows, tiling.row_groups * ROWS),
        blocks=blocks // tiling.row_groups,
        steps=steps,
        per=per,
        splits=splits,
        tiling=tiling,
        gathered=index is not None,
        dtype=values.dtype,
        result=jax.ShapeDtypeStruct((splits, out, n), partial),
        tokens=n // tiling.width,
    )
    order = order.reshape(t, blocks, ROWS)
    y = run(values, meta, x, order, *(() if index is None else (index,)))
    if splits == 1:
        return y[0]
    return jnp.sum(y, axis=0, dtype=jnp.float32).astype(dtype)


def _kernel(
    *, t, rows, blocks, steps, per, splits, tiling, gathered, dtype, result, tokens
):
    """Builds the Pallas kernel for static sizes."""
    from jax.experimental import pallas as pl

    plgpu = support.mosaic()
    plain = support.interpreting()
    groups, depth, width = tiling.groups, tiling.depth, tiling.width
    ahead = depth - 2
    wgmma = plgpu.Layout.WGMMA
    word_layout = plgpu.Layout.WG_STRIDED((256,), vec_size=1)
    scalar = plgpu.Layout.WG_SPLAT
    a_transforms = support.swizzled(STEP, dtype)
    x_transforms = support.swizzled(tiling.tokens if gathered else STEP, dtype)
    shared = lambda shape, kind, tr=(): plgpu.SMEM(shape, kind, transforms=tr)  # noqa: E731
    x_shape = (2 * STEP, width) if gathered else (width, 2 * STEP)
    scratch = {
        "a_s": shared((depth, tiling.row_groups * ROWS, STEP), dtype, a_transforms),
        "m_s": shared((depth, tiling.row_groups, 256), jnp.int32),
        "x_s": shared((depth, *x_shape), dtype, x_transforms),
        "full": plgpu.Barrier(num_arrivals=2 if gathered else 3, num_barriers=depth),
        "sync": plgpu.Barrier(num_arrivals=groups),
    }
    if gathered:
        scratch["i_s"] = shared((per, 2 * STEP), jnp.int32)
        scratch["ready"] = plgpu.Barrier(num_arrivals=1)
    held = plgpu.ShapeDtypeStruct((ROWS, tiling.tokens), jnp.float32, layout=wgmma)

    def inline(function, arguments, meaning, returns=None):
        if plain:
            return meaning
        return plgpu.inline_mgpu(arg_types=arguments, return_type=returns)(function)

    same = lambda acc: acc  # noqa: E731
    fence = inline(ptx.fence, (wgmma,), same, held)
    drain = inline(ptx.drain, (wgmma,), same, held)
    hold = inline(ptx.hold, (word_layout,), lambda words: None)
    ref = plgpu.RefType
    if gathered:
        multiply, view = ptx.sparse_product, lambda x: x
    else:
        multiply, view = _transposed(ptx.sparse_product), lambda x: x.T
    multiply = inline(
        multiply,
        (wgmma, word_layout, ref(a_transforms), ref(x_transforms)),
        lambda acc, words, a, x: ptx.sparse_product_meaning(
            acc, words, a[...], view(x[...])
        ),
        held,
    )
    gather = inline(
        ptx.gather_rows(groups),
        (ref(), ref(), scalar, ref(x_transforms)),
        ptx.gather_rows_meaning(groups),
    )
    nothing = lambda: None  # noqa: E731
    commit = inline(ptx.commit_gather, (), nothing)
    arrive = inline(ptx.await_gather(ahead - 1), (), nothing)
    scatter = inline(
        ptx.scatter_rows,
        (wgmma, wgmma.reduce(1), ref(), scalar),
        ptx.scatter_rows_meaning,
    )

    def body(v_g, m_g, x_g, o_g, *rest, a_s, m_s, x_s, full, sync, **lists: Any):
        i_s: Any = lists.get("i_s")
        y_g = rest[-1]
        group = lax.axis_index("group")
        row, token, split = (lax.axis_index(a) for a in ("row", "token", "split"))
        tile, block = lax.div(row, blocks), lax.rem(row, blocks)
        first = split * per
        count = jnp.minimum(per, steps - first)
        row_group = group if tiling.row_groups == 2 else 0
        token_group = group if tiling.token_groups == 2 else 0
        start = token * width

        def fetch(k):
            """Starts the copies of step k by the tensor memory engine."""
            slot, at = lax.rem(k, depth), first + k
            copy = plgpu.copy_gmem_to_smem
            down = pl.ds(block * rows, rows)
            copy(
                v_g.at[tile, down, pl.ds(at * STEP, STEP)],
                a_s.at[slot, pl.ds(0, rows)],
                full.at[slot],
            )
            copy(
                m_g.at[tile, pl.ds(block * tiling.row_groups, tiling.row_groups), at],
                m_s.at[slot],
                full.at[slot],
            )
            if not gathered:
                columns = pl.ds(at * 2 * STEP, 2 * STEP)
                copy(x_g.at[pl.ds(start, width), columns], x_s.at[slot], full.at[slot])

        def weights(k):
            """Has the engine fetch step k, if there is one."""

            @pl.when((k < count) & (group == 0))
            def _fetch():
                fetch(k)

        def activations(k):
            """Starts this thread's copies of step k, if there is one."""

            @pl.when(k < count)
            def _gather():
                gather(i_s.at[k], x_g, start, x_s.at[lax.rem(k, depth)])

            commit()

        if gathered:

            @pl.when(group == 0)
            def _indices():
                listed = rest[0].at[tile, pl.ds(first, per)]
                plgpu.copy_gmem_to_smem(listed, i_s, lists["ready"])

        for k in range(ahead):
            weights(jnp.int32(k))
        if gathered:
            plgpu.barrier_wait(lists["ready"])
            for k in range(ahead):
                activations(jnp.int32(k))

        def step(k, carry):
            acc, read = carry
            slot = lax.rem(k, depth)
            if gathered:
                arrive()
            # Hands what this warpgroup wrote to the tensor cores, and the slots it
            # read to the copy engine.
            plgpu.commit_smem()
            plgpu.barrier_wait(full.at[slot])
            if groups == 2:  # the other warpgroup's part; its product k - 2 has ended
                plgpu.barrier_arrive(sync)
                plgpu.barrier_wait(sync)
            words = plgpu.load(m_s.at[slot, row_group], layout=word_layout)
            x_part = x_s.at[slot]
            if tiling.token_groups == 2:
                mine = pl.ds(token_group * tiling.tokens, tiling.tokens)
                x_part = x_s.at[slot, :, mine] if gathered else x_s.at[slot, mine]
            a_part = a_s.at[slot, pl.ds(row_group * ROWS, ROWS)]
            acc = multiply(acc, words, a_part, x_part)
            hold(read)  # until here the product before this one may read them
            weights(k + ahead)
            if gathered:
                activations(k + ahead)
            return acc, words

        zero = jnp.zeros((ROWS, tiling.tokens), jnp.float32)
        acc = fence(plgpu.layout_cast(zero, wgmma))
        none = plgpu.layout_cast(jnp.zeros((256,), jnp.int32), word_layout)
        acc, read = lax.fori_loop(0, count, step, (acc, none))
        acc = drain(acc)
        hold(read)
        places = plgpu.load(
            o_g.at[tile, block * tiling.row_groups + row_group],
            layout=wgmma.reduce(1),
            optimized=False,
        )
        scatter(acc, places, y_g.at[split], start + token_group * tiling.tokens)

    return plgpu.kernel(
        body,
        out_type=result,
        grid=(t * blocks, tokens, splits),
        grid_names=("row", "token", "split"),
        num_threads=groups,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )


def _transposed(function):
    """`sparse_product` for x tiles [n, 128], which it reads as [128, n]."""

    def call(ctx, acc, meta, a_ref, x_ref):
        from jax.experimental.mosaic import gpu as mgpu

        turned = mgpu.memref_transpose(x_ref, (1, 0, 3, 2))
        return function(ctx, acc, meta, a_ref, turned)

    return call
