import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import encoder
from tests.train.small import CONFIG, LISTS, RECIPE
from train.lab.recovery import Gates, Recovery


@pytest.fixture(scope="module")
def models():
    """(dense, pruned): half of the weights of every matrix are gone."""
    dense = encoder.init(jax.random.key(0), CONFIG)

    def embed(params, tokens):
        return encoder.embed(params, tokens, jnp.ones_like(tokens), CONFIG)

    method, tokens = fh.Magnitude(fh.NM(2, 4)), np.array(LISTS[:4], np.int32)
    return dense, fh.prune(embed, dense, [tokens], method, key=jax.random.key(1))


def test_the_student_comes_closer_and_its_pruned_weights_stay_zero(models):
    dense, pruned = models
    run = Recovery(dense, pruned, LISTS, CONFIG, RECIPE, fh.Duration(60))
    cosines = [row["cosine"] for row in run]
    assert len(cosines) == 60 and run.moved is None
    assert np.mean(cosines[-6:]) > np.mean(cosines[:6]) + 0.02
    after = run.params()
    for path, plan in run.plans().items():
        fh.verify(plan, path=path)
        np.testing.assert_array_equal(after[path], plan.weight)
        assert np.any(np.asarray(after[path] != pruned.params[path]))
    for name in dense:
        if name.startswith("embeddings"):
            assert np.all(np.asarray(after[name] == dense[name]))


GATED = dataclasses.replace(CONFIG, num_hidden_layers=1)
PATTERN = fh.HiNM(8, permute=None)


@pytest.mark.slow
def test_gates_exchange_weights_and_the_result_obeys_the_pattern():
    dense = encoder.init(jax.random.key(0), GATED)
    tokens = np.array(LISTS[:4], np.int32)

    def embed(params, tokens):
        return encoder.embed(params, tokens, jnp.ones_like(tokens), GATED)

    start = fh.prune(
        embed,
        dense,
        [tokens],
        fh.Magnitude(PATTERN),
        sparsity=0.75,
        key=jax.random.key(1),
    )
    gates = Gates(share=0.5, rate=0.2), PATTERN
    run = Recovery(dense, start, LISTS, GATED, RECIPE, fh.Duration(8), gates)
    rows = [row for row in run if row["kind"] == "step"]
    assert "temperature" in rows[0] and "temperature" not in rows[-1]
    assert [row["stage"] for row in rows] == [0] * 4 + [1] * 4
    assert run.moved is not None and 0 < run.moved < 1
    after = run.params()
    for path, plan in run.plans().items():
        fh.verify(plan, path=path)
        before = start.plans[path].support
        weight, keep = np.asarray(after[path]), np.asarray(plan.support.keep)
        assert not weight[~keep].any()
        assert keep.sum() == np.asarray(before.keep).sum()
        # Gates choose inside the columns that the start chose.
        assert plan.support.regions is not None and before.regions is not None
        np.testing.assert_array_equal(
            np.asarray(plan.support.regions.nm_end), np.asarray(before.regions.nm_end)
        )


def test_a_share_outside_its_range_is_an_error():
    with pytest.raises(ValueError, match=r"share=0 must be in \(0, 1\]"):
        Gates(share=0)
