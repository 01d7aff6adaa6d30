"""Shrinking an earlier support: methods that move weights choose again inside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import gram
from tests.cases import weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)
STAGES = {
    fh.Unstructured(): (0.4, 0.7),
    fh.FlexHiNM(8, permute=None): (0.25, 0.6),
}
METHODS = {
    "sparsegpt": fh.SparseGPT,
    "alps": fh.ALPS,
    "refine_mask": lambda pattern: fh.RefineMask(fh.Wanda(pattern)),
}


def shrunk(method, stages):
    """The states of both stages, the second inside the first."""
    first = method.solve(KEY, weight(), correlated(), sparsity=stages[0])
    second = method.solve(KEY, weight(), correlated(), sparsity=stages[1], prev=first)
    return first, second


def refitted_error(pattern, state, sparsity):
    """Error of the support that the scores of dense weights shrink to, refitted."""
    scores = jnp.square(weight()) * jnp.diag(correlated().gram)
    return refit(pattern.project(KEY, scores, sparsity, state.fixed["support"]))


def refit(support):
    """(error, support) with the least-squares weights."""
    task = gram.problem(weight(), correlated(), damp=0.01)
    b = jnp.where(support.keep, task.weight, 0)
    b = gram.refit(b, support.keep, task.gram, task.cross, 10)
    return float(gram.error(b, task)), support


@pytest.mark.parametrize("pattern", STAGES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", METHODS)
def test_the_kept_set_shrinks_to_a_better_one_than_scores_give(name, pattern):
    method, stages = METHODS[name](pattern), STAGES[pattern]
    first, second = shrunk(method, stages)
    before, after = (s.fixed["support"] for s in (first, second))
    assert not (after.keep & ~before.keep).any()
    fh.verify(method.decide(second, weight()))
    plain, support = refitted_error(pattern, first, stages[1])
    assert after.keep.sum() == support.keep.sum()
    assert (after.keep != support.keep).any()
    if name != "sparsegpt":
        assert float(second.fixed["error"]) < plain
        return
    # A sweep leaves the weights short of the least-squares ones: compare the supports.
    assert refit(after)[0] < plain


@pytest.mark.parametrize(
    "pattern", [fh.NM(2, 4), fh.Transposable(2, 4)], ids=lambda p: type(p).__name__
)
def test_where_nothing_is_left_to_choose_the_support_stays(pattern):
    method = fh.ALPS(pattern)
    first, second = shrunk(method, (None, None))
    np.testing.assert_array_equal(
        first.fixed["support"].keep, second.fixed["support"].keep
    )
    assert int(second.fixed["steps"]) == 0 and bool(second.fixed["settled"])
    # The weights are fitted on by two more steps: closer to their least squares.
    before, after = float(first.fixed["error"]), float(second.fixed["error"])
    assert after <= before and after == pytest.approx(before, rel=1e-3)
