"""Pack-time layouts of the GPU kernels: pure permutations of the canonical arrays.

Sparse tensor cores take a row of A as groups of four columns of which two are stored.
Everything here is arithmetic on arrays of one matrix, so it runs on any platform and
under `jit` and `vmap`; nothing of it may run per call.

One fact makes a single kernel serve all patterns: two dense columns are a 2:4 group
whose other two columns do not exist. Stored as the kept pair at positions 0 and 1 they
cost the bytes of dense values (and constant metadata), and one sparse instruction does
on them the work of the dense instruction of the same duration. So dense and N:M columns
of a tile become one stream of stored columns, and the index list says which input each
of the four columns of a group reads, or -1 for one that does not exist.

Letters: `r` rows, `c` stored columns (two per group of four), `s = c / 64` steps of 64
stored or 128 logical columns, `b` blocks of 64 rows.
"""

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.ops.words import from_words, to_words
from flexhinm_jax.types import PackedWeight

STEP = 64
"""Stored columns per pipeline step; their logical columns are twice as many."""

ROWS = 64
"""Rows of one wgmma instruction and of one metadata block."""

DENSE_PAIR = 0b0100
"""Metadata of a stored pair at positions 0 and 1 of its group."""

ABSENT = -1
"""Index of a column that does not exist: it is read as zero."""


def two_of_four(packed: PackedWeight) -> str | None:
    """Why a packed weight has no 2:4 stream, or None if it has one."""
    if packed.nm_index is not None and (packed.n, packed.m) != (2, 4):
        return (
            f"sparse tensor cores take 2:4 only, this weight is {packed.n}:{packed.m}"
        )
    return None


def stream(packed: PackedWeight) -> tuple[Array, Array, Array]:
    """The dense and the 2:4 columns of every tile as one stream of 2:4 groups.

    Args:
      packed: one matrix, 2:4 (checked by `two_of_four`), t tiles of v rows.

    Returns:
      values: [t, v, c], c the least multiple of STEP that holds them.
      nibbles: u32[t, v, c / 2], `i0 | i1 << 2` with i0 < i1 for every group.
      index: i32[t, 2 c], input of each logical column, ABSENT for none.
    """
    packed = packed.filled()
    t, v, dense = packed.dense_values.shape
    kept = packed.nm_values.shape[-1]
    odd = dense % 2
    c = dense + odd + kept
    tail = -c % STEP if c else STEP
    values = jnp.concatenate(
        [
            packed.dense_values,
            jnp.zeros((t, v, odd), packed.dtype),
            packed.nm_values,
            jnp.zeros((t, v, tail), packed.dtype),
        ],
        axis=-1,
    )
    pairs = lambda count: jnp.full((t, v, count), DENSE_PAIR, jnp.uint32)  # noqa: E731
    nibbles = jnp.concatenate(
        [
            pairs((dense + odd) // 2),
            from_words(packed.nm_positions, kept // 2, 4),
            pairs(tail // 2),
        ],
        axis=-1,
    )
    absent = lambda count: jnp.full((t, count), ABSENT, jnp.int32)  # noqa: E731
    two = jnp.concatenate([packed.dense_index, absent(odd)], axis=-1).reshape(t, -1, 2)
    four = jnp.concatenate([two, jnp.full_like(two, ABSENT)], axis=-1)
    index = jnp.concatenate(
        [four.reshape(t, -1), packed.nm_index, absent(2 * tail)], axis=-1
    )
    return values, nibbles, index


def to_sp_meta(words: Array) -> Array:
    """Canonical metadata words to the registers of `wgmma.mma_async.sp` and `mma.sp`.

    A word of the result serves one thread and 64 logical columns, that is two
    instructions: sparsity selector 0 reads the lanes 4 q and 4 q + 1 of every warp,
    selector 1 the lanes 4 q + 2 and 4 q + 3. Lane 4 q + h of warp p holds row 16 p + q
    in its low half and row 16 p + q + 8 in its high half, for the columns 16 (h % 2) to
    16 (h % 2) + 15 of the 32 of the instruction.

    Args:
      words: u32[r, k / 32], 8 nibbles each; r a multiple of 64, k of 64.

    Returns:
      i32[r / 64, k / 64, 128], one word per thread of a warpgroup.

    Source: PTX ISA, sparse matrix storage of wgmma.mma_async.sp for 16-bit types.
    """
    r, w = words.shape
    half = jnp.stack([words & 0xFFFF, words >> 16], axis=-1)  # 16 columns each
    # block, warp, upper, q, k64, selector, h
    half = half.reshape(r // ROWS, 4, 2, 8, w // 2, 2, 2)
    half = half.transpose(0, 4, 1, 3, 5, 6, 2)
    word = half[..., 0] | half[..., 1] << 16
    return lax.bitcast_convert_type(word.reshape(r // ROWS, w // 2, 128), jnp.int32)


def from_sp_meta(meta: Array) -> Array:
    """Inverse of `to_sp_meta`: i32[b, k / 64, 128] to u32[64 b, k / 32]."""
    b, k64, _ = meta.shape
    word = lax.bitcast_convert_type(meta, jnp.uint32).reshape(b, k64, 4, 8, 2, 2)
    half = jnp.stack([word & 0xFFFF, word >> 16], axis=-1)
    half = half.transpose(0, 2, 6, 3, 1, 4, 5).reshape(b * ROWS, 2 * k64, 2)
    return half[..., 0] | half[..., 1] << 16


def padded_rows(v: int) -> int:
    """Rows that a tile of v rows takes in memory: TMA boxes count in eights."""
    return v + -v % (8 if v < ROWS else ROWS)


def tiles(packed: PackedWeight) -> dict[str, Array]:
    """The layout of the Hopper kernel.

    Args:
      packed: one matrix, 2:4.

    Returns:
      values: [t, padded_rows(v), c], zero rows behind the v of the tile.
      meta: i32[t, b, s, 256], registers of the 64 rows and 128 columns of a step.
      index: i32[t, s, 128], input of each logical column, ABSENT for none.
      order: i32[t, b * 64], original row of each storage row, ABSENT for padding.
    """
    values, nibbles, index = stream(packed)
    t, v, c = values.shape
    rows, blocks, steps = padded_rows(v), -(-v // ROWS), c // STEP
    fill = ((0, 0), (0, blocks * ROWS - v), (0, 0))
    nibbles = jnp.pad(nibbles, fill, constant_values=DENSE_PAIR)
    meta = to_sp_meta(to_words(nibbles.reshape(t * blocks * ROWS, -1), 4))
    order = packed.out_order.astype(jnp.int32).reshape(t, v)
    return {
        "values": jnp.pad(values, ((0, 0), (0, rows - v), (0, 0))),
        "meta": meta.reshape(t, blocks, steps, 256),
        "index": index.reshape(t, steps, 2 * STEP),
        "order": jnp.pad(order, fill[:2], constant_values=ABSENT),
    }


def gather(x: Array, index: Array) -> Array:
    """Columns of x [n, i] by index, zeros where it is ABSENT: [n, *index.shape]."""
    taken = jnp.take(x, jnp.maximum(index, 0), axis=1)
    return jnp.where(index == ABSENT, jnp.zeros((), x.dtype), taken)
