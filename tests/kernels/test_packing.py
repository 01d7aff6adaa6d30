import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.kernels import packing
from flexhinm_jax.ops import words
from flexhinm_jax.types import BlockDiagonal, Plan, Regions, Support
from tests.cases import PATTERNS, targets


def plan_of(pattern, shape=(16, 32), sparsity=None, dtype=jnp.float32, seed=0):
    w = jax.random.normal(jax.random.key(seed), shape).astype(dtype)
    method = fh.Magnitude(pattern)
    return method.decide(method.solve(jax.random.key(1), w, None, sparsity=sparsity), w)


@pytest.mark.parametrize("m", [2, 3, 4, 8, 16, 32])
def test_positions_survive_the_words(m):
    bits = words.position_bits(m)
    assert 32 % bits == 0 and 2**bits >= m
    position = jax.random.randint(jax.random.key(m), (3, 21), 0, m).astype(jnp.uint32)
    stored = words.to_words(position, bits)
    assert stored.dtype == jnp.uint32 and stored.shape == (3, -(-21 * bits // 32))
    np.testing.assert_array_equal(words.from_words(stored, 21, bits), position)


def test_a_24_group_is_the_nibble_of_its_two_indices():
    w = jnp.array([[0.0, 5, 0, 7, 9, 8, 0, 0]])
    packed = fh.kernels.pack(plan_of_weight(w))
    assert int(packed.nm_positions[0, 0, 0]) == (1 | 3 << 2) | (0 | 1 << 2) << 4


def plan_of_weight(w):
    method = fh.Magnitude(fh.NM(2, 4))
    return method.decide(method.solve(jax.random.key(0), w, None), w)


def test_positions_increase_inside_a_group_of_zeros():
    packed = fh.kernels.pack(plan_of_weight(jnp.zeros((2, 8))))
    bits = words.position_bits(4)
    position = words.from_words(packed.nm_positions, 4, bits).reshape(2, 2, 2)
    assert (position[..., 1] > position[..., 0]).all()


def ragged_plan():
    """Two tiles: half dense and the rest pruned; two groups."""
    keep = np.zeros((4, 8), bool)
    keep[:2, :4] = True  # tile 0: four dense columns
    keep[2:, [0, 1, 4, 5]] = True  # tile 1: two groups, the first two columns of each
    weight = jnp.where(keep, jnp.arange(1.0, 33).reshape(4, 8), 0)
    regions = Regions(
        out_order=jnp.arange(4, dtype=jnp.int32),
        in_order=jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1)),
        dense_end=jnp.array([4, 0], jnp.int32),
        nm_end=jnp.array([4, 8], jnp.int32),
        n=2,
        m=4,
    )
    return Plan(weight, Support(jnp.asarray(keep), regions), jnp.float32(1))


def test_tiles_of_different_sizes_are_levelled_and_come_back_exactly():
    plan = ragged_plan()
    fh.verify(plan)
    packed = fh.kernels.pack(plan)
    assert packed.dense_values.shape == (2, 2, 4)
    assert packed.nm_index.tolist() == [[0, 0, 0, 0], [4, 5, 6, 7]]
    np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    np.testing.assert_allclose(fh.sparse_dot(x, packed), x @ plan.weight.T, rtol=1e-5)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4])
