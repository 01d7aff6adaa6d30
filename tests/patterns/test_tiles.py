import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import masks
from flexhinm_jax.patterns import parse

KEY = jax.random.key(0)


def scores(seed=0, shape=(8, 16)):
    return jnp.abs(jax.random.normal(jax.random.key(seed), shape))


def project(pattern, s, sparsity, prev=None):
    return pattern.project(KEY, s, sparsity, prev)


def test_no_other_choice_of_dense_tiles_keeps_more():
    pattern, s = fh.Tiles((4, 8)), scores()
    inner = masks.n_of_m(s, n=2, m=4)
    for count, sparsity in ((1, 0.375), (2, 0.25), (3, 0.125)):
        best = max(
            float(jnp.sum(s * (inner | pattern.spread(jnp.array(flags).reshape(2, 2)))))
            for flags in itertools.product([False, True], repeat=4)
            if sum(flags) == count
        )
        kept = project(pattern, s, sparsity).keep
        np.testing.assert_allclose(jnp.sum(s * kept), best, rtol=1e-6)
        np.testing.assert_allclose(kept.mean(), 1 - sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_every_target_between_dense_and_half_is_met_to_half_a_tile(sparsity):
    pattern, s = fh.Tiles(4), scores(1, (16, 32))
    kept = float(project(pattern, s, sparsity).keep.mean())
    assert abs(kept - (1 - sparsity)) <= pattern.granularity(s.shape) / 2 + 1e-6


def test_tiles_differ_in_width_and_pack_exactly():
    s = scores(2)
    support = project(fh.Tiles((4, 8)), s, 0.375)
    assert sorted(support.regions.dense_end.tolist()) == [0, 8]
    plan = fh.Plan(jnp.where(support.keep, s, 0), support, jnp.float32(1))
    fh.verify(plan)
    np.testing.assert_array_equal(fh.kernels.unpack(fh.kernels.pack(plan)), plan.weight)


def test_a_dense_tile_may_become_sparse_and_never_the_reverse():
    pattern = fh.Tiles((4, 8))
    support = project(pattern, scores(3), 0.0)
    for step, sparsity in enumerate((0.125, 0.25, 0.375, 0.5)):
        after = project(pattern, scores(step + 4), sparsity, support)
        assert not np.any(after.keep & ~support.keep)
        np.testing.assert_allclose(after.keep.mean(), 1 - sparsity)
        support = after


def test_the_text_form_says_tile_and_inner():
    assert parse("tiles:tile=64,inner=4:8") == fh.Tiles(64, fh.NM(4, 8))
    assert fh.Tiles((64, 64)) == fh.Tiles(64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "tile=0: need one positive integer"),
        (((8, 6),), "m=4 .* does not divide its 6 columns"),
        ((8, fh.NM(4, 4)), "need NM"),
    ],
)
def test_a_tile_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fh.Tiles(*arguments)


def test_a_weight_that_the_tile_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match=r"w: out=12 is not a multiple of tile rows"):
        fh.Tiles(8).check((12, 16), 0.25, "w")
    with pytest.raises(ValueError, match=r"outside \[0, 0.5\]"):
        fh.Tiles(8).check((16, 16), 0.75, "w")
