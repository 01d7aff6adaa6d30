"""Tables of measured figures beside their anchors, as Markdown."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_MEASURED = "not measured"


class Row(NamedTuple):
    """One line of a table.

    Attributes:
      what: what was measured, in words.
      value: the figure, or None when the file does not hold it.
      anchor: what it is held against, or None.
      seconds: CPU seconds, or None.
      command: writes the figure again.
      more: further figures, by name.
    """

    what: str
    value: float | None
    anchor: float | None
    seconds: float | None
    command: str
    more: Mapping[str, Any] = {}


class Table(NamedTuple):
    """Rows that are measured in one way.

    Attributes:
      title: heading.
      note: what the figure, the anchor and the ratio are.
      rows: the lines.
    """

    title: str
    note: str
    rows: list[Row]


def number(x: Any) -> str:
    """Four significant digits, or that it was not measured."""
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return NOT_MEASURED
    if isinstance(x, bool):
        return "yes" if x else "no"
    return f"{x:.4g}" if isinstance(x, int | float) else str(x)


def cell(text: str) -> str:
    """Text for a cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def markdown(table: Table) -> str:
    """A table with its heading and note; columns without any figure are left out."""
    heads = ["", "measured"]
    anchored = any(row.anchor is not None for row in table.rows)
    timed = any(row.seconds is not None for row in table.rows)
    heads += ["anchor", "ratio"] if anchored else []
    names = list(dict.fromkeys(name for row in table.rows for name in row.more))
    heads += names + (["CPU s"] if timed else []) + ["command"]
    lines = [f"### {table.title}", "", table.note, ""]
    lines.append(f"| {' | '.join(heads)} |")
    lines.append("|" + "---|" * len(heads))
    for row in table.rows:
        cells = [cell(row.what), number(row.value)]
        if anchored:
            known = row.anchor not in (None, 0) and row.value is not None
            cells.append("" if row.anchor is None else number(row.anchor))
            cells.append(number(row.value / row.anchor) if known else "")
        cells += [number(row.more[n]) if n in row.more else "" for n in names]
        if timed:
            cells.append("" if row.seconds is None else f"{row.seconds:.3g}")
        lines.append(f"| {' | '.join([*cells, f'`{cell(row.command)}`'])} |")
    return "\n".join(lines) + "\n"