def test_unequal_tiles_take_the_least_space_there_is(sparsity, stack):
    method = fh.Magnitude(fh.Tiles((4, 8)))
    w = jax.random.normal(jax.random.key(7), (*stack, 16, 64), jnp.float32)
    one = lambda w: method.decide(  # noqa: E731
        method.solve(jax.random.key(0), w, None, sparsity=sparsity), w
    )
    plan = one(w) if not stack else jax.vmap(one)(w)
    packed = fh.kernels.pack(plan)
    np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)
    regions = plan.support.regions
    dense = np.asarray(regions.dense_end).ravel()
    groups = (np.asarray(regions.nm_end).ravel() - dense) // 4
    assert len(set(dense)) > 1
    # Dense places for all, and those that are free taken by as many groups as fit.
    fits = [
        (d + 2 * h, d, 4 * h)
        for d in range(dense.max(), 65)
        for h in range(17)
        if (groups - np.minimum((d - dense) // 4, groups) <= h).all()
    ]
    packed = packed.filled()
    got = packed.dense_index.shape[-1], packed.nm_index.shape[-1]
    assert got == min(fits)[1:] and sum(got) == 64


def test_block_wrappers_multiply_in():
    plan = plan_of(fh.NM(2, 4), (8, 16))
    a = jax.random.normal(jax.random.key(5), (2, 4, 4))
    b = jax.random.normal(jax.random.key(6), (4, 4, 4))
    plan = Plan(
        plan.weight,
        plan.support,
        plan.retained,
        None,
        BlockDiagonal(a),
        BlockDiagonal(b),
    )
    full = (
        jax.scipy.linalg.block_diag(*a) @ plan.weight @ jax.scipy.linalg.block_diag(*b)
    )
    packed = fh.kernels.pack(plan)
    np.testing.assert_allclose(fh.kernels.unpack(packed), full, rtol=1e-5, atol=1e-5)
    x = jax.random.normal(jax.random.key(7), (3, 16))
    np.testing.assert_allclose(
        fh.sparse_dot(x, packed), x @ full.T, rtol=1e-4, atol=1e-4
    )
    y = jax.random.normal(jax.random.key(8), (3, 8))
    got = fh.sparse_dot(y, packed, transposed=True)
    np.testing.assert_allclose(got, y @ full, rtol=1e-4, atol=1e-4)


def test_a_factor_acts_in_its_own_order():
    order = jax.random.permutation(jax.random.key(1), 8).astype(jnp.int32)
    blocks = jax.random.normal(jax.random.key(2), (2, 4, 4))
    factor = BlockDiagonal(blocks, order)
    full = np.zeros((8, 8), np.float32)
    full[np.ix_(order, order)] = jax.scipy.linalg.block_diag(*blocks)
    x = jax.random.normal(jax.random.key(3), (3, 8))
    for matrix, given in ((full, factor), (full.T, factor.T)):
        got = fh.kernels.block_product(x, given)
        np.testing.assert_allclose(got, x @ matrix.T, rtol=1e-4, atol=1e-5)
        got = fh.kernels.block_product(x.T, given, axis=0)
        np.testing.assert_allclose(got, matrix @ x.T, rtol=1e-4, atol=1e-5)


def test_a_plan_whose_factors_do_not_fit_is_refused():
    plan = plan_of(fh.NM(2, 4), (8, 16))
    eye = jnp.eye(4)[None]
    for factor, message in (
        (BlockDiagonal(eye), "do not tile 8 channels"),
        (BlockDiagonal(jnp.full((2, 4, 4), jnp.nan)), "left blocks has 32 NaN"),
        (
            BlockDiagonal(jnp.tile(eye, (2, 1, 1)), jnp.zeros(8, int)),
            "no.* permutation",
        ),
        (BlockDiagonal(jnp.tile(eye, (2, 1, 1)), jnp.arange(4)), "order of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            fh.verify(dataclasses.replace(plan, left=factor))


def test_packed_bytes_are_counted_from_the_arrays():
    packed = fh.kernels.pack(plan_of(fh.NM(2, 4), (16, 32)))
    values, positions, index, order = 16 * 16 * 4, 16 * 16 // 16 * 4, 32 * 4, 16 * 4
    assert packed.nbytes == values + positions + index + order


def test_a_stack_packs_to_one_static_size():
    w = jax.random.normal(jax.random.key(0), (3, 16, 32))
    method = fh.Magnitude(fh.FlexHiNM(8))
    solve = lambda k, x: method.decide(method.solve(k, x, None, sparsity=0.4), x)  # noqa: E731
    plans = jax.vmap(solve)(jax.random.split(jax.random.key(1), 3), w)
    packed = fh.kernels.pack(plans)
    np.testing.assert_array_equal(fh.kernels.unpack(packed), plans.weight)


@pytest.mark.parametrize("name", PATTERNS)
def test_no_array_of_a_packed_weight_is_empty(name):
    if "unstructured" in name:
        pytest.skip("nothing to pack")
    pattern = PATTERNS[name]
    for sparsity in targets(pattern):
        plan = plan_of(pattern, (8, 16), sparsity=sparsity)
        packed = fh.kernels.pack(plan)
        assert all(array.size for array in jax.tree.leaves(packed))
        np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)


@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_weight_without_columns_has_one_of_padding(stack):
    plan = ragged_plan()
    zero = jnp.zeros_like
    regions = dataclasses.replace(
        plan.support.regions, dense_end=zero(plan.support.regions.dense_end)
    )
    regions = dataclasses.replace(regions, nm_end=regions.dense_end)
    support = Support(zero(plan.support.keep), regions)
    plan = dataclasses.replace(plan, weight=zero(plan.weight), support=support)
    plan = jax.tree.map(lambda a: jnp.broadcast_to(a, (*stack, *a.shape)), plan)
    packed = fh.kernels.pack(plan)
    assert packed.dense_values.shape == (*stack, 2, 2, 1) and packed.nm_index is None
    assert packed.dtype == plan.weight.dtype
    np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)
    one = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(stack) :])[0], packed)
    x = jnp.ones((3, 8))
    for weight in (one, fh.kernels.prepare(one, "xla")):
        assert not fh.sparse_dot(x, weight).any()
        assert not fh.sparse_dot(x[:, :4], weight, transposed=True).any()


