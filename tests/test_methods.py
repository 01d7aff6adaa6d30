"""Every registered method x every pattern x every promise of the contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.io import checkpoints
from flexhinm_jax.methods import METHODS
from flexhinm_jax.pruning.apply import dense_weight
from tests.cases import MORE_PATTERNS, PATTERNS, SHAPE, stats, targets, weight

KEY = jax.random.key(7)
EVERY_PATTERN = PATTERNS | MORE_PATTERNS


def marks(method, pattern_name):
    """Two patterns by default, one of them on the second Python as well."""
    if pattern_name == "flexhinm":
        return []
    if pattern_name == "2:4":
        return [pytest.mark.once] if method.fits(EVERY_PATTERN["flexhinm"]) else []
    return [pytest.mark.slow]


pairs = pytest.mark.parametrize(
    ("method_name", "pattern_name"),
    [
        pytest.param(m, p, marks=marks(method, p))
        for m, method in METHODS.items()
        for p, pattern in EVERY_PATTERN.items()
        if method.fits(pattern)
    ],
)


#: No promise depends on how long a method searches.
SHORT = {"hyperprune": {"steps": 20}}


def build(method_name, pattern_name):
    pattern = EVERY_PATTERN[pattern_name]
    return METHODS[method_name](pattern, **SHORT.get(method_name, {}))


def any_of(method_name):
    """The method with the first pattern that it works with."""
    fits = METHODS[method_name].fits
    return build(method_name, next(p for p, x in EVERY_PATTERN.items() if fits(x)))


def solve(method, key, w, s, sparsity, prev=None):
    return method.solve(key, w, s, sparsity=sparsity, prev=prev)


@functools.partial(jax.jit, static_argnums=0)
def solve_and_decide(method, key, w, s, sparsity, prev):
    state = solve(method, key, w, s, sparsity, prev)
    return state, method.decide(state, w)


def run(method, target, prev=None, seed=0):
    """State and plan of one weight; with `prev`, the next round's."""
    return solve_and_decide(
        method, KEY, weight(seed), stats(), jnp.float32(target), prev
    )


#: The same for all promises about one pair.
plan = functools.cache(run)


@pairs
def test_the_pattern_holds_at_every_target_with_one_trace(method_name, pattern_name):
    method = build(method_name, pattern_name)
    traces = solve_and_decide._cache_size  # pyright: ignore
    before = traces()
    for target in targets(method.pattern):
        _, p = plan(method, target)
        fh.verify(p)
        gap = abs(float(p.support.keep.mean()) - (1 - target))
        assert gap <= method.pattern.granularity(SHAPE) + 1e-6
        assert 0 <= float(p.retained) <= 1 + 1e-6
    assert traces() - before <= 1


@pairs
def test_jit_changes_nothing(method_name, pattern_name):
    method = build(method_name, pattern_name)
    target = targets(method.pattern)[1]
    _, compiled = plan(method, target)
    state = solve(method, KEY, weight(), stats(), target)
    eager = method.decide(state, weight())
    np.testing.assert_array_equal(eager.support.keep, compiled.support.keep)
    np.testing.assert_allclose(eager.weight, compiled.weight, rtol=1e-4, atol=1e-5)


@pairs
def test_vmap_is_a_loop_and_bfloat16_is_decided_on_as_float32(
    method_name, pattern_name
):
    """One program for both: a stack in bfloat16, each of its weights in float32."""
    method = build(method_name, pattern_name)
    target = jnp.float32(targets(method.pattern)[1])
    w = jnp.stack([weight(1, dtype=jnp.bfloat16), weight(2, dtype=jnp.bfloat16)])
    s = jax.tree.map(lambda *x: jnp.stack(x), stats(1), stats(2))
    keys = jax.random.split(KEY, 2)
    solved = functools.partial(solve_and_decide, method)
    states, plans = jax.vmap(solved, in_axes=(0, 0, 0, None, None))(
        keys, w, s, target, None
    )
    assert plans.weight.dtype == jnp.bfloat16
    for j in range(2):
        state, p = jax.tree.map(lambda x: x[j], (states, plans))  # noqa: B023
        fh.verify(p)
        alone, one = solved(
            keys[j], w[j].astype(jnp.float32), stats(j + 1), target, None
        )
        np.testing.assert_array_equal(p.support.keep, one.support.keep)
        np.testing.assert_allclose(
            p.weight.astype(jnp.float32), one.weight, rtol=5e-3, atol=1e-5
        )
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
            if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == y.dtype:
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pairs
def test_the_same_key_gives_the_same_plan(method_name, pattern_name):
    method = build(method_name, pattern_name)
    target = targets(method.pattern)[0]
    first, second = plan(method, target)[1], run(method, target)[1]
    np.testing.assert_array_equal(first.support.keep, second.support.keep)
    np.testing.assert_array_equal(first.weight, second.weight)


