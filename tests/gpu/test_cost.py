"""Predicted times: what they rest on, and the choices that follow from them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexhinm_jax.gpu import cost, hopper, support, wgmma_sp

SIDE = 8192


def predicted(n, v, dense, kept, o=SIDE, i=SIDE):
    """(sparse, expanded, dense) seconds."""
    stored, tiles = dense + kept // 2, o // v
    sizes = cost.Sizes(n, o, i, tiles, stored, dense + kept)
    cuts = wgmma_sp._cuts(n, tiles, -(-v // 64), -(-stored // 64))
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
@pytest.mark.parametrize("weight", [TWO_OF_FOUR, *HINM, *THREE_QUARTERS])
def test_many_tokens_are_faster_with_the_matrix_held(n, weight):
    sparse, _, dense = predicted(n, *weight)
    assert dense < sparse


@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("weight", [TWO_OF_FOUR, *HINM, THREE_QUARTERS[0]])
def test_many_tokens_pay_for_writing_the_matrix_out(n, weight):
    sparse, expanded, _ = predicted(n, *weight)
    assert expanded < sparse


def test_two_of_four_loses_to_a_held_matrix_from_64_tokens_on():
    assert [
        predicted(n, *TWO_OF_FOUR)[0] < predicted(n, *TWO_OF_FOUR)[2] for n in (32, 64)
    ] == [True, False]


def test_three_quarters_win_at_64_tokens_still():
    for weight in THREE_QUARTERS:
        sparse, _, dense = predicted(64, *weight)
        assert sparse < dense


def test_a_dense_product_takes_what_was_measured():
    assert cost.dense(1, SIDE, SIDE) == pytest.approx(33e-6, rel=0.03)
    assert cost.dense(4096, SIDE, SIDE) == pytest.approx(696e-6, rel=0.01)


@given(
    n=st.integers(1, 5000),
    tiles=st.integers(1, 300),
    blocks=st.integers(1, 130),
    steps=st.integers(1, 300),
)
def test_every_cut_fits_the_chip(n, tiles, blocks, steps):
    cut = wgmma_sp.tiling(n, tiles, blocks, steps)
    per = -(-steps // cut.splits)
    listed = 512 * per if tiles > 1 else 0
    assert cut.shared_bytes + listed + 2048 <= support.SHARED_BYTES
    assert blocks % cut.row_groups == 0
    assert tiles == 1 or per <= 256, "a box of the copy engine has 256 rows at most"
    assert cut.width >= min(n, 64) and cut.splits <= steps
    assert tiles == 1 or cut.tokens >= 16, "a gather brings 16 tokens"


@given(
    n=st.integers(1, 5000),
    tiles=st.sampled_from([1, 8, 64, 128]),
    blocks=st.integers(1, 130),
    steps=st.integers(1, 128),
)
def test_splits_write_little_and_fill_the_chip(n, tiles, blocks, steps):
    cut = wgmma_sp.tiling(n, tiles, blocks, steps)
    fits = lambda s: wgmma_sp._room(  # noqa: E731
        hopper.Tiling(cut.row_groups, cut.token_groups, cut.tokens, s),
        steps if tiles > 1 else 0,
    )
    if cut.splits == 1 or not fits(cut.splits - 1)[0]:
        return  # fewer do not fit
    rows = tiles * blocks * 64
    padded = -(-n // cut.width) * cut.width
    assert 8 * cut.splits * rows * padded <= 0.25 * rows * steps * 144
    _, resident = fits(cut.splits)
    grid = tiles * blocks // cut.row_groups * (padded // cut.width)
    alone, split = (grid * s / (cost.CORES * resident) for s in (1, cut.splits))
    lost = lambda waves: math.ceil(waves) / waves  # noqa: E731
    assert lost(split) < lost(alone), "splits that leave no fuller waves"
