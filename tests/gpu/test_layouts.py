"""The layouts against the text of the PTX ISA, read bit by bit in plain Python."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.gpu import layouts
from flexhinm_jax.kernels.packing import unpack
from flexhinm_jax.types import PackedWeight

tiles, stream = jax.jit(layouts.tiles), jax.jit(layouts.stream)
to_sp_meta, from_sp_meta = jax.jit(layouts.to_sp_meta), jax.jit(layouts.from_sp_meta)
to_words = jax.jit(layouts.to_words, static_argnums=1)


def hand_made(rng, t, v, dense, groups, i):
    """A packed weight of random everything, of sizes that fit no tile."""
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    chosen = rng.integers(0, 6, (t, v, groups))
    nibbles = np.array([a | b << 2 for a, b in pairs], np.uint32)[chosen]
    words = np.zeros((t, v, -(-groups // 8)), np.uint32)
    for g in range(groups):
        words[..., g // 8] |= nibbles[..., g] << np.uint32(4 * (g % 8))
    columns = np.stack([rng.permutation(i)[: dense + 4 * groups] for _ in range(t)])
    return PackedWeight(
        dense_index=jnp.asarray(columns[:, :dense], jnp.int32),
        dense_values=jnp.asarray(rng.standard_normal((t, v, dense)), jnp.float32),
        nm_index=jnp.asarray(columns[:, dense:], jnp.int32),
        nm_values=jnp.asarray(rng.standard_normal((t, v, 2 * groups)), jnp.float32),
        nm_positions=jnp.asarray(words),
        out_order=jnp.asarray(rng.permutation(t * v), jnp.int32),
        left=None,
        right=None,
        shape=(t * v, i),
        n=2,
        m=4,
    )


def instruction(values, registers, selector, x):
    """One sparse instruction as the PTX ISA words it: 16-bit A, k = 32, one warp.

    values [16, 16] stored, registers u32[32], x [32, n]. "For .f16/.bf16, metadata is a
    2-bit index per kept element; the selector names the thread pair of each quad that
    supplies it": lane 4 q + h, h in {0, 1} + 2 * selector, holds for row q (bits 0-15)
    and row q + 8 (bits 16-31) the 8 two-bit indices of columns 16 h .. 16 h + 15.
    """
    out = np.zeros((16, x.shape[1]))
    for lane in range(32):
        q, h = divmod(lane, 4)
        if h // 2 != selector:
            continue
        for bit in range(0, 32, 2):
            row = q + 8 * (bit // 16)
            stored = 8 * (h % 2) + bit % 16 // 2  # of the 16 stored columns
            at = int(registers[lane]) >> bit & 3
            column = 4 * (stored // 2) + at
            out[row] += values[row, stored] * x[column]
    return out


def run_tile(values, meta, x):
    """A [64, 64] stored tile times x [128, n]: four instructions in four warps."""
    registers = np.asarray(meta).astype(np.uint32).reshape(2, 128)
    out = np.zeros((64, x.shape[1]))
    for k in range(4):
        for warp in range(4):
            rows = slice(16 * warp, 16 * warp + 16)
            out[rows] += instruction(
                values[rows, 16 * k : 16 * k + 16],
                registers[k // 2, 32 * warp : 32 * warp + 32],
                k % 2,
                x[32 * k : 32 * k + 32],
            )
    return out


SIZES = [(1, 72, 0, 24), (3, 16, 5, 9), (2, 64, 6, 0), (2, 128, 70, 33), (1, 8, 0, 1)]


@pytest.mark.parametrize("t, v, dense, groups", SIZES)
def test_instructions_on_the_tiles_compute_the_product(t, v, dense, groups):
    rng = np.random.default_rng(t + v)
    packed = hand_made(rng, t, v, dense, groups, i=dense + 4 * groups + 8)
    ready = jax.tree.map(np.asarray, tiles(packed))
    x = rng.standard_normal((3, packed.shape[1]))
    y = np.full((t * v, 3), np.nan)
    count, blocks, steps = ready["meta"].shape[:3]
    values = np.zeros((count, blocks * 64, steps * 64))
    values[:, : ready["values"].shape[1]] = ready["values"]
    for tile in range(count):
        columns = ready["index"][tile].reshape(-1)
        taken = np.where(columns[:, None] < 0, np.nan, x.T[np.maximum(columns, 0)])
        taken = np.nan_to_num(taken)
        for block in range(blocks):
            rows = slice(64 * block, 64 * block + 64)
            part: Any = sum(
                run_tile(
                    values[tile, rows, 64 * s : 64 * s + 64],
                    ready["meta"][tile, block, s],
                    taken[128 * s : 128 * s + 128],
                )
                for s in range(steps)
            )
            order = ready["order"][tile, rows]
            y[order[order >= 0]] = part[order >= 0]
    exact = np.asarray(unpack(packed), np.float64) @ x.T
    np.testing.assert_allclose(y, exact, rtol=1e-9, atol=1e-12)


def test_absent_columns_are_never_selected():
    """Positions of a dense pair are 0 and 1, so slots 2 and 3 are don't-care."""
    packed = hand_made(np.random.default_rng(0), 2, 16, 7, 3, 40)
    values, nibbles, index = stream(packed)
    picked = np.stack([np.asarray(nibbles) & 3, np.asarray(nibbles) >> 2], -1)
    group = 4 * np.arange(nibbles.shape[-1])[:, None] + picked
    for tile in range(2):
        column = np.asarray(index)[tile][group[tile]]
        used = np.asarray(values)[tile].reshape(column.shape) != 0
        assert (column[used] >= 0).all()