def test_an_unstructured_support_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="no regions to pack"):
        fh.kernels.pack(plan_of(fh.Unstructured(), sparsity=0.5))


def test_packing_under_jit_says_what_to_use_instead():
    plan = plan_of(fh.NM(2, 4))
    with pytest.raises(ValueError, match="pack_to"):
        jax.jit(fh.kernels.pack)(plan)


def test_the_values_of_a_packed_weight_have_gradients():
    plan = ragged_plan()

    def total(w):
        packed = fh.kernels.pack(dataclasses.replace(plan, weight=w))
        return packed.dense_values.sum() + 2 * packed.nm_values.sum()

    factors = jnp.ones((4, 8)).at[2:, 4:].set(2.0)  # the one group that found no place
    want = jnp.where(plan.weight != 0, factors, 0)
    np.testing.assert_array_equal(
        jnp.where(plan.weight != 0, jax.grad(total)(plan.weight), 0), want
    )


def test_values_of_a_trained_matrix_take_the_places_that_they_had():
    plan = ragged_plan()
    packed = fh.kernels.pack(plan)
    trained = jnp.where(plan.weight != 0, plan.weight * 3 - 1, 0)
    again = fh.kernels.with_weight(packed, trained)
    np.testing.assert_array_equal(fh.kernels.unpack(again), trained)
    np.testing.assert_array_equal(again.nm_positions, packed.nm_positions)
    with pytest.raises(ValueError, match="not zero where the packed weight is"):
        fh.kernels.with_weight(packed, trained + 1)
    eight = fh.kernels.quantise(packed, "int8")
    with pytest.raises(ValueError, match="values of eight bits"):
        fh.kernels.with_weight(eight, trained)


def test_weights_of_one_shape_are_packed_by_one_program_as_by_one_for_their_sizes():
    gathered: Any = packing._gathered
    method = fh.Magnitude(fh.FlexHiNM(4, permute=None))
    w = jax.random.normal(jax.random.key(2), (8, 24), jnp.float32)
    programs = set()
    for sparsity in (0.0, 0.2, 0.4, 0.75, 1.0):
        state = method.solve(jax.random.key(0), w, None, sparsity=sparsity)
        plan = method.decide(state, w)
        dense, nm = packing.sizes(plan.support.regions)  # equal tiles, so as they are
        packed = fh.kernels.pack(plan)
        programs.add(gathered._cache_size())
        chex.assert_trees_all_equal(packed, fh.kernels.pack_to(plan, dense, nm))
        np.testing.assert_array_equal(fh.kernels.unpack(packed), plan.weight)
    assert len(programs) == 1
