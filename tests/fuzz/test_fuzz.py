"""Random programs keep every promise: statistics, patterns, products, reasons."""

import pytest

from tests.fuzz import check, grammar

QUICK, SLOW, SHARE = 100, 2000, 50
"""Programs of the default run, of the slow one, and of one slow test."""


@pytest.fixture(autouse=True)
def quiet():
    """Weights that no token reached are wanted here; their warnings are not."""
    check.silent()


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_program_keeps_every_promise(seed):
    check.check(grammar.program(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, SLOW, SHARE))
def test_many_programs_do(first):
    for seed in range(first, min(first + SHARE, SLOW)):
        check.check(grammar.program(seed), seed)


def test_every_step_of_the_grammar_is_drawn():
    text = " ".join(grammar.program(seed).text for seed in range(300))
    words = "dense heads fused joined stacked layers recurrent repeated chosen routed"
    words += " experts conv tied also frozen shaped gained jit remat custom +x"
    assert all(word in text for word in words.split())
