"""What a command may show, and where.

Results go to stdout: tables for people, or one JSON document with `--json`. Progress
goes to stderr, and only to a terminal, so that a log file or a pipe never holds any.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import rich.console
import rich.progress
from rich.table import Table

from flexhinm_jax.pruning.report import Report

T = TypeVar("T")

PIPE_WIDTH = 160
"""Columns of a table that is not shown on a terminal."""


class Console:
    """Output of one run of a command.

    Attributes:
      json: True when stdout belongs to one JSON document.
      quiet: True when nothing but errors, or the JSON document, may be shown.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False):
        """Looks at stdout and stderr as they are now."""
        self.json = json
        self.quiet = quiet
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._live = self._err.is_terminal and not (quiet or json)

    def result(self, document: dict[str, Any], *lines: Table | str) -> None:
        """Shows a result: the document with `--json`, otherwise tables and lines."""
        if self.json:
            print(json.dumps(document, indent=2))
        elif not self.quiet:
            for line in lines:
                self._out.print(line, soft_wrap=isinstance(line, str))

    def note(self, text: str) -> None:
        """Tells a person something on stderr."""
        if not (self.quiet or self.json):
            self._err.print(text, soft_wrap=True)

    def progress(self, text: str) -> None:
        """Tells a person at a terminal how far a long step has come."""
        if self._live:
            self._err.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Shows a spinner while the block runs."""
        with self._err.status(name) if self._live else contextlib.nullcontext():
            yield

    def track(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Yields the items behind a progress bar."""
        if not self._live:
            return iter(items)
        return iter(rich.progress.track(items, name, total=total, console=self._err))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    total: Sequence[str] | None = None,
) -> Table:
    """A table without the columns that are empty in every row.

    Args:
      columns: names; one with a leading ">" is aligned to the right.
      rows: one cell per column.
      total: a last row, apart from the others.
    """
    rows = list(rows)
    used = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    made = Table(box=None, pad_edge=False)
    for k in used:
        right = columns[k].startswith(">")
        made.add_column(
            columns[k].removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(row[k] for k in used))
    if total is not None:
        made.add_section()
        made.add_row(*(total[k] for k in used))
    return made


def report_table(
    report: Report, errors: Mapping[str, float] | None = None, *, packed: bool = True
) -> Table:
    """What pruning did to every weight.

    Args:
      report: of the run.
      errors: path -> relative error of the outputs, where that is known.
      packed: whether there is a packed form.
    """
    errors = errors or {}

    def sizes(dense: float, small: float) -> tuple[str, str]:
        return (bytes_text(int(dense)), bytes_text(int(small))) if packed else ("", "")

    total = report.total
    return table(
        (
            *("weight", "shape", ">zeros", ">error", ">dense", ">packed"),
            *(">saliency kept", "note"),
        ),
        [
            (
                row.path,
                "x".join(map(str, row.shape)),
                f"{row.zeros:.2%}",
                f"{errors[row.path]:.4f}" if row.path in errors else "",
                *sizes(row.dense_bytes, row.packed_bytes),
                f"{row.retained:.2%}",
                row.note if packed else "",
            )
            for row in report.rows
        ],
        (
            *("all pruned weights", "", f"{total['zeros']:.2%}", ""),
            *sizes(total["dense_bytes"], total["packed_bytes"]),
            *(f"{total['retained']:.2%}", ""),
        ),
    )


def bytes_text(count: int) -> str:
    """A number of bytes for people, in decimal units: "1.5 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class _Rich(rich.console.Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with status 1; `main` knows what a closed pipe means.
        raise BrokenPipeError


def _console(file: Any) -> rich.console.Console:
    made = _Rich(file=file, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made
