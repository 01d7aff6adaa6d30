"""Makes the pages of the site that are read from the code, and fills in its tables.

The package is read, not imported, so the environment of the site needs no jax. A page
asks for text with a line of its own:

    {{ readme }}             what the README says before its first section
    {{ readme: Heading }}    one section of it, without the heading
    {{ methods }}            a table of the registry of methods
    {{ patterns }}           a table of the registry of patterns
    {{ layers }}             the layers that tests/test_layers.py checks
    {{ module: NAME }}       the docstring of a module

What is asked for and not found ends the build.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "flexhinm_jax"
RESULTS = ROOT / "bench" / "RESULTS.md"

#: Rooms in the order in which a reader needs them, and what is said about each.
ROOMS = {
    "pruning": ("Pruning a model", "From one matrix to a whole model."),
    "tracing": ("Tracing", "Which weights a function has, and the packed function."),
    "sequential": ("Sequential pruning", "Every weight on what the pruned ones give."),
    "patterns": ("Patterns", "Which weights may stay."),
    "methods": ("Methods", "Where scores come from, and whether weights move."),
    "training": ("Training", "Fine-tuning, gradual pruning and learned masks."),
    "kernels": ("Kernels", "Packed weights and the products that run on them."),
    "gpu": ("GPU kernels", "Products on NVIDIA GPUs: layouts, checks, backends."),
    "streaming": ("Streaming", "Decoders pruned block by block in bounded memory."),
    "types": ("Types", "The pytrees that everything passes on."),
    "checks": ("Checks", "Errors that name what was given and what is needed."),
    "io": ("Files", "Checkpoints, Hugging Face directories, the packed file."),
    "models": ("Models", "Encoders, decoders and vision models as pure functions."),
    "ops": ("Operations", "The mathematics of one matrix."),
}
BY_MODULE = ("io", "models", "ops", "gpu", "streaming")
"""Rooms of which every module is shown; of the others what the package exports."""

FIRST = (
    "prune",
    "Pruned",
    "discover",
    "calibrate",
    "solve",
    "decide",
    "densify",
    "pack",
)
"""Names that open their room, in the order in which a model passes them."""

SOURCE = re.compile(r"arXiv:(\d{4}\.\d{4,5})|(?:ICLR|ICML|NeurIPS|MLSys|CVPR) \d{4}")


def load() -> Any:
    """The package as griffe reads it."""
    return griffe.load(
        PACKAGE,
        search_paths=[ROOT],
        docstring_parser="google",
        resolve_aliases=True,
    )


def first_line(thing: Any) -> str:
    """First line of a docstring."""
    return thing.docstring.value.split("\n")[0] if thing.docstring else ""


def room_of(thing: Any) -> str:
    """Folder or module of the package that an object lives in."""
    return thing.canonical_path.split(".")[1]


def exported(package: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) of every public name that is no room, each object once.

    Names of `flexhinm_jax.__all__` come before those that a room exports by itself.
    """
    seen = set()
    rooms = [room for room in ROOMS if room not in BY_MODULE]
    places = [package, *(package[r] for r in rooms if r in package.members)]
    for place in places:
        for name in place.exports or ():
            thing = place[str(name)]
            target = thing.final_target if thing.is_alias else thing
            room = target.is_module and target.canonical_path.count(".") < 2
            if room or target.canonical_path in seen:
                continue
            seen.add(target.canonical_path)
            yield f"{place.path}.{name}", target


