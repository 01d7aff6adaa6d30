"""The method that docs/architecture.md adds passes the checks of every other method."""

import importlib.util
import inspect

import pytest

from tests import test_methods
from tests.test_docs import BLOCK, DOCS

FILES = {
    found["title"].rsplit("/", 1)[1]: found["code"]
    for found in BLOCK.finditer((DOCS / "architecture.md").read_text())
    if (found["title"] or "").startswith("flexhinm_jax/methods/")
}
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
    (file, source), (_, line) = FILES.items()
    path = tmp_path_factory.mktemp("methods") / file
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    added = eval("{" + line + "}", vars(module))
    assert not added.keys() & test_methods.METHODS.keys()
    return test_methods.METHODS | added, next(iter(added))


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
