"""Statistics are streamed, shared, merged and checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.pruning.statistics import (
    MIN_BANDED_WIDTH,
    calibrate,
    statistics_bytes,
    symmetric,
    upper,
)
from flexhinm_jax.tracing.discover import discover
from tests.tracing.cases import CASES, assert_close, normal, rows

X = normal(4, 3, 8)
P = {"q": normal(8, 6), "k": normal(8, 6), "o": normal(6, 8)}


def attention(p, x):
    return ((x @ p["q"]) * (x @ p["k"])) @ p["o"]


def test_leaves_of_one_input_share_the_same_arrays():
    uses = discover(attention, P, X)
    stats = calibrate(attention, P, uses, [X])
    assert stats["q"].gram is stats["k"].gram
    assert stats["o"].gram.shape == (6, 6)
    assert statistics_bytes(uses) == 4 * (64 + 8 + 1 + 36 + 6 + 1)
    assert statistics_bytes(uses, gram=False) == 4 * (16 + 1 + 12 + 1)


def test_batches_add_up_and_a_single_array_is_one_argument():
    uses = discover(attention, P, X)
    whole = calibrate(attention, P, uses, [X])
    halves = calibrate(attention, P, uses, iter([X[:2], (X[2:],)]))
    for path in uses.leaves:
        jax.tree.map(assert_close, halves[path], whole[path])


def test_a_constant_on_a_weight_goes_to_its_inputs():
    """A leaf on two inputs minds most where the program makes it large."""

    def twice(p, x):
        return jnp.concatenate([x @ p["w"], x[::-1] ** 2 @ (p["w"] * -100.0)])

    params = {"w": normal(8, 6)}
    x = jnp.concatenate([normal(6, 8), 2 + normal(6, 8)])
    stats = calibrate(twice, params, discover(twice, params, x), [x])["w"]
    seen = np.concatenate([x, -100.0 * x**2])
    assert stats.count == len(seen)
    assert_close(stats.gram, seen.T @ seen)
    assert_close(stats.mean, seen.mean(0))


def test_norms_alone_agree_with_the_gram():
    uses = discover(attention, P, X)
    full, norms = (calibrate(attention, P, uses, [X], gram=g) for g in (True, False))
    for path in uses.leaves:
        assert norms[path].gram is None
        assert_close(norms[path].sq_norm, full[path].sq_norm)
        assert_close(norms[path].mean, full[path].mean)


def test_the_function_is_traced_once_per_batch_shape():
    traces = []

    def counted(p, x):
        traces.append(x.shape)
        return attention(p, x)

    uses = discover(attention, P, X)
    calibrate(counted, P, uses, [X, X, X[:2], X, X[2:]])
    assert traces == [(4, 3, 8), (2, 3, 8)]


def test_a_branch_that_is_not_taken_adds_no_tokens():
    def apply_fn(p, x):
        return lax.cond(
            x.sum() > 0, lambda x: x @ p["q"], lambda x: jnp.sin(x) @ p["k"], x
        )

    uses = discover(apply_fn, P, X)
    stats = calibrate(apply_fn, P, uses, [X - X.mean() + 1, X - X.mean() - 1, X - 9])
    assert (stats["q"].count, stats["k"].count) == (12, 24)


def test_masked_tokens_do_not_count():
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    uses = discover(lambda p, x, m: attention(p, x), P, X, mask)
    padded = np.where(mask[..., None], X, np.nan)
    stats = calibrate(
        lambda p, x, m: attention(p, x),
        P,
        uses,
        [(padded, mask)],
        token_mask=lambda x, m: m,
    )
    real = X[mask]
    assert stats["q"].count == 6
    assert_close(stats["q"].gram, real.T @ real)
    assert_close(stats["q"].mean, real.mean(0))


def test_a_mask_that_is_no_prefix_of_any_tokens_is_refused():
    uses = discover(attention, P, X)
    with pytest.raises(ValueError, match=r"shape \[5\], which are no leading axes"):
        calibrate(attention, P, uses, [X], token_mask=lambda x: jnp.ones(5, bool))


def test_half_precision_inputs_are_summed_in_float32():
    x = np.full((4096, 8), 0.1, jnp.bfloat16)
    p = {"w": np.ones((8, 4), jnp.bfloat16)}
    f = lambda p, x: x @ p["w"]  # noqa: E731
    stats = calibrate(f, p, discover(f, p, x), [x])["w"]
    assert stats.gram.dtype == jnp.float32
    wide = x.astype(np.float32)
    assert_close(stats.gram, wide.T @ wide, 1e-5)


def test_more_memory_than_the_limit_is_refused_before_any_batch():
    uses = discover(attention, P, X)

    def batches():
        raise AssertionError("read a batch")
        yield

    with pytest.raises(ValueError, match="take 464 bytes, more than memory_limit=100"):
        calibrate(attention, P, uses, batches(), memory_limit=100)
    need = statistics_bytes(uses)
    calibrate(attention, P, uses, [X], memory_limit=need)


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(attention, P, discover(attention, P, X), [])


def test_a_statistic_that_is_not_finite_names_its_leaf():
    x = X.copy()
    x[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="inputs of 'q' contain NaN"):
        calibrate(attention, P, discover(attention, P, X), [x])


def test_a_batch_with_another_program_is_refused():
    def apply_fn(p, x):
        return x @ p["q"] if x.ndim == 3 else x

    uses = discover(apply_fn, P, X)
    with pytest.raises(ValueError, match="no use 0 of 'q'"):
        calibrate(apply_fn, P, uses, [X[0]])


def test_only_the_leaves_asked_for_are_calibrated():
    uses = discover(attention, P, X, rules={"^q$|^o$": "skip"})
    stats = calibrate(attention, P, uses, [X])
    assert set(stats) == {"k"}
    assert_close(stats["k"].gram, rows(X).T @ rows(X))


def test_windows_of_a_fused_projection_count_their_input_once():
    case = CASES["fused qkv"]()
    uses = discover(case.apply_fn, case.params, *case.args)
    assert len([use for use in uses if use.path == "qkv"]) == 3
    assert calibrate(case.apply_fn, case.params, uses, [case.args])["qkv"].count == 6


def test_wide_grams_are_summed_in_bands_and_are_whole():
    x = normal(2, 5, MIN_BANDED_WIDTH + 3)
    gram = symmetric(upper(jnp.asarray(x)))
    assert_close(gram, np.einsum("sti,stj->sij", x, x), 1e-4)
    np.testing.assert_array_equal(gram, np.swapaxes(gram, -1, -2))


def test_a_batch_without_rows_adds_nothing():
    uses = discover(attention, P, X)
    want = calibrate(attention, P, uses, [X])
    got = calibrate(attention, P, uses, [X[:0], X, X[:0]])
    for path in uses.leaves:
        jax.tree.map(np.testing.assert_array_equal, got[path], want[path])
    method = fh.SparseGPT(fh.NM(1, 2))
    for run in (fh.prune, fh.prune_sequential):
        pruned = [
            run(attention, P, batches, method, key=jax.random.key(0)).params
            for batches in ([X], [X, X[:0]])
        ]
        jax.tree.map(np.testing.assert_array_equal, *pruned)
