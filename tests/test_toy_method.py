"""The method that docs/architecture.md adds passes the checks of every other method."""

import inspect

import pytest

from tests import test_methods
from tests.pages import added

PATTERNS = ("2:4", "flexhinm")
CHECKS = {
    name: check
    for name, check in vars(test_methods).items()
    if name.startswith("test_") and "method_name" in inspect.signature(check).parameters
}
CASES = [
    pytest.param(name, pattern, id=f"{name}-{pattern}")
    for name, check in CHECKS.items()
    for pattern in PATTERNS
    if "pattern_name" in inspect.signature(check).parameters or pattern == PATTERNS[0]
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A copy of METHODS with the page's file and line added; its name beside it."""
    own = added("methods", tmp_path_factory.mktemp("methods"))
    assert not own.keys() & test_methods.METHODS.keys()
    return test_methods.METHODS | own, next(iter(own))


@pytest.mark.once
@pytest.mark.parametrize(("check", "pattern"), CASES)
def test_a_method_of_one_file_keeps_every_promise(
    check, pattern, registry, monkeypatch, tmp_path
):
    methods, name = registry
    monkeypatch.setattr(test_methods, "METHODS", methods)
    given = {"method_name": name, "pattern_name": pattern, "tmp_path": tmp_path}
    wanted = inspect.signature(CHECKS[check]).parameters
    CHECKS[check](**{k: v for k, v in given.items() if k in wanted})


def test_all_checks_of_a_method_were_found():
    assert len(CHECKS) >= 11
