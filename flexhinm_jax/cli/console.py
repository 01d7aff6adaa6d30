"""What a command may show, and where.

Results go to stdout: tables for people, or one JSON document with `--json`. Progress
goes to stderr: live on a terminal, elsewhere a line for every tenth of a long step.
"""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import rich.console
import rich.progress
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flexhinm_jax.io import records
from flexhinm_jax.pruning.report import Report, Row

T = TypeVar("T")

Tell = Callable[[float, float], None]
"""Called with how much is done and how much there is in all."""

NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")
"""The number of a layer in the path of a leaf."""

SHORT_SECONDS = 2.0
"""A step that has not taken so long yet writes no lines."""

NAME_WIDTH = 16
"""Least columns of a name in a table."""

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
            print(records.text(document))
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
    def step(self, name: str, *, long: bool = False) -> Iterator[Tell]:
        """Shows what is going on while the block runs.

        Args:
          name: of the step.
          long: says that it has begun where there is no terminal to see a spinner.

        Yields:
          A function of (done, total) that shows how far the step has come: beside the
          spinner, or off a terminal as a line for every tenth.
        """
        if self._live:
            with self._err.status(name) as status:
                yield lambda done, total: status.update(f"{name}: {done} of {total}")
            return
        # Later, so that a mistake found at once stays the only line.
        begun = threading.Timer(SHORT_SECONDS, self.note, (name,))
        begun.daemon = True
        if long:
            begun.start()
        try:
            yield _Tenths(self, name)
        finally:
            begun.cancel()

    def track(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Yields the items and shows how many there were, see `step`."""
        if self._live:
            yield from rich.progress.track(items, name, total, console=self._err)
            return
        tell = _Tenths(self, name)
        for done, item in enumerate(items, 1):
            yield item
            tell(done, total)


class _Tenths:
    """Writes a line for every tenth of a step; none for one that is over at once."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        self.began, self.shown = time.monotonic(), 0

    def __call__(self, done: float, total: float) -> None:
        seconds, tenth = time.monotonic() - self.began, int(10 * done / total)
        if tenth > self.shown and seconds >= SHORT_SECONDS:
            self.shown = tenth
            part = f"{done:.0f} of {total:.0f} ({10 * tenth} %)"
            self.console.note(f"{self.name}: {part}, {seconds:.0f} s")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    total: Sequence[str] | None = None,
) -> Table:
    """A table without the columns that are empty in every row.

    Names, which the first column holds, are cut in the middle where there is no room.

    Args:
      columns: names; one with a leading ">" is aligned to the right.
      rows: one cell per column.
      total: a last row, apart from the others.
    """
    rows = list(rows)
    used = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    shown = Table(box=None, pad_edge=False)
    for k in used:
        right = columns[k].startswith(">")
        prose = not right and any(" " in row[k] for row in rows)
        shown.add_column(
            columns[k].removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=k > 0 and not prose,
        )
    for row in rows:
        shown.add_row(*(row[k] if k else Name(row[k]) for k in used))
    if total is not None:
        shown.add_section()
        shown.add_row(*(total[k] if k else Name(total[k]) for k in used))
    return shown


class Name:
    """A name in a table, on one line however narrow that is."""

    def __init__(self, text: str):
        """Takes the whole name."""
        self.text = text

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[Text]:
        """Shows what there is room for."""
        yield Text(cut(self.text, options.max_width), no_wrap=True)

    def __rich_measure__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Measurement:
        """Room for the whole name, or at least for its ends."""
        length = len(self.text)
        return Measurement(min(length, NAME_WIDTH), length)


def cut(text: str, width: int) -> str:
    """A name with its middle left out where it is longer than the width.

    Example:
      >>> cut("encoder.layer.*.output.dense.weight x6", 24)
      'encoder….dense.weight x6'
    """
    if len(text) <= width:
        return text
    tail = 2 * width // 3  # which tells the weights of a block apart
    return f"{text[: max(width - tail - 1, 0)]}…{text[len(text) - tail :]}"


def report_table(
    report: Report,
    errors: Mapping[str, float] | None = None,
    *,
    packed: bool = True,
    every: bool = False,
) -> Table:
    """What pruning did to every weight.

    Args:
      report: of the run.
      errors: path -> relative error of the outputs, where that is known.
      packed: whether there is a packed form.
      every: a row for each weight; otherwise equal ones of all layers share a row.
    """
    errors = errors or {}

    def cells(name: str, shape: str, rows: Sequence[Row], note: str) -> tuple[str, ...]:
        weights = sum(row.weights for row in rows)

        def mean(values: Iterable[float]) -> float:
            pairs = zip(rows, values, strict=True)
            return sum(row.weights * x for row, x in pairs) / max(weights, 1)

        known = [errors[row.path] for row in rows if row.path in errors]
        return (
            name,
            shape,
            f"{mean(row.zeros for row in rows):.2%}",
            f"{sum(known) / len(known):.4f}" if known else "",
            bytes_text(sum(row.dense_bytes for row in rows)) if packed else "",
            bytes_text(sum(row.packed_bytes for row in rows)) if packed else "",
            f"{mean(row.retained for row in rows):.2%}",
            note,
        )

    def kind(row: Row) -> tuple:
        return row.shape, row.note if packed else ""

    rows = {row.path: row for row in report.rows}
    return table(
        (
            *("weight", "shape", ">zeros", ">error", ">dense", ">packed"),
            *(">retained", "note"),
        ),
        [
            cells(name, "x".join(map(str, shape)), [rows[p] for p in paths], note)
            for name, paths, (shape, note) in groups(
                {path: kind(row) for path, row in rows.items()}, every
            )
        ],
        cells("all pruned weights", "", report.rows, ""),
    )


def groups(
    kinds: Mapping[str, Hashable], every: bool
) -> list[tuple[str, list[str], Any]]:
    """(name, paths, kind) of leaves that are equal but for the number of their layer.

    Args:
      kinds: path -> what leaves of a group share.
      every: each leaf is a group of its own.

    Example:
      >>> groups({"h.0.q": 1, "h.1.q": 1, "h.0.k": 1, "w": 1}, False)
      [('h.*.q x2', ['h.0.q', 'h.1.q'], 1), ('h.0.k', ['h.0.k'], 1), ('w', ['w'], 1)]
    """
    members: dict[Any, list[str]] = {}
    for path, kind in kinds.items():
        name = path if every else NUMBER.sub("*", path)
        members.setdefault((name, kind), []).append(path)
    return [
        (f"{name} x{len(paths)}" if len(paths) > 1 else paths[0], paths, kind)
        for (name, kind), paths in members.items()
    ]


def bytes_text(count: int) -> str:
    """A number of bytes for people, in the units that --memory takes: "1.5 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class _Rich(rich.console.Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with status 1; `main` knows what a closed pipe means.
        raise BrokenPipeError


def _console(file: Any) -> rich.console.Console:
    console = _Rich(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