def reference(package: Any) -> dict[str, str]:
    """Address of a page -> its Markdown."""
    by_room: dict[str, list[tuple[str, Any]]] = {room: [] for room in ROOMS}
    for path, thing in exported(package):
        by_room.setdefault(room_of(thing), []).append((path, thing))
    pages = {}
    overview = ["# Reference\n", "`import flexhinm_jax as fh`\n"]
    for room, found in by_room.items():
        title, about = ROOMS.get(room, (room.capitalize(), ""))
        if room in BY_MODULE:
            modules = [m for m in package[room].modules.values() if m.docstring]
            found = [(m.path, m) for m in modules]
        if not found:
            continue
        found.sort(key=place)
        pages[f"reference/{room}.md"] = page(title, about, found)
        overview += [f"\n## [{title}]({room}.md)\n", f"{about}\n"]
        overview += ["| name | |", "|---|---|"]
        for path, thing in found:
            short = path.removeprefix(f"{PACKAGE}.")
            overview.append(f"| [`{short}`][{path}] | {cell(first_line(thing))} |")
    return {"reference/index.md": "\n".join(overview) + "\n"} | pages


def place(entry: tuple[str, Any]) -> tuple[int, str]:
    """Sorts the names of a room: those of `FIRST`, then the others by alphabet."""
    name = entry[0].rpartition(".")[2]
    return (FIRST.index(name) if name in FIRST else len(FIRST), entry[0].lower())


def page(title: str, about: str, found: list[tuple[str, Any]]) -> str:
    """One page of the reference."""
    lines = [f"# {title}\n", about + "\n"]
    for path, thing in found:
        lines.append(f"\n::: {path}")
        if thing.is_module:
            # A module shows its public functions, not what it imports.
            lines += ["    options:", "      show_root_full_path: true"]
            lines += ["      show_root_members_full_path: false"]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def registry(package: Any, module: str, name: str) -> list[tuple[str, Any]]:
    """(key, class) of a registry such as METHODS, in its order."""
    tree = ast.parse(package[module].filepath.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return [
                (ast.literal_eval(k), package[module][ast.unparse(v)].final_target)
                for k, v in pairs
                if k is not None
            ]
    raise PluginError(f"{PACKAGE}.{module} has no registry {name}")


def attribute(cls: Any, name: str) -> str | None:
    """Source text of a class attribute, looked up along the bases."""
    for one in [cls, *cls.mro()]:
        if name in one.members and one.members[name].value is not None:
            return str(one.members[name].value)
    return None


def sources(cls: Any) -> str:
    """Papers that a class or its module names, as links."""
    text = (cls.docstring.value if cls.docstring else "") + "\n"
    text += cls.parent.docstring.value if cls.parent.docstring else ""
    found = {}
    for match in SOURCE.finditer(text):
        if match[1]:
            found[match[0]] = f"[{match[1]}](https://arxiv.org/abs/{match[1]})"
        else:
            found[match[0]] = match[0]
    return ", ".join(found.values())


def letters(cls: Any) -> list[str]:
    """Keys of the dictionaries that a pattern and its bases call `letters`."""
    found: dict[str, None] = {}
    for one in [cls, *cls.mro()]:
        if "letters" in one.members and one.members["letters"].value is not None:
            tree = ast.parse(str(one.members["letters"].value), mode="eval")
            for node in ast.walk(tree):
                if isinstance(node, ast.Dict):
                    found |= {ast.literal_eval(k): None for k in node.keys if k}
    return list(found)


NEEDS = {
    "nothing": "weights alone",
    "norms": "input norms",
    "gram": "Gram matrix of the inputs",
    "gradients": "gradients",
}


def what_it_needs(cls: Any) -> str:
    """Calibration that a method reads, in words."""
    for one in [cls, *cls.mro()]:
        if "needs" not in one.members:
            continue
        if "property" in one.members["needs"].labels:
            text = one.members["needs"].source
            inner = re.search(r"self\.(\w+)\.needs", text)
            default = attribute(cls, inner[1]) if inner else None
            if inner and default not in (None, "None"):
                return f"what `{inner[1]}` ({default}) needs"
            body = text.split(":\n", 1)[1]
            named = [words for n, words in NEEDS.items() if f'"{n}"' in body]
            return f"{' or '.join(named)}, by its options"
        return NEEDS[ast.literal_eval(str(one.members["needs"].value))]
    return NEEDS["nothing"]


def methods(package: Any) -> str:
    """Table of the registry of methods."""
    lines = [
        "| method | on the command line | what it does | needs | learns | source |",
        "|---|---|---|---|---|---|",
    ]
    for key, cls in registry(package, "methods", "METHODS"):
        needs = what_it_needs(cls)
        bases = {base.name for base in cls.mro()}
        learns = "yes" if "LearnedMethod" in bases else ""
        name = f"[`{cls.name}`][{cls.canonical_path}]"
        text = cell(first_line(cls))
        row = (name, f"`{key}`", text, needs, learns, sources(cls))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def patterns(package: Any) -> str:
    """Table of the registry of patterns."""
    lines = [
        "| pattern | on the command line | what stays | source |",
        "|---|---|---|---|",
    ]
    for key, cls in registry(package, "patterns", "PATTERNS"):
        options = ",".join(f"{letter}=" for letter in letters(cls))
        text = f"`{key}{':' + options if options else ''}`"
        name = f"[`{cls.name}`][{cls.canonical_path}]"
        lines.append(f"| {name} | {text} | {cell(first_line(cls))} | {sources(cls)} |")
    return "\n".join(lines)


def layers(package: Any) -> str:
    """Rooms of the package from the highest layer to the lowest."""
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text())
    found = next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    lines = ['<div class="layers" markdown>']
    for room, level in sorted(found.items(), key=lambda pair: -pair[1]):
        if room == "__init__":
            continue
        folder = package[room]
        text = first_line(folder)
        inside = ", ".join(m for m in folder.modules if not m.startswith("_"))
        inside = f"<br><small>{inside}</small>" if inside else ""
        lines.append(f"<div><b>L{level:g}</b> <code>{room}</code> {text}{inside}</div>")
    return "\n".join([*lines, "</div>"])


