"""The import rule of the architecture: a module imports only from lower layers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flexhinm_jax"
LAYERS = {
    "types": 0,
    "arguments": 1,
    "paths": 1,
    "checks": 2,
    "ops": 3,
    "patterns": 4,
    "methods": 5,
    "gpu": 6,
    "kernels": 6,
    "io": 7,
    "tracing": 8,
    "pruning": 9,
    "sequential": 10,
    "training": 11,
    "models": 11,
    "streaming": 12,
    "cli": 13,
    "__init__": 14,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First package level of everything a file imports from the project."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "flexhinm_jax" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_layers(path):
    own = room(path.relative_to(PACKAGE).parts)
    for other in imported(path) & LAYERS.keys():
        assert (
            other == own
            or {own, other} == {"gpu", "kernels"}
            or LAYERS[other] < LAYERS[own]
        ), f"{own} imports {other}"


def test_every_room_has_a_layer():
    rooms = {room(p.relative_to(PACKAGE).parts) for p in FILES}
    assert rooms <= LAYERS.keys()


def test_the_package_is_two_folders_deep_at_most():
    assert all(len(p.relative_to(PACKAGE).parts) <= 2 for p in FILES)
