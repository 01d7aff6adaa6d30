"""The import rule of the architecture: a module imports only from lower layers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flexhinm_jax"
LAYERS = {
    "types": 0,
    "arguments": 1,
    "jax_versions": 1,
    "paths": 1,
    "promotion": 1,
    "atomic": 2,
    "checks": 2,
    "ops": 3,
    "patterns": 4,
    "methods": 5,
    "gpu": 6,
    "kernels": 7,
    "io": 8,
    "tracing": 9,
    "pruning": 10,
    "sequential": 11,
    "training": 12,
    "models": 12,
    "streaming": 13,
    "cli": 14,
    "__init__": 15,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


#: Imported when a function runs, against the layers: an operator of a packed weight is
#: a product, and products are far above the types.
LATE = {("types.py", "kernels")}


def rooms_named_by(node: ast.AST) -> set[str]:
    """First package level of what one statement imports from the project."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return set()
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "flexhinm_jax" and len(p) > 1}


def imported(path: Path) -> tuple[set[str], set[str]]:
    """The rooms that a file imports at once, and those that its functions import."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    at_once, late = set(), set()
    for node in ast.walk(tree):
        (late if id(node) in inside else at_once).update(rooms_named_by(node))
    return at_once, late


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_layers(path):
    parts = path.relative_to(PACKAGE).parts
    own, (at_once, late) = room(parts), imported(path)
    late -= {other for name, other in LATE if name == "/".join(parts)}
    for other in (at_once | late) & LAYERS.keys():
        assert other == own or LAYERS[other] < LAYERS[own], f"{own} imports {other}"


def test_every_room_has_a_layer():
    rooms = {room(p.relative_to(PACKAGE).parts) for p in FILES}
    assert rooms <= LAYERS.keys()


def test_the_package_is_two_folders_deep_at_most():
    assert all(len(p.relative_to(PACKAGE).parts) <= 2 for p in FILES)
