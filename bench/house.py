"""Counts how the house is built: what one call passes through, twins, long functions.

    make house              # prints the table
    python -m bench.house

Nothing is timed. A call runs on one small weight in a process that has compiled nothing
before; a move is a call whose function lies in another file of the package than that of
the call before. Code lines are lines without blank ones, comments and docstrings.
"""

import ast
import copy
import dataclasses
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from scipy.sparse.csgraph import connected_components

import flexhinm_jax as fh

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flexhinm_jax"
MAX_CODE_LINES = 80
MAX_PARAMETERS = 10

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

#: What should be done in one place -> how the files that do it, rather than ask for it,
#: are recognised: a loop calls a step and goes on with its result, a spill reads back
#: what it wrote as bare bytes, a fingerprint sums over the leaves of a tree.
TWINS = {
    "statistics (X^T X over tokens)": r"ti,\.\.\.tj|\.\.\.to,\.\.\.ti->",
    "message about inputs with NaN": r"contain NaN or Inf, or overflow",
    "stacked solve": r"method\.solve\(key, w, (stats|mine)",
    "value identity": r"sorted\(eqn\.params\.items\(\)",
    "training loop": r"metrics = [\w.\[\]]*step\(",
    "spill": r"\.tofile\(|\.fromfile\(",
    "fingerprint": r"tree\.(flatten|leaves)\(.*\n(.*\n){0,12}.*(crc32|hashlib)",
    "atomic file": r"os\.(replace|rename)\(",
}


@dataclasses.dataclass
class Trip:
    """What a call passes through.

    Attributes:
      files: file of the package -> calls of its functions.
      moves: how often the file of a call is not that of the call before.
      walks: walks of a traced program.
    """

    files: Counter
    moves: int = 0
    walks: int = 0


def followed(run: Callable[[], Any]) -> Trip:
    """Runs `run` and follows it through the files of the package."""
    trip, last = Trip(Counter()), ""

    def event(frame: Any, kind: str, _: Any) -> None:
        nonlocal last
        name = frame.f_code.co_filename
        if kind == "call" and name.startswith(str(PACKAGE)):
            trip.files[name] += 1
            trip.moves += name != last
            walk = name.endswith("tracing/program.py") and frame.f_code.co_name == "run"
            trip.walks += walk
            last = name

    sys.setprofile(event)
    try:
        run()
    finally:
        sys.setprofile(None)
    return trip


def one_shot() -> list[tuple[str, Any, str]]:
    """Rows of `fh.prune` on one weight, and of `sparsify` of the result."""
    traces = Counter[str]()

    def apply_fn(params: Any, x: Any) -> Any:
        traces["prune"] += 1
        return x @ params["w"]

    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    x = jax.random.normal(jax.random.key(1), (16, 8))
    results: list[Any] = []

    def prune() -> None:
        method = fh.Wanda(fh.NM(2, 4))
        results.append(fh.prune(apply_fn, params, [x], method, key=jax.random.key(2)))

    def both() -> None:
        fh.sparsify(apply_fn)(results[0].packed, x)

    first = followed(prune)
    traced = traces["prune"]
    second = followed(both)
    files = first.files + second.files
    return [
        ("files: prune", len(first.files), ""),
        ("moves between files: prune", first.moves, ""),
        ("files: prune and sparsify", len(files), "20"),
        ("moves between files: prune and sparsify", first.moves + second.moves, "150"),
        ("traces of the function for one prune", traced, "1"),
        ("walks of the program for one prune", first.walks, "1"),
    ]


