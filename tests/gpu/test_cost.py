"""Predicted times: what they rest on, and the choices that follow from them."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexhinm_jax.gpu import cost, support, wgmma_sp
from flexhinm_jax.gpu.tilings import Source
from flexhinm_jax.gpu.wgmma_sp import Shape

SIDE = 8192


def predicted(n, v, dense, kept, o=SIDE, i=SIDE):
    """(sparse, expanded, dense) seconds; a single tile is in its own order."""
    stored, tiles = dense + kept // 2, o // v
    sizes = cost.Sizes(n, o, i, tiles, stored, dense + kept)
    shape = Shape(tiles, -(-v // 64), -(-stored // 64), i, plain=tiles == 1)
    cuts = wgmma_sp.cuts(n, shape)
    return min(cuts)[0], cost.expanded(sizes), cost.dense(n, o, i)


TWO_OF_FOUR = (SIDE, 0, SIDE)
HINM = [(v, 0, SIDE) for v in (64, 128, 256)]
THREE_QUARTERS = [(v, SIDE // 8, SIDE // 4) for v in (64, 128)]


@pytest.mark.parametrize("n", [1, 8, 16])
@pytest.mark.parametrize("weight", [TWO_OF_FOUR, *HINM, *THREE_QUARTERS])
def test_few_tokens_are_faster_packed(n, weight):
    sparse, expanded, dense = predicted(n, *weight)
    assert sparse < dense < expanded


@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("weight", [*HINM, THREE_QUARTERS[0]])
def test_many_tokens_are_faster_with_the_matrix_where_x_is_gathered_often(n, weight):
    sparse, _, dense = predicted(n, *weight)
    assert dense < sparse


@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("weight, most", [(TWO_OF_FOUR, 1), (THREE_QUARTERS[1], 0.95)])
def test_wide_blocks_are_faster_than_the_matrix(n, weight, most):
    sparse, expanded, dense = predicted(n, *weight)
    assert sparse < most * dense < expanded


@pytest.mark.parametrize("weight", [*HINM, THREE_QUARTERS[0]])
def test_many_tokens_pay_for_writing_the_matrix_out(weight):
    sparse, expanded, _ = predicted(4096, *weight)
    assert expanded < sparse


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("hinm", HINM, ids=str)
def test_an_order_per_tile_is_free_at_decode(n, hinm):
    assert predicted(n, *hinm)[0] < 1.06 * predicted(n, *TWO_OF_FOUR)[0]


@pytest.mark.parametrize("n", [1024, 4096])
def test_an_order_per_tile_costs_a_gather_at_prefill_for_every_v(n):
    """Blocks share x by copies of the engine, which gathers no rows."""
    plain = predicted(n, *TWO_OF_FOUR)[0]
    small, *others = (predicted(n, *hinm)[0] / plain for hinm in HINM)
    assert small > 3 and all(1.5 < ratio < 1.7 for ratio in others)


@pytest.mark.parametrize("n", [64, 1024, 4096])
def test_blocks_that_share_x_bring_two_of_four_below_the_dense_time(n):
    sparse, expanded, dense = predicted(n, *TWO_OF_FOUR)
    assert sparse < expanded and sparse < 0.92 * dense
    shape = Shape(1, 128, 64, SIDE, plain=True)
    alone = min(cut for cut in wgmma_sp.cuts(n, shape) if cut[-1].sharing == 1)
    assert sparse < 0.8 * alone[0] and wgmma_sp.tiling(n, shape).sharing == 4


@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("weight", [TWO_OF_FOUR, HINM[1], THREE_QUARTERS[1]])
def test_blocks_of_256_tokens_and_shared_weights_pay_at_prefill(n, weight):
    v, dense, kept = weight
    tiles = SIDE // v
    steps = (dense + kept // 2) // 64
    shape = Shape(tiles, -(-v // 64), steps, SIDE, plain=tiles == 1)
    cuts = list(wgmma_sp.cuts(n, shape))
    least = lambda keep: min(t for t, _, cut in cuts if keep(cut))  # noqa: E731
    best = min(cuts)[-1]
    assert best.tokens == 256 and best.sharing > 1 and best.splits == 1
    assert min(cuts)[0] < 0.91 * least(lambda cut: cut.tokens == 128)
    assert min(cuts)[0] < 0.91 * least(lambda cut: cut.sharing == 1)


def test_two_of_four_loses_to_a_held_matrix_where_wide_blocks_do_not_fill_the_chip():
    faster = [predicted(n, *TWO_OF_FOUR)[0::2] for n in (32, 64, 256, 512)]
    assert [sparse < dense for sparse, dense in faster] == [True, True, False, True]


def test_three_quarters_win_at_256_tokens_without_wide_blocks():
    sparse, _, dense = predicted(256, *THREE_QUARTERS[1])
    assert sparse < 0.95 * dense


def test_three_quarters_win_at_64_tokens_still():
    for weight in THREE_QUARTERS:
        sparse, _, dense = predicted(64, *weight)
        assert sparse < dense


def test_a_dense_product_takes_what_was_measured():
    assert cost.dense(1, SIDE, SIDE) == pytest.approx(33e-6, rel=0.03)
    assert cost.dense(4096, SIDE, SIDE) == pytest.approx(696e-6, rel=0.01)


SHAPES = st.builds(
    Shape,
    tiles=st.sampled_from([1, 3, 8, 64, 128, 300]),
    blocks=st.integers(1, 130),
    steps=st.integers(1, 300),
    inputs=st.integers(8, 40000),
).flatmap(
    lambda s: st.sampled_from(
        [s, s._replace(tiles=1, inputs=128 * s.steps, plain=True)]
    )
)


@given(n=st.integers(1, 5000), shape=SHAPES)
def test_no_cut_is_offered_whose_sums_do_not_fit_the_registers(n, shape):
    for _, _, cut in wgmma_sp.cuts(n, shape):
        assert cut.splits == 1 or cut.tokens <= 128


@given(n=st.integers(1, 5000), shape=SHAPES)
def test_every_cut_fits_the_chip(n, shape):
    cut = wgmma_sp.tiling(n, shape)
    source = shape.source(n, cut)
    per = -(-shape.steps // cut.splits)
    more = {
        Source.LISTED: 512 * per,
        Source.HELD: 512 * cut.depth + 2 * n * shape.inputs,
    }
    needed = cut.depth * cut.slot_bytes + more.get(source, 0) + 2048
    assert needed <= support.SHARED_BYTES
    sums, x = 4 * 64 * cut.groups * cut.tokens, 4 * cut.step * cut.tokens
    assert sums <= x * cut.depth, "they take the place of the activations"
    assert shape.blocks % cut.groups == 0
    if source is Source.LISTED:
        assert 64 * per <= 256 * cut.step, (
            "a box of the copy engine has 256 rows at most"
        )
        assert cut.tokens >= 16, "a gather brings 16 tokens"
    if source is Source.HELD:
        assert shape.inputs % 8 == 0 and cut.tokens >= n
    assert cut.tokens >= min(n, 64) and cut.splits <= max(shape.steps, 1)


@given(n=st.integers(1, 5000), shape=SHAPES)
def test_splits_exchange_little_and_fill_the_chip(n, shape):
    cut = wgmma_sp.tiling(n, shape)

    def room(splits):
        one = dataclasses.replace(cut, splits=splits, depth=4)
        source = shape.source(n, one)
        return wgmma_sp._room(one, source, shape.steps, 2 * n * shape.inputs)

    if cut.splits == 1 or not room(cut.splits - 1)[0]:
        return  # fewer do not fit
    rows = shape.tiles * shape.blocks * 64
    source = shape.source(n, cut)
    peers = cut.sharing if source is Source.LISTED else 1
    padded = -(-n // cut.tokens) * cut.tokens
    sums = 4 * (cut.splits - 1) * rows * padded
    assert sums <= 0.25 * rows * shape.steps * 144
    if not room(1)[0]:
        return
    columns = -(-padded // cut.tokens // peers) * peers
    grid = shape.tiles * shape.blocks // cut.groups * columns

    def lost(splits):
        cluster = splits * cut.sharing
        waves = grid * splits / (cost.CORES * room(splits)[1] // cluster * cluster)
        return math.ceil(waves) / waves

    assert lost(cut.splits) < lost(1), "splits that leave no fuller waves"


@pytest.mark.parametrize("n", [1, 8, 16])
@pytest.mark.parametrize("weight", [TWO_OF_FOUR, *HINM, *THREE_QUARTERS])
def test_decoding_a_large_matrix_takes_one_wave(n, weight):
    v, dense, kept = weight
    steps, tiles = (dense + kept // 2) // 64, SIDE // v
    shape = Shape(tiles, -(-v // 64), steps, SIDE, tiles == 1)
    cut = wgmma_sp.tiling(n, shape)
    assert cut.tokens == (8 if n <= 8 else 16)
    source = shape.source(n, cut)
    one = dataclasses.replace(cut, depth=4)
    resident = wgmma_sp._room(one, source, steps, 2 * n * SIDE)[1]
    clusters = tiles * shape.blocks // cut.groups
    places = cost.CORES * resident // cut.splits
    assert 0.9 < clusters / places <= 1


def test_few_tokens_in_a_plain_order_need_no_other_program():
    shape = Shape(1, 128, 64, SIDE, plain=True)
    sources = [shape.source(n, wgmma_sp.tiling(n, shape)) for n in (1, 8, 30, 1024)]
    assert [source.name for source in sources] == ["PLAIN", "STREAM", "PLAIN", "STREAM"]
    odd = shape._replace(inputs=SIDE - 8)  # the stream ends later than x
    assert odd.source(8, wgmma_sp.tiling(8, odd)) is Source.PLAIN
