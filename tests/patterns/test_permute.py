import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexhinm_jax as fh
from flexhinm_jax import patterns
from flexhinm_jax.ops import masks
from flexhinm_jax.patterns import ChannelSearch, Gyro, RandomRows
from tests.ops.test_gyro import planted, purity

KEY = jax.random.key(0)
QUICK = Gyro(sweeps=8, rounds=4, exchanges=4, block=4)
SHAPE = (16, 32)
TILED = [
    fh.HiNM(4, permute=QUICK),
    fh.FlexHiNM(4, permute=QUICK),
    fh.FlexHiNM(4, permute=QUICK, regions="absorb"),
    fh.Vector(4, permute=QUICK),
]


def scores(seed=0, shape=SHAPE, sigma=1.0):
    keys = jax.random.split(jax.random.key(seed))
    scale = jnp.exp(sigma * jax.random.normal(keys[0], (1, shape[1])))
    return jnp.abs(jax.random.normal(keys[1], shape)) * scale


def share(pattern, s, sparsity, key=KEY):
    return float(masks.retained(s, pattern.project(key, s, sparsity).keep))


def verify(support, s):
    fh.verify(fh.Plan(jnp.where(support.keep, s, 0), support, jnp.float32(0)))


@pytest.mark.parametrize("pattern", TILED, ids=str)
def test_searched_supports_keep_their_promises_with_one_trace(pattern):
    traces = type(pattern)._project._cache_size()
    for sparsity in (0.5, 0.75, 0.9, 1.0):
        s = scores()
        support = pattern.project(KEY, s, sparsity)
        verify(support, s)
        gap = abs(float(support.keep.mean()) - (1 - sparsity))
        assert gap <= pattern.granularity(SHAPE) + 1e-6
    assert type(pattern)._project._cache_size() - traces <= 1


def test_the_result_is_the_same_inside_a_larger_jit():
    pattern = TILED[1]
    run = jax.jit(lambda k, s, x: pattern.project(k, 2 * s, x))
    for sparsity in (0.5, 0.75):
        one = run(KEY, scores() / 2, jnp.float32(sparsity))
        two = pattern.project(KEY, scores(), sparsity)
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "pattern",
    [TILED[1], *(pytest.param(p, marks=pytest.mark.slow) for p in TILED[::2])],
    ids=str,
)
def test_a_stack_of_matrices_gives_what_each_gives(pattern):
    stack = jnp.stack([scores(s) for s in range(3)])
    keys = jax.random.split(KEY, 3)
    project = lambda k, s: pattern.project(k, s, 0.75)  # noqa: E731
    together = jax.jit(jax.vmap(project))(keys, stack)
    for index in range(3):
        alone = project(keys[index], stack[index])
        jax.tree.map(
            np.testing.assert_array_equal,
            alone,
            jax.tree.map(lambda x: x[index], together),  # noqa: B023
        )


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.75, 0.875]))
@settings(max_examples=20)
def test_searching_never_retains_less_than_natural_rows(seed, sparsity):
    s = scores(seed)
    for pattern in TILED[:2]:
        plain = fh.patterns.parse(
            ("hinm" if isinstance(pattern, fh.HiNM) else "flexhinm")
            + ":v=4,permute=none"
        )
        assert share(pattern, s, sparsity) >= share(plain, s, sparsity) - 1e-6


@given(st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 0.75, 0.875]))
@settings(max_examples=20)
def test_absorbing_is_never_below_the_exact_regions(seed, sparsity):
    s = scores(seed)
    exact = fh.FlexHiNM(4, permute=None)
    absorb = fh.FlexHiNM(4, permute=None, regions="absorb")
    assert share(absorb, s, sparsity) >= share(exact, s, sparsity) - 1e-6
    if sparsity >= 0.5:  # the theorem: no dense column is left, and HiNM contains it
        regions = absorb.project(KEY, s, sparsity).regions
        assert int(regions.dense_end[0]) < 2
        hinm = fh.HiNM(4, permute=None)
        assert share(absorb, s, sparsity) >= share(hinm, s, sparsity) - 1e-6


