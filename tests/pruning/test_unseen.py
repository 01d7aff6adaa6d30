"""Weights that saw nothing, and weights of extreme size, under every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.pruning.statistics import unseen
from flexhinm_jax.types import Plan, Stats

KEY = jax.random.key(3)
NM = fh.NM(2, 4)
W = jax.random.normal(jax.random.key(0), (3, 8, 8))
X = jax.random.normal(jax.random.key(1), (20, 8))
TO = jnp.arange(20) % 2
METHODS = [
    fh.Wanda(NM),
    fh.SparseGPT(NM),
    fh.ALPS(NM),
    fh.RefineMask(fh.Wanda(NM)),
    fh.NoWagP(NM),
]


def experts(params, x, to):
    """Three experts by capacity: the last never gets a token."""
    own = jnp.einsum("td,te->etd", x, jax.nn.one_hot(to, 3))
    return jnp.einsum("etd,edh->eth", own, params["up"]).sum(0)


def two_of_four(w):
    """bool, by magnitude along the inputs of [i, o], by NumPy."""
    groups = np.abs(np.asarray(w)).T.reshape(-1, 4)
    rank = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1)
    return (rank < 2).reshape(w.shape[1], w.shape[0]).T


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_expert_without_tokens_keeps_its_largest_weights(method, caplog):
    params = {"up": W}
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        result = fh.prune(experts, params, [(X, TO)], method, key=KEY)
    last, keep = np.asarray(result.params["up"][2]), two_of_four(W[2])
    np.testing.assert_array_equal(last != 0, keep)
    np.testing.assert_allclose(last, np.where(keep, W[2], 0), rtol=1e-5)
    said = [r.getMessage() for r in caplog.records]
    assert any(
        s.startswith("up: no calibration input reached matrices 2 ") for s in said
    )
    row = result.report.rows[0]
    assert row.unseen == 1 and 0.5 < row.retained < 0.99


@pytest.mark.parametrize("target", ["seq", "asym"])
def test_in_one_pass_too(target):
    def apply_fn(params, x, to):
        return experts(params, jnp.tanh(x @ params["first"]), to)

    params = {"first": W[0], "up": W}
    result = fh.prune_sequential(
        apply_fn, params, [(X, TO)], fh.SparseGPT(NM), key=KEY, target=target
    )
    np.testing.assert_array_equal(result.params["up"][2] != 0, two_of_four(W[2]))
    assert {row.path: row.unseen for row in result.report.rows} == {"first": 0, "up": 1}


def test_a_branch_that_never_ran_is_pruned_by_magnitude():
    def apply_fn(params, x):
        return jax.lax.cond(
            x.sum() > 1e9, lambda x: x @ params["a"], lambda x: x @ params["b"], x
        )

    params = {"a": W[0], "b": W[1]}
    result = fh.prune(apply_fn, params, [X], fh.SparseGPT(NM), key=KEY)
    np.testing.assert_array_equal(result.params["a"] != 0, two_of_four(W[0]))
    assert {row.path: row.unseen for row in result.report.rows} == {"a": 1, "b": 0}


def test_what_no_input_reached_is_told_from_small_inputs():
    def stats(x):
        x = np.asarray(x, np.float32)
        return Stats((x**2).sum(-2), x.mean(-2), np.full(x.shape[:-2], x.shape[-2]))

    x = np.ones((3, 4, 8))
    x[1], x[2] = 0, 1e-25
    np.testing.assert_array_equal(unseen(stats(x)), [False, True, True])
    assert not unseen(stats(1e-15 * np.ones((4, 8))))
    none = Stats(np.ones(8), np.zeros(8), np.zeros(()))
    assert unseen(none)


def linear(params, x):
    return x @ params["w"]


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
@pytest.mark.parametrize(
    "method", [*METHODS, fh.Refit(fh.Wanda(NM))], ids=lambda m: type(m).__name__
)
def test_weights_of_extreme_size_are_pruned_like_ordinary_ones(method, scale):
    for run in (fh.prune, fh.prune_sequential):
        plain = run(linear, {"w": W[0]}, [X], method, key=KEY)
        large = run(linear, {"w": W[0] * scale}, [X], method, key=KEY)
        np.testing.assert_allclose(
            np.asarray(large.params["w"]) / scale,
            plain.params["w"],
            rtol=1e-5,
            atol=1e-6,
        )
        got, want = large.report.total["retained"], plain.report.total["retained"]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_states_of_extreme_weights_can_be_solved_on():
    params = {"w": W[0] * 2.0**90}
    uses = fh.discover(linear, params, X)
    stats = fh.calibrate(linear, params, uses, [X])
    method = fh.SparseGPT(fh.Unstructured())
    few = fh.solve(method, KEY, params, uses, stats, 0.25)
    many = fh.solve(method, KEY, params, uses, stats, 0.75, prev=few)
    keep = [fh.decide(method, s, params, uses)["w"].support.keep for s in (few, many)]
    assert not (keep[1] & ~keep[0]).any()


@pytest.mark.parametrize(
    "method", [fh.Magnitude(NM), *METHODS], ids=lambda m: type(m).__name__
)
def test_what_is_solved_in_a_trace_is_what_is_solved_outside(method):
    sizes = jnp.array([1.0, 2.0**90, 1.0])[:, None, None]
    params = {"up": W * sizes}  # the last sees no token
    uses = fh.discover(experts, params, X, TO)
    stats = fh.calibrate(experts, params, uses, [(X, TO)])

    def pruned(params, stats):
        states = fh.solve(method, KEY, params, uses, stats)
        return fh.densify(fh.decide(method, states, params, uses), params, uses)

    want, got = pruned(params, stats)["up"], jax.jit(pruned)(params, stats)["up"]
    np.testing.assert_array_equal(got != 0, want != 0)
    np.testing.assert_allclose(got / sizes, want / sizes, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[2] != 0, two_of_four(W[2]))


def test_a_plan_that_is_not_finite_names_leaf_and_method(monkeypatch):
    def broken(self, state, w, *, key=None):
        support = state.fixed["support"]
        return Plan(w / 0, support, state.fixed["retained"])

    monkeypatch.setattr(fh.Wanda, "decide", broken)
    for run in (fh.prune, fh.prune_sequential):
        with pytest.raises(ValueError, match="w: Wanda gave NaN or infinite weights"):
            run(linear, {"w": W[0]}, [X], fh.Wanda(fh.NM(1, 4)), key=KEY)


def test_budgets_and_shared_orders_see_unseen_weights_too():
    params = {"up": W}
    uses = fh.discover(experts, params, X, TO)
    stats = fh.calibrate(experts, params, uses, [(X, TO)])
    method = fh.Wanda(fh.Vector(4))
    one = fh.budgets(method, params, uses, stats, 0.5, mode="global")
    assert one == {"up": 0.5}
    result = fh.prune(
        experts, params, [(X, TO)], fh.Wanda(NM), key=KEY, share_orders=True
    )
    assert (np.asarray(result.params["up"]) == 0).mean() == 0.5


def test_a_layer_that_saw_nothing_keeps_its_share_of_a_common_budget():
    def apply_fn(params, x):
        return jax.lax.cond(
            x.sum() > 1e9, lambda x: x @ params["a"], lambda x: x @ params["b"], x
        )

    params = {"a": W[0], "b": W[0]}
    uses = fh.discover(apply_fn, params, X)
    stats = fh.calibrate(apply_fn, params, uses, [X])
    method = fh.Wanda(fh.Vector(4))
    found = fh.budgets(method, params, uses, stats, 0.5, mode="global")
    assert abs(found["a"] - 0.5) < 0.2 and abs(found["b"] - 0.5) < 0.2