def readme(heading: str | None) -> str:
    """A section of the README, its links made those of the site."""
    text = (ROOT / "README.md").read_text()
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading is None:
        found = re.sub(r"\A# .+\n", "", parts[0])
    elif heading in named:
        found = named[heading]
    else:
        known = ", ".join(named)
        raise PluginError(f"README.md has no section {heading!r}; it has: {known}")
    found = re.sub(r"\]\(docs/", "](", found)
    found = re.sub(r"\]\(colab/(\w+)\.ipynb\)", r"](notebooks/\1.md)", found)
    return found.replace("](bench/RESULTS.md)", "](measurements.md)").strip()


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def results() -> dict[str, str]:
    """The page of measurements, as `make bench-report` wrote it."""
    return {"measurements.md": RESULTS.read_text()} if RESULTS.exists() else {}


_package: Any = None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Reads the package and adds the generated pages to the navigation."""
    global _package
    _package = load()
    pages = reference(_package)
    # In place of `repo_url`, with which the theme would ask another host for stars.
    address = project()["urls"]["Repository"]
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": address}]
    config.nav = [*config.nav]
    if results():
        config.nav.append({"Measurements": "measurements.md"})
    config.nav.append({"Reference": list(pages)})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and the figures of the measurements."""
    for address, text in (reference(_package) | results()).items():
        files.append(File.generated(config, address, content=text))
    for figure in sorted(RESULTS.parent.glob("results/*.png")) if results() else ():
        name = f"results/{figure.name}"
        files.append(File.generated(config, name, content=figure.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what a page asks for."""

    def fill(match: re.Match[str]) -> str:
        what, name = match[1], match[2]
        if what == "readme":
            return readme(name)
        if what == "module":
            module = _package[name.removeprefix(f"{PACKAGE}.")]
            return module.docstring.value
        made = {"methods": methods, "patterns": patterns, "layers": layers}
        if what not in made:
            raise PluginError(f"unknown {match[0]}")
        return made[what](_package)

    # Pages lead to files of the repository where they are read there.
    markdown = markdown.replace("](../bench/RESULTS.md", "](measurements.md")
    markdown = markdown.replace("](../bench/results/", "](results/")
    return re.sub(r"^\{\{ (\w+)(?:: (.+?))? \}\}$", fill, markdown, flags=re.M)