def test_regions_help_without_permutation_where_columns_differ():
    r = np.random.default_rng(3000)
    w = r.standard_normal((256, 256)) * np.exp(1.5 * r.standard_normal((1, 256)))
    s = jnp.asarray(np.abs(w), jnp.float32)
    flex, hinm = fh.FlexHiNM(32, permute=None), fh.HiNM(32, permute=None)
    assert share(flex, s, 0.5) > share(hinm, s, 0.5)
    # 0.9456 and 0.9197 with groups of neighbours in natural order, measured elsewhere:
    # dealing the columns by strength alone gives HiNM most of what regions give
    assert share(hinm, s, 0.5) > 0.9456


def test_gradual_pruning_never_brings_a_weight_back():
    for pattern in TILED:
        support, s = None, scores(5)
        for sparsity in (0.5, 0.625, 0.75, 0.875):
            s = scores(int(100 * sparsity))
            new = pattern.project(KEY, s, sparsity, support)
            verify(new, s)
            if support is not None:
                assert not (np.asarray(new.keep) & ~np.asarray(support.keep)).any()
            support = new


@pytest.mark.slow
def test_the_default_recovers_planted_rows():
    s, label = planted(3, 4, 8, 64)
    support = fh.HiNM(8).project(KEY, s, 0.75)
    assert purity(support.regions.out_order.reshape(-1, 8), label) == 1.0
    oracle = s[np.argsort(label, kind="stable")]
    columns = fh.HiNM(8, permute=ChannelSearch())
    assert float(masks.retained(s, support.keep)) >= share(columns, oracle, 0.75) - 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_thorough_recovers_planted_rows_of_full_size(seed):
    r = np.random.default_rng(2000 + seed)
    profile = np.exp(r.standard_normal((8, 256)))
    label = r.permutation(np.repeat(np.arange(8), 32))
    s = jnp.asarray(np.abs(profile[label] * r.standard_normal((256, 256))), jnp.float32)
    support = fh.HiNM(32, permute=Gyro.thorough()).project(KEY, s, 0.75)
    assert purity(support.regions.out_order.reshape(-1, 32), label) == 1.0
    oracle = (0.7139, 0.7099, 0.7106)[seed]  # oracle rows, searched columns
    assert float(masks.retained(s, support.keep)) >= oracle - 0.002


def test_random_rows_are_another_order_with_searched_columns():
    s = scores(1)
    support = fh.HiNM(4, permute=RandomRows(sweeps=8, block=4)).project(KEY, s, 0.75)
    verify(support, s)
    assert support.regions.out_order.tolist() != list(range(16))


def test_a_searched_order_helps_plain_n_of_m():
    s = scores(2)
    plain, searched = fh.NM(2, 4), fh.NM(2, 4, permute=ChannelSearch(sweeps=16))
    support = searched.project(KEY, s)
    verify(support, s)
    assert float(support.keep.mean()) == 0.5
    assert float(masks.retained(s, support.keep)) > share(plain, s, None)
    again = searched.project(KEY, s, prev=support)
    np.testing.assert_array_equal(again.keep, support.keep)


@pytest.mark.slow
def test_the_published_schedule_runs_and_helps():
    s = scores(4)
    paper = Gyro(rounds=0, schedule=(2, 1), patience=2, sweeps=8, solver="hungarian")
    assert share(fh.HiNM(4, permute=paper), s, 0.75) > share(
        fh.HiNM(4, permute=None), s, 0.75
    )


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("pattern", TILED, ids=str)
def test_scores_without_structure_give_a_legal_support(pattern, fill):
    s = jnp.full(SHAPE, fill)
    verify(pattern.project(KEY, s, 0.75), s)


def test_all_zero_tiles_give_a_legal_support():
    s = scores().at[4:8].set(0)
    for pattern in TILED:
        verify(pattern.project(KEY, s, 0.75), s)


@pytest.mark.parametrize(
    "shape", [(4, 4), pytest.param((8, 4), marks=pytest.mark.slow)]
)
def test_one_tile_and_one_group_work(shape):
    s = scores(0, shape)
    verify(TILED[1].project(KEY, s, 0.5), s)


