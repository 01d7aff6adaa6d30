"""A product sees the tokens of the branch or the turn in which it runs, and no others.

What every weight multiplied is counted here in NumPy, token by token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from tests.tracing.cases import assert_close, normal

BIG = np.where(np.arange(8) % 2 == 0, 10.0, 0.1).astype(np.float32)
X = np.concatenate([normal(5, 8) * BIG, normal(7, 8) / BIG])
TO = np.repeat([0, 1], [5, 7]).astype(np.int32)
W = {name: normal(8, 8) for name in ("one", "two", "three")}


def gathered(apply_fn, params, *args):
    uses = discover(apply_fn, params, *args)
    return calibrate(apply_fn, params, uses, [args])


def check(stats, truth):
    """Path -> the tokens that the weight multiplied, [t, i]."""
    assert set(stats) == set(truth)
    for path, tokens in truth.items():
        tokens = np.asarray(tokens, np.float32).reshape(-1, 8)
        assert float(stats[path].count) == len(tokens), path
        assert_close(stats[path].gram, tokens.T @ tokens)
        assert_close(stats[path].mean * max(len(tokens), 1), tokens.sum(0))


def test_experts_of_a_switch_see_their_own_tokens():
    def apply_fn(p, x, to):
        branches = [lambda v, w=w: v @ p[w] for w in ("one", "two", "three")]
        return lax.map(lambda t: lax.switch(t[1], branches, t[0]), (x, to))

    truth = {"one": X[TO == 0], "two": X[TO == 1], "three": X[:0]}
    check(gathered(apply_fn, W, X, TO), truth)


def test_a_layer_that_always_runs_keeps_its_tokens_beside_a_routed_one():
    def apply_fn(p, x):
        def one(v):
            routed = lax.cond(v[0] > 0, lambda v: v @ p["one"], jnp.zeros_like, v)
            return routed + v @ p["two"]

        return lax.map(one, x) @ p["three"]

    y = np.where(X[:, :1] > 0, X @ W["one"], 0) + X @ W["two"]
    truth = {"one": X[X[:, 0] > 0], "two": X, "three": y}
    check(gathered(apply_fn, W, X), truth)


def test_one_weight_in_two_branches_sees_the_tokens_of_both():
    def apply_fn(p, x, to):
        def one(t):
            v, k = t
            branches = [
                lambda v: v @ p["one"],
                lambda v: jnp.tanh(v @ p["one"]) @ p["two"],
                lambda v: v @ p["three"],
            ]
            return lax.switch(k, branches, v)

        return lax.map(one, (x, to))

    hidden = np.tanh(X[TO == 1] @ W["one"])
    check(gathered(apply_fn, W, X, TO), {"one": X, "two": hidden, "three": X[:0]})


def test_a_weight_outside_and_inside_a_branch_counts_both():
    def apply_fn(p, x):
        inside = lambda x: x @ p["one"] + x @ p["two"]  # noqa: E731
        return x @ p["one"] + lax.cond(x[0, 0] > 1e9, inside, jnp.zeros_like, x)

    pair = {name: W[name] for name in ("one", "two")}
    check(gathered(apply_fn, pair, X), {"one": X, "two": X[:0]})


def test_loops_over_one_value_count_their_own_turns():
    def apply_fn(p, x):
        def add(name, turns):
            step = lambda h, _: (h + x @ p[name], None)  # noqa: E731
            return lax.scan(step, jnp.zeros_like(x), None, length=turns)[0]

        once = x @ p["three"]
        return add("one", 2) + add("two", 3) + once

    truth = {"one": [X] * 2, "two": [X] * 3, "three": X}
    check(gathered(apply_fn, W, X), truth)


def test_nested_bodies_are_told_apart():
    def apply_fn(p, x, to):
        def inner(k, v):
            return lax.cond(k > 0, lambda v: v @ p["two"], lambda v: v @ p["three"], v)

        def outer(t):
            v, k = t
            return lax.map(lambda _: inner(k, v), jnp.zeros(2)).sum(0) + v @ p["one"]

        return lax.map(outer, (x, to))

    twice = lambda x: np.repeat(x, 2, axis=0)  # noqa: E731
    truth = {"one": X, "two": twice(X[TO == 1]), "three": twice(X[TO == 0])}
    check(gathered(apply_fn, W, X, TO), truth)


@pytest.mark.parametrize("also", [False, True])
def test_a_weight_in_the_condition_of_a_loop_sees_every_test(also):
    """Four turns, so five tests; the body may use the same weight."""

    def apply_fn(p, x):
        def going(c):
            return (c[0] < 4) & ((c[1] @ p["one"]).sum() > -1e9)

        def turn(c):
            h = jnp.sin(c[1])
            return c[0] + 1, h + (h @ p["one"] if also else 0)

        return lax.while_loop(going, turn, (0, x))[1]

    h, seen = X, [X]
    for _ in range(4):
        h = np.sin(h)
        if also:
            seen.append(h)
            h = h + h @ W["one"]
        seen.append(h)
    check(gathered(apply_fn, {"one": W["one"]}, X), {"one": seen})


TURNS = np.array([2, 0, 3, 1, 0, 3, 1, 1, 2, 0, 1, 4], np.int32)


def turning(also):
    """Every row of x through "one" as often as it says, "two" behind the loop."""

    def row(p, h, n):
        def going(c):
            return (c[0] < n) & ((c[1] @ p["one"]).sum() > -1e9 if also else True)

        return lax.while_loop(going, lambda c: (c[0] + 1, jnp.sin(c[1] @ p["one"])), h)

    def apply_fn(p, x, turns):
        return jax.vmap(lambda h, n: row(p, (0, h), n)[1])(x, turns) @ p["two"]

    return apply_fn


def turned(also, kept=None):
    """What the weights of `turning` multiply, of the rows that are kept."""
    seen = {"one": [], "two": []}
    for h, n, counts in zip(
        X, TURNS, np.ones(12) if kept is None else kept, strict=True
    ):
        for _ in range(n):
            seen["one"] += [h] * (1 + also) * bool(counts)
            h = np.sin(h @ W["one"])
        seen["one"] += [h] * also * bool(counts)
        seen["two"] += [h] * bool(counts)
    return seen


@pytest.mark.parametrize("also", [False, True])
def test_rows_that_end_a_loop_one_by_one_are_seen_as_often_as_they_turn(also):
    apply_fn, params = turning(also), {name: W[name] for name in ("one", "two")}
    check(gathered(apply_fn, params, X, TURNS), turned(also))
    uses = discover(apply_fn, params, X, TURNS)
    kept = np.arange(12) % 3 != 0
    mask = lambda x, turns: kept  # noqa: E731
    stats = calibrate(apply_fn, params, uses, [(X, TURNS)], token_mask=mask)
    check(stats, turned(also, kept))


@pytest.mark.parametrize("also", [False, True])
def test_rows_that_end_a_loop_one_by_one_meet_packed_weights(also):
    apply_fn, params = turning(also), {name: W[name] for name in ("one", "two")}
    method = fh.Wanda(fh.NM(2, 4))
    done = fh.prune(apply_fn, params, [(X, TURNS)], method, key=jax.random.key(0))
    want = jax.jit(apply_fn)(done.params, X, TURNS)
    assert_close(jax.jit(fh.sparsify(apply_fn))(done.packed, X, TURNS), want)
    folded = X.reshape(3, 4, 8), TURNS.reshape(3, 4)  # a loop under two vmaps
    twice = lambda p, x, n: jax.vmap(apply_fn, (None, 0, 0))(p, x, n)  # noqa: E731
    got = fh.sparsify(twice)(done.packed, *folded)
    assert_close(got.reshape(12, 8), want)
    check(gathered(twice, params, *folded), turned(also))
