"""Random programs keep every promise: statistics, patterns, products, reasons."""

import jax
import numpy as np
import pytest

from tests.fuzz import check, grammar, mutations
from tests.fuzz.evaluate import evaluated

QUICK = [*range(100), 186]
"""Programs of the default run: they notice all faults of `mutations`, 186 one alone."""

SLOW, SHARE = 2000, 50
"""Programs of the slow run, and of one slow test."""

COMPILED = 40
"""Programs that the slow run compiles with XLA too."""


@pytest.fixture(autouse=True)
def quiet():
    """Weights that no token reached are wanted here; their warnings are not."""
    check.silent()


@pytest.mark.parametrize("seed", QUICK)
def test_a_program_keeps_every_promise(seed):
    check.check(grammar.program(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, SLOW, SHARE))
def test_many_programs_do(first):
    for seed in range(first, min(first + SHARE, SLOW)):
        check.check(grammar.program(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(COMPILED))
def test_a_compiled_program_does(seed):
    check.check(grammar.program(seed), seed, compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_an_old_fault_put_back_is_noticed(name):
    assert mutations.first_caught(mutations.MUTATIONS[name], QUICK) is not None


@pytest.mark.parametrize("seed", range(4))
def test_programs_run_in_numpy_as_in_jax(seed):
    program = grammar.program(seed)
    got = evaluated(program.apply)(program.params, program.x)
    want = jax.jit(program.apply)(program.params, program.x)
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-3)


def test_every_step_of_the_grammar_is_drawn():
    text = " ".join(grammar.program(seed).text for seed in range(300))
    words = "dense heads fused joined stacked layers recurrent repeated chosen routed"
    words += " experts conv tied also frozen shaped turned gained jit remat custom +x"
    assert all(word in text for word in words.split())
