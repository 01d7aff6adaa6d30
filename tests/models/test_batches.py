import numpy as np
import pytest

from flexhinm_jax.models.batches import batches, pad_tokens


def lists(sizes):
    return [list(range(1, size + 1)) for size in sizes]


def test_every_list_comes_once_and_knows_its_place():
    given = lists([3, 17, 1, 16, 40, 2, 33, 5])
    seen = {}
    for batch in batches(given, 3, 64):
        for row, tokens, mask in zip(
            batch.rows, batch.tokens, batch.mask, strict=False
        ):
            seen[int(row)] = tokens[mask == 1].tolist()
    assert [seen[k] for k in range(len(given))] == given


def test_shapes_are_few_and_no_longer_than_needed():
    found = list(batches(lists([3, 17, 1, 16, 40, 2, 33, 5]), 2, 40))
    assert [b.tokens.shape for b in found] == [(2, 16)] * 3 + [(2, 32)] + [(2, 40)]
    assert {b.tokens.shape for b in found} == {b.mask.shape for b in found}


def test_the_last_batch_is_filled_with_empty_rows():
    (batch,) = batches([[5, 6]], 3, 4, pad_id=9)
    np.testing.assert_array_equal(batch.rows, [0])
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 9, 9], [9] * 4, [9] * 4])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0, 0], [0] * 4, [0] * 4])
    assert batch.tokens.dtype == batch.mask.dtype == batch.rows.dtype == np.int32


def test_no_lists_give_no_batches():
    assert list(batches([], 2, 8)) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1], []], "list 1 has 0 tokens, allowed are 1 .. 4"),
        ([[1] * 5], "list 0 has 5 tokens.*truncate in the tokenizer"),
    ],
)
def test_a_list_of_bad_length_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        list(batches(given, 2, 4))


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        list(batches([[1]], *sizes))


def test_padding_does_not_cut():
    with pytest.raises(ValueError, match="list 0 has 3 tokens, more than length=2"):
        pad_tokens([[1, 2, 3]], 2)
