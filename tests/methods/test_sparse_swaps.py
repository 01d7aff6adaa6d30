"""SparseSwaps against enumeration of all swaps in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.ops import descent, gram, masks
from tests.cases import PATTERNS, weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)
SPARSITY = {"unstructured": 0.6, "flexhinm": 0.6, "hinm": 0.75, "tiles": 0.3}
EVERY = PATTERNS | {
    "hinm": fh.HiNM(8, permute=None),
    "tiles": fh.Tiles((4, 8)),
    "transposable": fh.Transposable(2, 4),
    "8:16": fh.NM(8, 16),
}


class Exact:
    """Errors of the rows of supports, with the dense weights, in float64."""

    def __init__(self, method):
        task = gram.problem(weight(), correlated(), damp=method.damp)
        self.w, self.h = (np.asarray(x, np.float64) for x in (task.weight, task.gram))

    def row(self, row, keep):
        lost = np.where(keep, 0, self.w[row])
        return lost @ self.h @ lost


def moved(keep, *pairs):
    keep = keep.copy()
    for pair in pairs:
        keep[list(pair)] = keep[list(pair)][::-1]
    return keep


def places(support):
    """Columns within which every row may swap: [(row, columns)]."""
    keep, given = np.asarray(support.keep), support.regions
    if given is None:
        return [(row, range(keep.shape[1])) for row in range(len(keep))]
    rows = np.asarray(given.out_order).reshape(len(given.in_order), -1)
    return [
        (row, group)
        for t, order in enumerate(np.asarray(given.in_order))
        for group in order[given.dense_end[t] : given.nm_end[t]].reshape(-1, given.m)
        for row in rows[t]
    ]


def plan(method, name):
    state = method.solve(KEY, weight(), correlated(), sparsity=SPARSITY.get(name))
    return method.decide(state, weight())


@pytest.mark.parametrize("name", [n for n in EVERY if n != "transposable"])
def test_no_swap_that_the_pattern_allows_lowers_the_error(name):
    method = fh.SparseSwaps(fh.Wanda(EVERY[name]))
    p, exact = plan(method, name), Exact(method)
    fh.verify(p)
    keep = np.asarray(p.support.keep)
    np.testing.assert_array_equal(np.asarray(p.weight)[keep], weight()[keep])
    before = np.asarray(plan(method.inner, name).support.keep)
    better = 0
    for row, group in places(p.support):
        now = exact.row(row, keep[row])
        better += now < exact.row(row, before[row]) * 0.99
        for q, j in itertools.product(group, group):
            if keep[row, q] and not keep[row, j]:
                assert exact.row(row, moved(keep[row], (q, j))) > now * (1 - 1e-4)
    assert better


def test_no_exchange_in_a_transposable_tile_lowers_the_error():
    method = fh.SparseSwaps(fh.Wanda(EVERY["transposable"]))
    p, exact = plan(method, "transposable"), Exact(method)
    keep = np.asarray(p.support.keep)
    minors = 0
    for top, left in itertools.product(range(0, 16, 4), range(0, 32, 4)):
        rows = itertools.permutations(range(top, top + 4), 2)
        columns = itertools.combinations(range(left, left + 4), 2)
        for (a, b), (q, j) in itertools.product(rows, columns):
            if keep[a, q] and not keep[a, j] and keep[b, j] and not keep[b, q]:
                now = exact.row(a, keep[a]) + exact.row(b, keep[b])
                then = [exact.row(r, moved(keep[r], (q, j))) for r in (a, b)]
                assert sum(then) > now * (1 - 1e-4)
                minors += 1
    assert minors > 100


@pytest.mark.parametrize("solve", [False, True])
def test_a_look_at_a_row_makes_the_swaps_of_brute_force(solve):
    """Every kept weight in turn: tries all partners, takes the best that gains."""
    task = gram.problem(weight(), correlated(), damp=0.01)
    cut = lambda x: x[:, :8]  # noqa: E731
    w, h = cut(task.weight), task.gram[:8, :8]
    g = gram.dot(w, h)
    keep = masks.top_k(jnp.abs(w), jnp.full((16, 1), 4, jnp.int32))
    start = jnp.where(keep, w, 0)
    fit = descent.Fit(start, keep, jnp.ones_like(keep), w, h, g)
    b, kept = descent.swap_rows(fit, solve=solve)
    w, h, got = (np.asarray(x, np.float64) for x in (w, h, b))
    error = lambda row, x: (x - w[row]) @ h @ (x - w[row])  # noqa: E731
    swaps = 0
    for row in range(16):
        x, on = np.asarray(start[row], np.float64), np.asarray(keep[row]).copy()
        for q in range(8):
            if not on[q]:
                continue
            trials = []
            for j in np.flatnonzero(~on):
                trial = np.where(np.arange(8) == q, 0, x)
                pull = (w[row] - trial) @ h[j]
                trial[j] = pull / h[j, j] if solve else w[row, j]
                trials.append((error(row, trial), j, trial))
            least, j, trial = min(trials, key=lambda t: t[0])
            if least < error(row, x) * (1 - 1e-5):
                x, swaps = trial, swaps + 1
                on[[q, j]] = False, True
        np.testing.assert_array_equal(kept[row], on)
        np.testing.assert_allclose(got[row], x, rtol=1e-4, atol=1e-5)
    assert swaps > 8


def test_the_error_falls_with_every_look():
    inner, errors = fh.Wanda(EVERY["unstructured"]), []
    for sweeps in (0, 1, 100):
        method = fh.SparseSwaps(inner, sweeps=sweeps)
        state = method.solve(KEY, weight(), correlated(), sparsity=0.6)
        errors.append(float(state.fixed["error"]))
    assert errors[0] > errors[1] > errors[2]


def test_it_is_refine_mask_with_the_dense_weights():
    pattern = EVERY["flexhinm"]
    one = plan(fh.SparseSwaps(fh.Wanda(pattern)), "flexhinm")
    other = fh.RefineMask(fh.Wanda(pattern), sweeps=100, weights="dense")
    np.testing.assert_array_equal(one.weight, plan(other, "flexhinm").weight)
