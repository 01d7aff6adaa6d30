"""What methods that move weights report about the solving."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import flexhinm_jax as fh
from flexhinm_jax.pruning.report import worst
from tests.cases import weight
from tests.methods.cases import correlated

MADE = {
    "sparsegpt": lambda damp: fh.SparseGPT(damp=damp),
    "refit": lambda damp: fh.Refit(fh.Wanda(), damp=damp),
    "inner": lambda damp: fh.Refit(fh.SparseGPT(damp=damp)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_damping_that_was_raised_is_said_with_the_numbers(name):
    x = jnp.linspace(1.0, 3.0, 32)
    gram = jnp.outer(x, x)  # of rank one
    stats = dataclasses.replace(correlated(), gram=gram, sq_norm=jnp.diag(gram))
    for damp, said in ((1e-8, True), (0.01, False)):
        method = MADE[name](damp)
        state = method.solve(jax.random.key(0), weight(), stats)
        text = method.note(worst(method.diagnostics(state)))
        assert bool(text) == said
        if said:
            used = max(float(x) for x in method.diagnostics(state).values() if x < 0.01)
            assert f"needed damping {used:g} instead of 1e-08" in text


def test_the_worst_of_a_stack_counts():
    found = worst(
        {
            "damping": jnp.array([0.01, 0.1]),
            "steps": jnp.array([3, 9], jnp.int32),
            "settled": jnp.array([True, False]),
        }
    )
    assert found == {"damping": pytest.approx(0.1), "steps": 9, "settled": False}
    assert "damping 0.1 instead of 0.01" in fh.ALPS().note(found)


def test_a_method_that_moves_nothing_has_nothing_to_say():
    assert fh.Wanda().note({}) == ""