THREADS = ((2, 1024), (2, 0), (8, 1), (4, 16))
BITS = ((16, 64), (2, 8))
"""ELayout_64x32 of CUTLASS: (size, stride) per mode, of threads and of bits of a word.

A thread and a bit name the element m + 64 k of the 64 x 32 tile; the second mode of the
threads has stride 0, because one pair of lanes serves an instruction.
Source: cute/atom/mma_traits_sm90_gmma_sparse.hpp.
"""


def offset(modes, at):
    total = 0
    for size, stride in modes:
        at, digit = divmod(at, size)
        total += digit * stride
    return total


def disagreements(meta, nibbles):
    """Threads whose word of some instruction is not the one of CUTLASS's layout."""
    words = np.asarray(meta).astype(np.uint32)[0]  # [k / 64, 128]
    wrong = set()
    for instruction in range(2 * len(words)):
        selector = instruction % 2
        for thread in range(128):
            if thread >> 1 & 1 != selector:
                continue
            word = 0
            for bit in range(32):
                k, m = divmod(offset(THREADS, thread) + offset(BITS, bit), 64)
                column = 32 * instruction + k
                word |= int(nibbles[m, column // 4] >> column % 4 & 1) << bit
            if word != words[instruction // 2, thread]:
                wrong.add((instruction, thread))
    return wrong


def test_registers_of_metadata_are_those_of_cutlass():
    pairs = [a | b << 2 for a in range(4) for b in range(a + 1, 4)]
    drawn = np.random.default_rng(6).integers(0, 6, (64, 32))
    nibbles = np.array(pairs, np.uint32)[drawn]
    meta = to_sp_meta(to_words(jnp.asarray(nibbles), 4))
    assert disagreements(meta, nibbles) == set()
    for wrong in (
        jnp.roll(meta, 2, axis=-1),  # the other selector
        meta.reshape(1, 2, 16, 8).swapaxes(2, 3).reshape(1, 2, 128),  # other lanes
        meta << 16 | meta >> 16 & 0xFFFF,  # the rows q and q + 8
    ):
        assert disagreements(wrong, nibbles)


@pytest.mark.parametrize("t, v, dense, groups", SIZES)
def test_two_indices_of_a_group_always_increase(t, v, dense, groups):
    packed = hand_made(np.random.default_rng(1), t, v, dense, groups, 600)
    for meta in (
        from_sp_meta(tiles(packed)["meta"].reshape(-1, 2, 128)),
        to_words(stream(packed)[1], 4),
    ):
        words = np.asarray(meta)
        for shift in range(0, 32, 4):
            first, second = words >> shift & 3, words >> (shift + 2) & 3
            assert (first < second).all()


def test_metadata_survive_the_registers_of_the_instruction():
    words = jax.random.bits(jax.random.key(0), (192, 6), jnp.uint32)
    meta = to_sp_meta(words)
    assert meta.shape == (3, 3, 128) and meta.dtype == jnp.int32
    np.testing.assert_array_equal(from_sp_meta(meta), words)


def test_layouts_can_be_jitted_and_stacked():
    packed = hand_made(np.random.default_rng(4), 2, 16, 6, 9, 64)
    alone = tiles(packed)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), packed)
    for name, value in jax.jit(jax.vmap(layouts.tiles))(stack).items():
        np.testing.assert_array_equal(value[1], alone[name])


def test_other_than_two_of_four_is_refused_with_the_numbers():
    packed = hand_made(np.random.default_rng(5), 1, 8, 0, 2, 8)
    assert layouts.two_of_four(packed) is None
    assert "1:4" in str(layouts.two_of_four(dataclasses.replace(packed, n=1)))
