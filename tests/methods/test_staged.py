import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods.staged import StagedALPS
from flexhinm_jax.types import Stats

KEY = jax.random.key(0)


def layer(o=64, i=64, tokens=1024):
    """A matrix and the statistics of correlated inputs of unequal size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, 16)) @ rng.standard_normal((16, i)) / 4
    x = (x + 0.5 * rng.standard_normal(x.shape)) * np.exp(0.5 * rng.standard_normal(i))
    x = jnp.asarray(x, jnp.float32)
    w = jnp.asarray(rng.standard_normal((o, i)) / np.sqrt(i), jnp.float32)
    gram = x.T @ x
    count = jnp.asarray(tokens, jnp.float32)
    return w, Stats(sq_norm=jnp.diag(gram), mean=x.mean(0), count=count, gram=gram)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [fh.HiNM(16), fh.FlexHiNM(16)], ids=str)
def test_choosing_the_columns_first_loses_less_than_a_score(pattern):
    w, stats = layer()
    errors = []
    for method in (fh.ALPS(pattern), StagedALPS(pattern)):
        state = method.solve(KEY, w, stats, sparsity=0.75)
        plan = method.decide(state, w)
        fh.verify(plan)
        assert float(plan.support.keep.mean()) == 0.25
        errors.append(float(state.fixed["error"]))
    assert errors[1] < errors[0]


def test_patterns_without_tiles_are_solved_by_alps():
    w, stats = layer()
    for pattern in (fh.NM(2, 4), fh.Vector(16)):
        target = None if isinstance(pattern, fh.NM) else 0.5
        got, want = (
            m.decide(m.solve(KEY, w, stats, sparsity=target), w).weight
            for m in (StagedALPS(pattern), fh.ALPS(pattern))
        )
        np.testing.assert_array_equal(got, want)
