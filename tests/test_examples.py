"""The examples in the docstrings of the package are what its functions return."""

import doctest
import importlib
import pkgutil

import pytest

import flexhinm_jax

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(flexhinm_jax.__path__, "flexhinm_jax.")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    found = [doctest.DocTestFinder().find(importlib.import_module(m)) for m in MODULES]
    assert sum(len(test.examples) for tests in found for test in tests) > 10