@pytest.mark.parametrize(
    ("pattern", "shape", "sparsity", "match"),
    [
        (fh.HiNM(4), (16, 30), 0.75, "in=30 is not a multiple of m=4"),
        (fh.HiNM(4), (18, 32), 0.75, "out=18 is not a multiple of vector_size=4"),
        (fh.FlexHiNM(64), (16, 32), 0.75, "out=16 is not a multiple of vector_size=64"),
        (fh.FlexHiNM(4), SHAPE, 1.5, "sparsity=1.5 is outside"),
        (fh.HiNM(4), SHAPE, 0.25, r"sparsity=0.25 is outside \[0.5, 1\]"),
        (fh.HiNM(4), SHAPE, None, "needs a target"),
        (fh.HiNM(4, hardware=True), (16, 48), 0.75, "in=48 is not a multiple of hardw"),
        (fh.FlexHiNM(4, regions=(8, 32)), SHAPE, None, "need 40 columns of in=32"),
        (fh.FlexHiNM(4, regions=(8, 8)), SHAPE, 0.75, "always removes 0.625"),
    ],
)
def test_bad_input_is_named(pattern, shape, sparsity, match):
    with pytest.raises(ValueError, match=match):
        pattern.project(KEY, jnp.ones(shape), sparsity)


@pytest.mark.parametrize(
    "pattern", [fh.HiNM(4), fh.FlexHiNM(4), fh.NM(2, 4, permute=ChannelSearch())]
)
def test_scores_that_are_no_numbers_are_refused(pattern):
    with pytest.raises(ValueError, match="scores has 1 NaN"):
        pattern.project(KEY, scores().at[3, 3].set(jnp.nan), 0.5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gyro(rounds=-1),
        lambda: Gyro(schedule=(0,)),
        lambda: ChannelSearch(solver="greedy"),
        lambda: ChannelSearch(block=1),
        lambda: fh.HiNM(4, permute="gyro"),
        lambda: fh.NM(2, 4, permute=Gyro()),
        lambda: fh.FlexHiNM(4, regions="best"),
        lambda: fh.FlexHiNM(4, regions=(0, 3)),
        lambda: fh.FlexHiNM(4, regions=(8, 32), hardware=True),
    ],
)
def test_bad_configurations_are_refused(build):
    with pytest.raises(ValueError, match="need|choose|only|at least"):
        build()


def test_fixed_regions_have_the_given_counts():
    pattern = fh.FlexHiNM(4, regions=(8, 8), permute=None)
    regions = pattern.project(KEY, scores()).regions
    assert set(regions.dense_end.tolist()) == {8}
    assert set(regions.nm_end.tolist()) == {16}


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_hardware_rounding_gives_whole_instructions(sparsity):
    s = scores(0, (8, 128))
    for cls in (fh.HiNM, fh.FlexHiNM, fh.Vector):
        pattern = cls(4, permute=None, hardware=True)
        support = pattern.project(KEY, s, sparsity)
        verify(support, s)
        dense = np.asarray(support.regions.dense_end)
        assert (dense % 16 == 0).all()
        assert ((np.asarray(support.regions.nm_end) - dense) % 32 == 0).all()
        gap = abs(float(support.keep.mean()) - (1 - sparsity))
        assert gap <= pattern.granularity(s.shape) / 2 + 1e-6


def test_positional_arguments_are_the_vector_size_and_n_of_m():
    assert fh.HiNM(8, 1, 4) == fh.HiNM(vector_size=8, n=1, m=4)
    assert fh.FlexHiNM(8, 1, 4, None).permute is None


def test_orders_are_parsed_by_name():
    parse = patterns.parse
    assert parse("hinm:v=64,permute=none") == fh.HiNM(64, permute=None)
    assert parse("flexhinm:permute=thorough").permute == Gyro.thorough()
    assert parse("flexhinm:v=8,regions=absorb") == fh.FlexHiNM(8, regions="absorb")
    assert parse("vector:permute=gyro,hardware=yes").hardware is True
    assert parse("nm:n=2,m=4,permute=channels") == fh.NM(2, 4, ChannelSearch())
    assert parse("2:4").permute is None
    with pytest.raises(ValueError, match="choose none, channels, gyro"):
        parse("hinm:permute=best")


@functools.cache
def example():
    return scores(9)


def test_the_same_key_gives_the_same_support():
    one, two = (TILED[0].project(KEY, example(), 0.75) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
