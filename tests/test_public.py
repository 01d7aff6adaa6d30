"""Every public name explains itself, and the project is one version everywhere."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

import flexhinm_jax as fh
from flexhinm_jax.methods import METHODS
from flexhinm_jax.patterns import PATTERNS

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(
    r"arXiv:\d{4}\.\d{4,5}|\d{4}\.\d{5}|(?:ICLR|ICML|NeurIPS) \d{4}|baseline|Source:"
)


def modules(room):
    package = importlib.import_module(f"flexhinm_jax.{room}")
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        yield importlib.import_module(found.name)


def names_of(module):
    """Public functions and classes: those of __all__, else those defined here."""
    for name in getattr(module, "__all__", vars(module)):
        found = getattr(module, name)
        if not name.startswith("_") and (
            inspect.isfunction(found) or inspect.isclass(found)
        ):
            if hasattr(module, "__all__") or found.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", found


def unique(places):
    """Name -> object, each object under its first name."""
    found = {}
    for place in places:
        for name, thing in names_of(place):
            if thing not in found.values():
                found[name] = thing
    return {n: t for n, t in found.items() if t.__module__.startswith("flexhinm_jax")}


EXPORTED = unique([fh, fh.patterns, fh.methods, fh.kernels])
FILES = unique([*modules("io"), *modules("models")])


def doc(thing):
    """The docstring of an object itself, not one that it inherits."""
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return inspect.cleandoc(own or "")


def described(name, text, section):
    """Whether a section has an entry of that name; "a, b: ..." counts."""
    found = re.search(rf"^{section}:\n((?:[ \t]+.*\n?|\n)*)", text, re.M)
    entry = rf"^\s+(?:[\w*]+, )*\*{{0,2}}{name}(?:, [\w*]+)*:"
    return bool(found and re.search(entry, found[1], re.M))


def parameters(function):
    return [
        name
        for name in inspect.signature(function).parameters
        if name not in ("self", "cls") and not name.startswith("_")
    ]


def returns_something(function):
    return inspect.signature(function).return_annotation not in (None, "None")


def raises(function):
    """Whether the function itself, not one that it calls, raises a ValueError."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(
        isinstance(node, ast.Raise) and "ValueError" in ast.unparse(node)
        for node in ast.walk(tree)
    )


def fields(cls):
    """Own fields of a dataclass; inherited ones are explained where they are."""
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.name in vars(cls).get("__annotations__", {})
    ]


def missing(thing):
    """What the docstring of an exported function or class lacks."""
    text = doc(thing)
    if inspect.isclass(thing):
        if not dataclasses.is_dataclass(thing):
            return []
        return [f for f in fields(thing) if not described(f, text, "Attributes")]
    found = [p for p in parameters(thing) if not described(p, text, "Args")]
    if returns_something(thing) and not re.search("^(Returns|Yields):", text, re.M):
        found.append("Returns:")
    if raises(thing) and "Raises:\n" not in text:
        found.append("Raises:")
    return found


@pytest.mark.parametrize("name", EXPORTED | FILES)
def test_the_first_line_of_a_docstring_is_a_sentence(name):
    first = doc((EXPORTED | FILES)[name]).split("\n")[0]
    assert first.endswith((".", "?", ":")) and len(first) > 10


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_explains_its_arguments_results_and_errors(name):
    assert not missing(EXPORTED[name])


@pytest.mark.parametrize("name", FILES)
def test_files_and_models_explain_functions_of_several_arguments(name):
    thing = FILES[name]
    stated = thing.__name__ in getattr(inspect.getmodule(thing), "__all__", ())
    if stated and (inspect.isclass(thing) or len(parameters(thing)) > 2):
        assert not [m for m in missing(thing) if m not in ("parent", "name")]


@pytest.mark.parametrize("cls", [*METHODS.values(), *PATTERNS.values()])
def test_a_method_or_pattern_names_its_source_or_whose_it_is(cls):
    text = doc(cls) + str(inspect.getmodule(cls).__doc__)
    assert SOURCE.search(text) or re.search(r"\b(ours|our own|no paper)\b", text)


def test_the_version_is_the_same_everywhere():
    cited = re.search(r'^version: "?([\w.]+)"?$', read("CITATION.cff"), re.M)
    assert cited and cited[1] == fh.__version__
    assert fh.__version__ in read("CHANGELOG.md")
    assert 'path = "flexhinm_jax/__init__.py"' in read("pyproject.toml")
    assert "version =" not in read("pyproject.toml").split("[project.optional")[0]


def test_the_licence_is_the_same_everywhere():
    assert 'license = "Apache-2.0"' in read("pyproject.toml")
    assert "license: Apache-2.0" in read("CITATION.cff")
    assert "Apache License" in read("LICENSE")


def test_the_address_of_the_project_is_the_same_everywhere():
    made = tomllib.loads(read("pyproject.toml"))["project"]
    host, _, repository = made["urls"]["Repository"].partition("://")[2].partition("/")
    pages = [
        *(ROOT / "colab").glob("*.ipynb"),
        *(ROOT / name for name in ("CITATION.cff", "README.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
    address = re.compile(rf"{re.escape(host)}/([\w.-]+/{made['name']})\b")
    badge = re.compile(rf"colab\.[\w.]+/github/([\w.-]+/{made['name']})/blob")
    known = {
        path: {*address.findall(t), *badge.findall(t)}
        for path in pages
        if (t := path.read_text())
    }
    assert {one for names in known.values() for one in names} == {repository}
    assert all(known[path] for path in pages if path.suffix == ".ipynb")


def read(name):
    return (ROOT / name).read_text()
