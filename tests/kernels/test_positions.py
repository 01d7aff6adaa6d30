"""The codes of positions, against the list of all subsets."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.kernels import positions
from tests.kernels.test_packing import plan_of

KINDS = [np.asarray, jnp.asarray]
SHAPES = [(1, 2), (1, 4), (3, 4), (2, 5), (3, 6), (2, 8), (4, 8), (6, 8), (4, 4)]
BIG = [(8, 16), (2, 16), (16, 32)]


def in_order(n, m):
    """All subsets, the last position growing slowest."""
    return sorted(itertools.combinations(range(m), n), key=lambda c: c[::-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [*SHAPES, (8, 16)])
def test_ranks_number_all_subsets(n, m, kind):
    every = kind(np.asarray(in_order(n, m), np.uint32))
    numbers = np.arange(math.comb(m, n), dtype=np.uint32)
    got = positions.rank(every, m)
    assert isinstance(got, type(every)) and got.dtype == jnp.uint32
    np.testing.assert_array_equal(got, numbers)
    np.testing.assert_array_equal(positions.subset(kind(numbers), n, m), every)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), *SHAPES, *BIG, (32, 64)])
def test_what_is_encoded_is_decoded(n, m, kind):
    rng = np.random.default_rng(0)
    groups = 11
    chosen = rng.permuted(
        np.tile(np.arange(m, dtype=np.uint32), (3, groups, 1)), axis=-1
    )
    chosen = np.sort(chosen[..., :n], -1)
    chosen[0, 0], chosen[0, 1] = np.arange(n), np.arange(m - n, m)  # first, last
    chosen = chosen.reshape(3, groups * n)
    words = positions.encode(kind(chosen), n, m)
    assert isinstance(words, type(kind(chosen))) and words.dtype == jnp.uint32
    bits = groups * positions.group_bits(n, m)
    assert words.shape == (3, math.ceil(bits / 32))
    np.testing.assert_array_equal(positions.decode(words, groups, n, m), chosen)


def test_codes_are_as_short_as_the_number_of_subsets_allows():
    for n, m in (*SHAPES, *BIG):
        assert 2 ** positions.group_bits(n, m) >= math.comb(m, n)
        assert 2 ** positions.group_bits(n, m) < 2 * math.comb(m, n) or n == m
    assert positions.group_bits(8, 16) / 8 < 2  # bits per kept weight
    assert positions.group_bits(6, 8) == positions.group_bits(2, 8)
    assert positions.subsets(2, 4) is None and positions.subsets(32, 64) is None


def test_a_group_and_its_complement_read_each_other():
    removed = np.asarray(list(itertools.combinations(range(8), 2)), np.uint32)
    kept = np.stack([np.setdiff1d(np.arange(8), row) for row in removed])
    ranks = positions.rank(kept.astype(np.uint32), 8)
    assert sorted(ranks) == list(range(28))


@pytest.mark.parametrize(
    ("n", "m", "dtype", "most"),
    [
        (6, 8, jnp.float32, 0.772),
        (6, 8, jnp.bfloat16, 0.792),
        (4, 8, jnp.bfloat16, 0.557),
        (8, 16, jnp.bfloat16, 0.557),
        (16, 32, jnp.bfloat16, 0.561),
    ],
)
def test_bytes_are_those_of_values_and_ranks(n, m, dtype, most):
    plan = plan_of(fh.NM(n, m), (64, 1024), dtype=dtype)
    packed = fh.kernels.pack(plan)
    dense = plan.weight.size * plan.weight.dtype.itemsize
    # Besides: one index per column and one per row, of 64 rows.
    assert (packed.nbytes - 4 * (1024 + 64)) / dense < most
    np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)


@pytest.mark.parametrize(("n", "m"), [(2, 8), (3, 4), (8, 16)])
def test_products_read_ranks(n, m):
    plan = plan_of(fh.NM(n, m))
    packed = fh.kernels.pack(plan)
    x = jax.random.normal(jax.random.key(0), (3, 32))
    for backend in ("reference", "xla", "dense"):
        got = fh.sparse_dot(x, packed, backend=backend)
        np.testing.assert_allclose(got, x @ plan.weight.T, rtol=1e-5, atol=1e-5)
    prepared = fh.kernels.prepare(packed, "xla")
    got = fh.sparse_dot(x, prepared)
    np.testing.assert_allclose(got, x @ plan.weight.T, rtol=1e-5, atol=1e-5)
