"""Renders bench/RESULTS.md from bench/results/*.json, and the figures beside it.

    make bench-report                # after any benchmark; reads, measures nothing
    python -m bench.report --check   # exits with 1 if RESULTS.md is not up to date

A file is the rows of one benchmark (`bench.study.Row`). Its tables are shown in the
order in which they were measured first: the figure, the anchor it is held against (a
published number, a goal or the reference of the same run), the ratio of the two,
further figures, and the command that writes the row again; above the table where it is
one for all rows, with ROW in place of their names.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
PAGE = BENCH / "RESULTS.md"

#: Sections in the order in which a reader asks; a new one comes after these.
ORDER = (
    "language_models",
    "minilm",
    "distill",
    "masks",
    "armor",
    "permutation",
    "gyro",
    "oneshot",
)
ORDER += ("peers", "training", "scale", "placement", "comparison", "kernels")
ORDER += ("gpu", "gpu_compile")

INTRODUCTION = """# Measurements

Made by `make bench-report` from `bench/results/*.json`, never by hand. The
ratio is measured / anchor; the note above a table says which side of 1 is
better. Rows were measured at different times on machines with two CPU cores,
often busy with other work: compare CPU seconds within a table only.
"""


def number(x: Any) -> str:
    """Four significant digits, or that it was not measured."""
    if x is None or x != x:
        return "not measured"
    if isinstance(x, bool):
        return "yes" if x else "no"
    return f"{x:.4g}" if isinstance(x, int | float) else str(x)


def cell(text: str) -> str:
    """Text for a cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def any_row(command: str, what: str) -> str:
    """A command with ROW in place of the name of its row, where it says that.

    Example:
      >>> any_row('make bench-gyro ARGS="--rows gyro"', "gyro")
      'make bench-gyro ARGS="--rows ROW"'
    """
    name = re.escape(what.removesuffix(" control"))
    return re.sub(rf'(?<=[\s"=]){name}(?=[\s"]|$)', "ROW", command)


def markdown(title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with its heading and note; columns without any figure are left out."""
    anchored = any(row.get("anchor") is not None for row in rows)
    timed = any(row.get("seconds") is not None for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row.get("more", ())))
    commands = {any_row(row["command"], row["what"]) for row in rows}
    each = len(commands) > 1
    heads = ["", "measured", *(["anchor", "ratio"] if anchored else []), *names]
    heads += [*(["CPU s"] if timed else []), *(["command"] if each else [])]
    lines = [f"### {title}", "", *([note, ""] if note else [])]
    if not each:
        lines += [f"Made by `{commands.pop()}`.", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        value, anchor, seconds = (row.get(k) for k in ("value", "anchor", "seconds"))
        cells = [cell(row["what"]), number(value)]
        if anchored:
            cells.append("" if anchor is None else number(anchor))
            cells.append(number(value / anchor) if anchor and value is not None else "")
        more = row.get("more", {})
        cells += [number(more[name]) if name in more else "" for name in names]
        if timed:
            cells.append("" if seconds is None else f"{seconds:.3g}")
        if each:
            cells.append(f"`{cell(row['command'])}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def section(name: str, document: Mapping[str, Any]) -> list[str]:
    """The tables of one file."""
    version = document.get("measured", {}).get("jax")
    source = f"From `bench/results/{name}.json`"
    source += f", jax {version}." if version else "."
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        tables.setdefault(row["table"], []).append(row)
    notes = document.get("notes", {})
    shown = [markdown(title, notes.get(title, ""), t) for title, t in tables.items()]
    return [f"## {document['title']}", "", source, "", *shown]


def render(results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The page of all results.

    Args:
      results: name of a benchmark -> its document.
      figures: name of a file in bench/results -> what it shows.
    """
    lines = [INTRODUCTION]
    for file, caption in figures.items():
        lines += [f"![{caption}](results/{file})", "", f"*{caption}*", ""]
    for name in sorted(results, key=place):
        lines += section(name, results[name])
    return "\n".join(lines)


def place(name: str) -> tuple[int, str]:
    """Sorts names of benchmarks."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def load(folder: Path = RESULTS) -> dict[str, Any]:
    """Name of a benchmark -> its document."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def main() -> int:
    """Renders the page, or checks it."""
    from bench import figures

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    flags, results = parser.parse_args(), load()
    if not flags.check:
        figures.draw(results, RESULTS)
    page = render(results, figures.captions(RESULTS))
    if flags.check and (not PAGE.exists() or PAGE.read_text() != page):
        print("bench/RESULTS.md is not up to date: make bench-report", file=sys.stderr)
        return 1
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
