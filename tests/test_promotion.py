"""The package runs, with the same results, where JAX is told to refuse promotion."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax import promotion

KEY = jax.random.key(0)


@pytest.fixture(params=["as it is", "strict"])
def rules(request):
    """JAX as it is, and refusing whatever it can."""
    with contextlib.ExitStack() as stack:
        if request.param == "strict":
            stack.enter_context(jax.numpy_rank_promotion("raise"))
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
        yield request.param


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def loss_fn(params, x):
    return jnp.mean(apply_fn(params, x) ** 2)


seen: dict[str, dict] = {}


def test_a_model_is_pruned_packed_and_trained_to_the_same_values(rules):
    keys = jax.random.split(KEY, 3)
    params = {"a": jax.random.normal(keys[0], (8, 8))}
    params["b"] = jax.random.normal(keys[1], (8, 8))
    x = jax.random.normal(keys[2], (16, 8))
    flex = fh.FlexHiNM(4, permute=None)
    result = fh.prune(apply_fn, params, [x], fh.SparseGPT(flex), sparsity=0.5, key=KEY)
    ordered = fh.prune_sequential(apply_fn, params, [x], fh.Wanda(fh.NM(2, 4)), key=KEY)
    slope = jax.grad(lambda x: fh.sparsify(loss_fn)(result.packed, x))
    method, tx = fh.HardConcrete(fh.NM(2, 4)), optax.sgd(0.1)
    stages = [fh.Stage(0.5, 2)]
    run = fh.gradual(
        method, loss_fn, params, result.uses, lambda step: (x,), stages, tx, key=KEY
    )
    for _ in run:
        pass
    seen[rules] = {
        "pruned": result.params,
        "ordered": ordered.params,
        "packed": jax.jit(fh.sparsify(apply_fn))(result.packed, x),
        "slope": slope(x),
        "trained": run.params,
    }
    jax.tree.map(np.testing.assert_array_equal, seen[rules], next(iter(seen.values())))


def test_nothing_is_entered_where_the_rules_are_the_usual_ones():
    """A context would be one more program to compile."""
    traces = []

    @jax.jit
    def run(x):
        traces.append(1)
        return x + 1

    run(jnp.ones(3))
    with promotion.usual():
        run(jnp.ones(3))
    assert len(traces) == 1
