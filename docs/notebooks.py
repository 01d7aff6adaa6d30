"""Pages of the notebooks of colab/, with what they printed.

`make notebooks` runs copies of them in build/notebooks, and what they print stays
there: no output is committed, so none is older than its code. A notebook that has not
run since it was edited is shown without outputs, and its page says so.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "colab"
EXECUTED = ROOT / "build" / "notebooks"
UNSEEN = "*This page was built before the notebook ran: code without outputs.*"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def executed(path: Path) -> Path | None:
    """The copy that ran, if its cells are those of the notebook."""
    copy = EXECUTED / path.name
    if not copy.exists():
        return None
    sources = ([cell["source"] for cell in read(p)["cells"]] for p in (path, copy))
    return copy if next(sources) == next(sources) else None


def read(path: Path) -> dict[str, Any]:
    """A notebook as it is stored; sources as text, in whichever form they are."""
    document = json.loads(path.read_text())
    for cell in document["cells"]:
        cell["source"] = "".join(cell["source"])
    return document


def title(path: Path) -> str:
    """The heading of a notebook."""
    text = read(path)["cells"][0]["source"]
    return re.search(r"^# (.+)$", text, re.M)[1]  # pyright: ignore


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A page, and its pictures by name."""
    ran = executed(path)
    exporter = MarkdownExporter()
    text, made = exporter.from_filename(
        str(ran or path), resources={"unique_key": path.stem, "output_files_dir": ""}
    )
    # The badge is a picture of another host; a link says the same.
    text = re.sub(r"\[!\[([^]]*)\]\([^)]*\)\]", r"[\1]", text)
    link, heading, rest = re.split(r"^(# .+)$", text, maxsplit=1, flags=re.M)
    note = "" if ran else f"\n{UNSEEN}\n"
    text = f"{heading}\n\n{link.strip()}\n{note}{ESCAPE.sub('', rest)}"
    return text, dict(made.get("outputs") or {})


def pages() -> dict[str, Path]:
    """Address of every page -> its notebook."""
    return {f"notebooks/{p.stem}.md": p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages to the navigation, after the recipes."""
    at = next(k for k, entry in enumerate(config.nav) if "Recipes" in entry)
    entries = [{title(path): address} for address, path in pages().items()]
    config.nav.insert(at + 1, {"Notebooks": entries})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and their pictures."""
    for address, path in pages().items():
        text, pictures = page(path)
        files.append(File.generated(config, address, content=text))
        for name, picture in pictures.items():
            place = f"notebooks/{Path(name).name}"
            files.append(File.generated(config, place, content=picture))
    return files
