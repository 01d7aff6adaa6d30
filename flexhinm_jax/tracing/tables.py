"""Plain-text tables with aligned columns."""

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table: text to the left, numbers to the right.

    Args:
      header: column titles.
      rows: cells; a float is shown with four digits.

    Returns:
      Lines without trailing blanks.
    """
    body = [list(row) for row in rows]
    text = [[_cell(c) for c in row] for row in body]
    right = [
        bool(body) and all(isinstance(row[j], int | float) for row in body)
        for j in range(len(header))
    ]
    widths = [max(map(len, column)) for column in zip(header, *text, strict=True)]
    lines = [header, ["-" * w for w in widths], *text]
    return "\n".join(
        "  ".join(
            c.rjust(w) if r else c.ljust(w)
            for c, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