def learned() -> list[tuple[str, Any, str]]:
    """Rows of a step of learned masks: init, step, harden."""

    def apply_fn(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    x = jax.random.normal(jax.random.key(1), (16, 8))
    method, tx = fh.HardConcrete(fh.NM(2, 4)), optax.adam(0.01)
    uses = fh.discover(apply_fn, params, x)
    states = fh.solve(method, jax.random.key(2), params, uses)

    def loss(params: Any, x: Any) -> Any:
        return (apply_fn(params, x) ** 2).mean()

    def run() -> None:
        key = jax.random.key(3)
        training = fh.init_training(method, params, uses, states, tx, key=key)
        training, _ = fh.make_step(method, loss, tx, uses)(training, x)
        fh.harden(method, training, uses)

    trip = followed(run)
    return [("files: init, step, harden", len(trip.files), "11")]


def modules(folder: Path) -> dict[Path, ast.Module]:
    """Path -> syntax tree of the Python files below a folder."""
    return {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body(function: Any) -> list[ast.stmt]:
    """The statements of a function after its docstring."""
    return function.body[ast.get_docstring(function) is not None :]


def code_lines(path: Path, tree: ast.AST) -> set[int]:
    """Numbers of the lines that hold code."""
    with open(path, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    skipped = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    )
    lines = {
        line
        for token in tokens
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines -= set(range(text.lineno, (text.end_lineno or 0) + 1))
    return lines


def parameters(function: Any) -> int:
    """Number of parameters, `self` and `cls` left out."""
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def long_functions(trees: dict[Path, ast.Module]) -> tuple[list[str], list[str]]:
    """(functions with many code lines, functions with many parameters)."""
    lines, wide = [], []
    for path, tree in trees.items():
        code = code_lines(path, tree)
        for function in functions(tree):
            last = function.end_lineno or function.lineno
            count = len(code & set(range(function.lineno, last + 1)))
            where = f"{path.relative_to(PACKAGE)}:{function.name}"
            if count > MAX_CODE_LINES:
                lines.append(f"{where} ({count})")
            if (count := parameters(function)) > MAX_PARAMETERS:
                wide.append(f"{where} ({count})")
    return lines, wide


def concrete(trees: dict[Path, ast.Module], room: str) -> set[str]:
    """Names of the classes of a room, its contracts left out.

    A contract is in base.py, or has abstract verbs of its own.
    """
    return {
        node.name
        for path, tree in trees.items()
        if path.parent.name == room and path.name != "base.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not has_abstract_verbs(node)
    }


def has_abstract_verbs(owner: ast.ClassDef) -> bool:
    """Whether a class leaves verbs to its subclasses."""
    return any(
        isinstance(mark, ast.Attribute) and mark.attr == "abstractmethod"
        for verb in owner.body
        if isinstance(verb, ast.FunctionDef)
        for mark in verb.decorator_list
    )


def questions(trees: dict[Path, ast.Module], room: str) -> list[str]:
    """isinstance questions about concrete classes of a room, asked outside it."""
    names, asked = concrete(trees, room), []
    for path, tree in trees.items():
        if path.parent.name == room:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                words = set(re.findall(r"\w+", ast.unparse(node.args[1])))
                if words & names:
                    asked.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return asked


def refused(trees: dict[Path, ast.Module]) -> list[str]:
    """Verbs of methods and patterns that do nothing but raise."""
    found = []
    for path, tree in trees.items():
        if path.parent.name not in ("methods", "patterns"):
            continue
        for owner in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
            for f in (n for n in owner.body if isinstance(n, ast.FunctionDef)):
                statements = [s for s in body(f) if not isinstance(s, ast.Delete)]
                abstract = any("abstract" in ast.unparse(d) for d in f.decorator_list)
                only = len(statements) == 1 and isinstance(statements[0], ast.Raise)
                if only and not abstract:
                    found.append(f"{path.relative_to(PACKAGE)}:{owner.name}.{f.name}")
    return found


def late() -> set[tuple[str, str]]:
    """(file, room) that the layer test lets a function import against the layers."""
    tree = ast.parse((ROOT / "tests/test_layers.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LATE":
            return ast.literal_eval(node.value)
    return set()


def imports(path: Path, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, inside its functions too.

    Those that may be imported late, as the layer test says, form no circle.
    """
    found = set()
    name = str(path.relative_to(PACKAGE))
    rooms = {f"flexhinm_jax.{room}" for file, room in late() if file == name}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if n in known else node.module for n in names} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
    return {other for other in found if ".".join(other.split(".")[:2]) not in rooms}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other."""
    names = sorted(graph)
    arrows = np.array([[other in graph[name] for other in names] for name in names])
    count, group_of = connected_components(arrows, connection="strong")
    groups = [[names[k] for k in np.flatnonzero(group_of == g)] for g in range(count)]
    return [group for group in groups if len(group) > 1]


def graph(trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    names = {}
    for path in trees:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names[path] = ".".join(parts)
    known = set(names.values())
    return {names[p]: imports(p, tree, known) for p, tree in trees.items()}


def fractions() -> list[str]:
    """Layers of the layer test that are no whole numbers."""
    text = (ROOT / "tests/test_layers.py").read_text()
    return re.findall(r'"\w+": \d*\.\d+', text)


def undocumented(tree: ast.Module) -> ast.Module:
    """A copy of a syntax tree without docstrings."""
    bare = copy.deepcopy(tree)
    for node in ast.walk(bare):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return bare


def twins(trees: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """What should be in one place -> the files where it is."""
    places = defaultdict(list)
    for path, tree in trees.items():
        text = ast.unparse(undocumented(tree))
        for what, sign in TWINS.items():
            if re.search(sign, text):
                places[what].append(str(path.relative_to(PACKAGE)))
    return places


def lines(paths: Iterable[Path]) -> int:
    """Lines of all files."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def structure() -> list[tuple[str, Any, str]]:
    """Rows that are read off the source."""
    trees = modules(PACKAGE)
    long, wide = long_functions(trees)
    rows: list[tuple[str, Any, str]] = []
    for room in ("methods", "patterns"):
        asked = questions(trees, room)
        rows.append((f"isinstance of concrete {room} outside", asked, "0"))
    rows.append(("verbs that a subclass refuses", refused(trees), "0"))
    rows.append(("import circles", [" ".join(c) for c in circles(graph(trees))], "0"))
    rows.append(("layers with fractions", fractions(), "0"))
    places = twins(trees)
    rows += [(f"places of: {what}", places[what], "1") for what in TWINS]
    programs = [*(ROOT / "train").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    rows += [
        ("lines of the package", lines(trees), "27000"),
        ("lines of train and bench", lines(programs), "7000"),
        (f"functions over {MAX_CODE_LINES} code lines", long, "0"),
        (f"signatures over {MAX_PARAMETERS} parameters", wide, "0"),
        ("lines of README", lines([ROOT / "README.md"]), "150"),
    ]
    return rows


def main() -> None:
    """Prints the table: what, how many, the most there should be, where."""
    for what, value, goal in [*one_shot(), *learned(), *structure()]:
        listed = isinstance(value, list)
        count = len(value) if listed else value
        print(f"{what:<44} {count:>6} {goal:>6}")
        for place in value if listed and (goal == "0" or count > 1) else ():
            print(f"    {place}")


if __name__ == "__main__":
    main()
