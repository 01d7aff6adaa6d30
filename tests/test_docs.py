"""The pages of docs/ say what is true: their code runs, their links lead somewhere."""

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest

import flexhinm_jax as fh

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(
    r'^```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```', re.M | re.S
)

MESSAGE = re.compile(r'^```text title="message"\n(.*?)^```', re.M | re.S)


def code(page: Path) -> str:
    """The Python of a page in order, every line where it is on the page.

    Blocks with a title are files, not something to run here.
    """
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for found in BLOCK.finditer(text):
        if found["title"] is None:
            first = text.count("\n", 0, found.start("code"))
            rows = found["code"].splitlines()
            lines[first : first + len(rows)] = rows
    return "\n".join(lines) + "\n"


PAGES = {str(p.relative_to(DOCS)): p for p in sorted(DOCS.rglob("*.md"))}
SLOW = {"choose.md"} | {
    f"recipes/{name}.md"
    for name in (
        *("encoders", "equinox", "huggingface", "keras", "maxtext", "steps"),
        *("trackers", "training"),
    )
}
RUN = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, page in PAGES.items()
    if code(page).strip()
]


@pytest.mark.once
def test_the_example_of_the_readme_runs():
    text = code(DOCS.parent / "README.md")
    exec(compile(text, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.once
@pytest.mark.parametrize("name", RUN)
def test_the_examples_of_a_page_run(name):
    text = code(PAGES[name])
    for extra in ("equinox", "safetensors", "flatbuffers", "keras"):
        if extra in text:
            pytest.importorskip(extra)
    names = {"__name__": name}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, str(PAGES[name]), "exec"), names)
    shown = [found[1] for found in MESSAGE.finditer(PAGES[name].read_text())]
    made = [" ".join(text.split()) for text in names.get("messages", ())]
    assert [" ".join(text.split()) for text in shown] == made


def test_every_public_function_is_shown_in_code_that_runs():
    pages = "\n".join(code(page) for page in PAGES.values())
    functions = {n: f for n in fh.__all__ if inspect.isfunction(f := getattr(fh, n))}
    unseen = [
        name
        for name, function in functions.items()
        if ">>>" not in (inspect.getdoc(function) or "") and f"fh.{name}(" not in pages
    ]
    assert not unseen, f"no doctest and no page of docs/ shows {', '.join(unseen)}"
