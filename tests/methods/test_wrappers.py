"""Refit and RefineMask around other methods, and the text form of methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import methods
from flexhinm_jax.types import BlockDiagonal
from tests.cases import weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)
NM = fh.NM(2, 4)


def solve(method, sparsity=None):
    state = method.solve(KEY, weight(), correlated(), sparsity=sparsity)
    return state, method.decide(state, weight())


def error(method, sparsity=None):
    return float(solve(method, sparsity)[0].fixed["error"])


def test_refit_keeps_the_support_and_lowers_the_error():
    inner = fh.Wanda(NM)
    state, plan = solve(fh.Refit(inner))
    np.testing.assert_array_equal(plan.support.keep, solve(inner)[1].support.keep)
    assert state.fixed["error"] < error(fh.Refit(inner, steps=0)) * 0.7
    assert error(fh.Refit(inner, steps=30)) <= error(fh.Refit(inner, steps=3))


def test_no_step_leaves_the_inner_weights():
    _, plan = solve(fh.Refit(fh.Wanda(NM), steps=0))
    np.testing.assert_allclose(plan.weight, solve(fh.Wanda(NM))[1].weight, rtol=1e-6)


def test_refining_with_dense_weights_moves_no_weight():
    _, plan = solve(fh.RefineMask(fh.Wanda(NM), weights="dense"))
    kept = np.asarray(plan.support.keep)
    np.testing.assert_array_equal(np.asarray(plan.weight)[kept], weight()[kept])
    assert (kept != solve(fh.Wanda(NM))[1].support.keep).any()


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (NM, None),
        pytest.param(fh.NM(8, 16), None, marks=pytest.mark.slow),
        (fh.Transposable(2, 4), None),
        pytest.param(fh.Unstructured(), 0.5, marks=pytest.mark.slow),
        (fh.FlexHiNM(8, permute=None), 0.6),
    ],
    ids=str,
)
def test_refining_lowers_the_error_of_any_pattern(pattern, sparsity):
    inner = fh.Wanda(pattern)
    plain = error(fh.Refit(inner, steps=0), sparsity)
    dense = error(fh.RefineMask(inner, weights="dense"), sparsity)
    moved = error(fh.RefineMask(inner, sweeps=8), sparsity)
    assert moved < dense < plain
    assert moved < error(fh.Refit(inner, steps=40), sparsity)


def test_a_vector_support_has_nothing_to_refine():
    inner = fh.Wanda(fh.Vector(8))
    method = fh.RefineMask(inner)
    _, plan = solve(method, 0.6)
    np.testing.assert_array_equal(plan.support.keep, solve(inner, 0.6)[1].support.keep)


@pytest.mark.slow
def test_the_descent_reaches_the_published_toy_error():
    errors = []
    for seed in range(2):
        keys = jax.random.split(jax.random.key(seed), 4)
        w = jax.random.normal(keys[0], (64, 64))
        mix = jnp.eye(64) + 0.25 * jax.random.normal(keys[1], (64, 64))
        x = jax.random.normal(keys[2], (512, 64)) @ mix
        x = x * jnp.exp(0.5 * jax.random.normal(keys[3], (64,)))
        h = x.T @ x / 512
        s = fh.Stats(jnp.diag(h), x.mean(0), jnp.float32(512), gram=h)
        method = fh.RefineMask(fh.Wanda(NM), weights="dense", sweeps=12)
        state = method.solve(KEY, w, s)
        delta = jnp.where(state.fixed["support"].keep, 0, w)
        errors.append(jnp.sum(delta @ h * delta) / jnp.sum(w @ h * w))
    # 0.0552 with other draws; learned masks end at 0.0565.
    assert float(np.mean(errors)) < 0.0585


def test_wrappers_nest_and_share_the_pattern():
    method = fh.Refit(fh.RefineMask(fh.SparseGPT(NM)), steps=3)
    assert method.pattern == NM and method.needs == "gram"
    assert error(method) < error(fh.SparseGPT(NM))
    fh.verify(solve(method)[1])


def test_a_pattern_stands_for_wanda():
    assert fh.Refit(NM) == fh.Refit(fh.Wanda(NM))


def test_the_text_form_nests():
    assert methods.parse("refit(ria)", NM) == fh.Refit(fh.RIA(NM))
    nested = methods.parse("refit(refine_mask(alps))", NM)
    assert nested == fh.Refit(fh.RefineMask(fh.ALPS(NM)))
    assert methods.parse("refit", NM) == fh.Refit(fh.Wanda(NM))


def test_options_follow_the_name():
    assert methods.parse("alps:damp=0.1,growth=(1.5,1.2,1.1)", NM) == fh.ALPS(
        NM, damp=0.1, growth=(1.5, 1.2, 1.1)
    )
    assert methods.parse("refit(ria:a=1):steps=3", NM) == fh.Refit(
        fh.RIA(NM, a=1), steps=3
    )
    start = fh.Refit(fh.RIA(NM, a=1))
    assert methods.parse("armor:start=refit(ria:a=1),block=8", NM) == fh.ARMOR(
        NM, start=start, block=8
    )
    assert methods.parse("armor:start=None,steps=None", NM) == fh.ARMOR(NM)
    assert methods.parse("permllm:scores=ria", NM) == fh.PermLLM(NM, scores="ria")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alps:dmp=1", r"'dmp=1'; it takes damp=, .*did you mean 'damp'"),
        ("alps:damp", r"unknown option 'damp'; it takes damp=,"),
        ("wanda:a=1", "it takes no options"),
        ("refit:inner=ria", "unknown option 'inner=ria'"),
        ("alps:damp=much", r"'alps:damp=much': ALPS: damp='much': need a number"),
        ("sparsegpt:mask=last", "choose 'adaptive' or 'first'"),
        ("armor:start=nope", "unknown method 'nope'"),
    ],
)
def test_an_option_that_does_not_fit_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(text, NM)


@pytest.mark.parametrize("text", ["", "nope", "refit(nope)", "refit(wanda", "refit)"])
def test_unknown_names_list_the_known_ones(text):
    with pytest.raises(ValueError, match=r"known: magnitude, wanda.*refit"):
        methods.parse(text, NM)


def test_only_wrappers_take_a_method():
    with pytest.raises(ValueError, match="wanda does not wrap"):
        methods.parse("wanda(alps)", NM)
    with pytest.raises(ValueError, match="Refit wraps a method"):
        fh.Refit("wanda")


def test_block_diagonal_factors_are_refused_by_name():
    @dataclasses.dataclass(frozen=True)
    class Wrapped(fh.Magnitude):
        def decide(self, state, w, *, key=None):
            plan = super().decide(state, w, key=key)
            left = BlockDiagonal(jnp.eye(16)[None])
            return dataclasses.replace(plan, left=left)

    with pytest.raises(ValueError, match="without block-diagonal factors; Wrapped"):
        solve(fh.Refit(Wrapped(NM)))