@pairs
def test_a_factor_on_the_weights_or_the_inputs_moves_no_mask(method_name, pattern_name):
    """A power of two, which rounds nothing: no constant of a method has a unit."""
    method = build(method_name, pattern_name)
    target = targets(method.pattern)[1]
    _, one = plan(method, target)
    for of_weights, of_inputs in ((2.0**-20, 1.0), (1.0, 2.0**20)):
        s, square = stats(), of_inputs**2
        s = dataclasses.replace(
            s, sq_norm=s.sq_norm * square, mean=s.mean * of_inputs, gram=s.gram * square
        )
        args = KEY, weight() * of_weights, s, jnp.float32(target), None
        _, other = solve_and_decide(method, *args)
        np.testing.assert_array_equal(other.support.keep, one.support.keep)
        np.testing.assert_allclose(
            other.weight / of_weights, one.weight, rtol=1e-4, atol=1e-5
        )


@pairs
def test_with_a_previous_state_the_kept_set_only_shrinks(method_name, pattern_name):
    method = build(method_name, pattern_name)
    low, high = targets(method.pattern)
    before, first = plan(method, low)
    _, second = run(method, high, prev=before, seed=3)
    fh.verify(second)
    assert not np.any(second.support.keep & ~first.support.keep)
    gap = abs(float(second.support.keep.mean()) - (1 - high))
    assert gap <= method.pattern.granularity(SHAPE) + 1e-6


@pairs
def test_packing_is_exact_and_the_sparse_product_agrees(method_name, pattern_name):
    method = build(method_name, pattern_name)
    _, p = plan(method, targets(method.pattern)[1])
    if p.support.regions is None:
        with pytest.raises(ValueError, match="no regions"):
            fh.kernels.pack(p)
        return
    packed = fh.kernels.pack(p)
    if p.left is None and p.right is None:
        np.testing.assert_array_equal(fh.kernels.unpack(packed), p.weight)
    x = weight(9, (5, SHAPE[1]))
    want = x @ dense_weight(p).T
    np.testing.assert_allclose(fh.sparse_dot(x, packed), want, rtol=1e-4, atol=1e-4)


@pairs
def test_a_state_survives_a_checkpoint(method_name, pattern_name, tmp_path):
    method = build(method_name, pattern_name)
    state, p = plan(method, targets(method.pattern)[0])
    checkpoints.save(tmp_path / "state", state, method)
    like = jax.eval_shape(lambda: state)
    restored = checkpoints.restore(tmp_path / "state", like, method)
    again = method.decide(restored, weight())
    np.testing.assert_array_equal(again.support.keep, p.support.keep)
    np.testing.assert_array_equal(again.weight, p.weight)


@pairs
def test_a_rule_can_replace_the_pattern(method_name, pattern_name):
    method = build(method_name, pattern_name)
    assert any_of(method_name).with_pattern(method.pattern) == method


@pairs
def test_configurations_are_hashable_and_compare_by_value(method_name, pattern_name):
    method = build(method_name, pattern_name)
    twin = dataclasses.replace(method)
    assert method == twin and hash(method) == hash(twin)


@pytest.mark.parametrize("method_name", METHODS)
def test_missing_or_foreign_statistics_are_refused_by_name(method_name):
    method = any_of(method_name)
    if method.needs == "nothing":
        return
    target = targets(method.pattern)[0]
    with pytest.raises(ValueError, match="needs input statistics"):
        method.solve(KEY, weight(), None, sparsity=target)
    with pytest.raises(ValueError, match="belong to another weight"):
        method.solve(KEY, weight(), stats(inputs=64), sparsity=target)
    bad = dataclasses.replace(stats(), sq_norm=jnp.full((SHAPE[1],), jnp.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        method.solve(KEY, weight(), bad, sparsity=target)


@pytest.mark.parametrize("method_name", METHODS)
def test_shapes_and_targets_that_do_not_fit_are_refused(method_name):
    if not METHODS[method_name].fits(EVERY_PATTERN["hinm"]):
        with pytest.raises(ValueError, match="works with"):
            build(method_name, "hinm")
        return
    method = build(method_name, "hinm")
    s = stats()
    with pytest.raises(ValueError, match=r"out=12 is not a multiple of vector_size=8"):
        method.solve(KEY, weight(shape=(12, 32)), stats(outputs=12), sparsity=0.75)
    with pytest.raises(ValueError, match=r"outside \[0.5, 1\]"):
        method.solve(KEY, weight(), s, sparsity=0.3)
    with pytest.raises(ValueError, match="pass sparsity="):
        method.solve(KEY, weight(), s)
    with pytest.raises(ValueError, match="cannot be pruned"):
        method.solve(KEY, jnp.ones(SHAPE, jnp.int32), s, sparsity=0.75)
