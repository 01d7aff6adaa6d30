"""The surgeon's sweep against the textbook formula, and the order of its columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.ops import elimination, gram, masks
from tests.cases import stats, weight


def reference(w, h, keep):
    """Removes weights left to right; each time all later columns take the error."""
    w, h = np.asarray(w, np.float64).copy(), np.asarray(h, np.float64)
    for row, kept in zip(w, np.asarray(keep), strict=True):
        for j in range(len(row)):
            if kept[j]:
                continue
            # Exact OBS step on the columns j.. with those before fixed.
            inverse = np.linalg.inv(h[j:, j:])
            row[j:] -= row[j] * inverse[0] / inverse[0, 0]
            row[j] = 0
    return w


@pytest.mark.parametrize(("unit", "block"), [(4, 4), (4, 12), (16, 16), (32, 32)])
def test_a_given_support_is_compensated_exactly(unit, block):
    task = gram.problem(weight(), stats(), damp=0.01)
    keep = weight(2) > 0
    wide = jnp.pad(keep, ((0, 0), (0, block)))
    solved, kept, loss = elimination.sweep(
        task.weight,
        gram.inverse_factor(task.factor),
        lambda s, first: lax.dynamic_slice_in_dim(wide, first, unit, axis=1),
        unit=unit,
        block=block,
    )
    np.testing.assert_array_equal(kept, keep)
    np.testing.assert_allclose(solved, reference(weight(), task.gram, keep), atol=2e-3)
    delta = np.asarray(solved - task.weight, np.float64)
    want = np.sum(delta @ np.asarray(task.gram, np.float64) * delta, axis=1)
    np.testing.assert_allclose(loss, want, rtol=1e-2)


def test_groups_are_chosen_on_compensated_weights():
    task = gram.problem(weight(), stats(), damp=0.01)
    u = gram.inverse_factor(task.factor)

    def choose(scores, first):
        return masks.n_of_m(scores, n=2, m=4)

    _, keep, _ = elimination.sweep(task.weight, u, choose, unit=4, block=16)
    start = masks.n_of_m(jnp.square(task.weight / jnp.diag(u)), n=2, m=4)
    assert (keep[:, :4] == start[:, :4]).all()
    assert (keep != start).any()
    assert (keep.reshape(16, 8, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.55, 0.75, 0.9])
def test_columns_go_pruned_grouped_dense_with_aligned_groups(sparsity):
    pattern = fh.FlexHiNM(8, n=2, m=4, permute=None)
    support = pattern.project(jax.random.key(0), jnp.abs(weight()), sparsity)
    order, kind = elimination.column_order(support.regions)
    for t in range(2):
        np.testing.assert_array_equal(np.sort(order[t]), np.arange(32))
        kept = support.keep[8 * t : 8 * t + 8][:, order[t]]
        chosen = np.asarray(kind[t]) == elimination.CHOSEN
        if chosen.any():
            assert np.flatnonzero(chosen)[0] % 4 == 0 and chosen.sum() % 4 == 0
        assert kept[:, kind[t] == elimination.DENSE].all()
        assert not kept[:, kind[t] == elimination.PRUNED].any()
        groups = kept[:, chosen].reshape(8, -1, 4).sum(-1)
        assert (groups == 2).all()
        assert (np.diff(np.flatnonzero(kind[t] == elimination.PRUNED)) == 1).all()
