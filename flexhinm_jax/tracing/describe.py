"""What `discover` found, as text: tables, and how much of a model is pruned."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from flexhinm_jax import arguments
from flexhinm_jax.types import AxisFactor, Layout, Uses

#: Skipped leaves that are listed by name with their reason.
MAX_SKIPPED_LINES = 3


def describe(uses: Uses) -> str:
    """A table of all leaves: shape, axes by role, and what happens to them.

    Axes are leaf axes; `1/8:3` is a factor of axis 1, three steps of eight positions.
    The last lines say which share of the weights can be pruned, and what the largest
    leaves were skipped for.

    Args:
      uses: from `discover`.

    Returns:
      The text, one leaf a line.

    Example:
      >>> import jax.numpy as jnp
      >>> from flexhinm_jax.tracing.discover import discover
      >>> params, x = {"b": jnp.ones(4), "w": jnp.ones((8, 4))}, jnp.ones((2, 8))
      >>> text = describe(discover(lambda p, x: x @ p["w"] + p["b"], params, x))
      >>> [line.split() for line in text.splitlines()][2]
      ['w', '8x4', '1', '0', 'pruned']
    """
    arguments.found(uses)
    rows: list[tuple[str, ...]] = []
    counts: dict[str, int] = {}
    for use in uses:
        counts[use.path] = counts.get(use.path, 0) + 1
    for path, use in uses.leaves.items():
        layout, note = use.layout, "pruned"
        if counts[path] > 1:
            note += f", {counts[path]} uses"
        if use.pattern is not None:
            note += f", {use.pattern}"
        groups = (layout.stack, layout.out, layout.inputs)
        axes = [",".join(axis_name(f, layout) for f in group) for group in groups]
        rows.append((path, "x".join(map(str, layout.shape)), *axes, note))
    rows += [(path, "", "", "", "", reason) for path, reason in uses.skipped.items()]
    table = aligned(("leaf", "shape", "stack", "out", "in", ""), rows)
    pruned = sum(math.prod(use.layout.shape) for use in uses.leaves.values())
    return "\n".join([table, *coverage_lines(pruned, uses.dense, uses.skipped)])


def none_left(every: Iterable[Uses]) -> str:
    """Says that no weight is left to prune, and what left the matrices out.

    Args:
      every: from `discover`, without a leaf that can be pruned.

    Returns:
      One matrix for each of the first reasons: layers are alike.
    """
    why: dict[str, str] = {}
    for uses in every:
        for path in uses.dense:
            why.setdefault(uses.skipped[path], path)
    told = [f"{path}: {reason}" for reason, path in why.items()][:MAX_SKIPPED_LINES]
    return (
        f"no weight is left to prune ({'; '.join(told) or 'there is no matrix'});"
        f" {arguments.say('describe')} lists them all"
    )


def coverage_lines(
    pruned: int, dense: Mapping[str, int], skipped: Mapping[str, str]
) -> list[str]:
    """How much of a model is pruned, for people.

    Args:
      pruned: weights of the pruned leaves.
      dense: path -> weights of skipped leaves that are floating and have two or more
        axes.
      skipped: path -> reason.

    Returns:
      The share of the weights, then the largest skipped leaves with their reasons.

    Example:
      >>> for line in coverage_lines(30, {"table": 10}, {"table": "an embedding"}):
      ...     print(line)
      pruned 75.00% of the 40 floating weights in leaves with two or more axes
        table: 10 weights skipped, an embedding
    """
    every = pruned + sum(dense.values())
    share = pruned / max(every, 1)
    largest = sorted(dense, key=lambda path: -dense[path])[:MAX_SKIPPED_LINES]
    return [
        f"pruned {share:.2%} of the {every:,} floating weights in leaves with two or "
        "more axes",
        *(
            f"  {p}: {dense[p]:,} weights skipped, {skipped.get(p, '')}"
            for p in largest
        ),
    ]


def axis_name(f: AxisFactor, layout: Layout) -> str:
    """The leaf axis, or the factor of one as axis/stride:size."""
    whole = f.size == layout.shape[f.axis]
    return str(f.axis) if whole else f"{f.axis}/{f.stride}:{f.size}"


def aligned(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table: text to the left, numbers to the right.

    Args:
      header: column titles.
      rows: cells; a float is shown with four digits.

    Returns:
      Lines without trailing blanks.
    """
    text, right = _cells(header, rows)
    widths = [max(map(len, column)) for column in zip(header, *text, strict=True)]
    lines = [header, ["-" * w for w in widths], *text]
    return "\n".join(
        "  ".join(
            c.rjust(w) if r else c.ljust(w)
            for c, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The table of `aligned` in HTML, for notebooks; every cell is escaped."""
    text, right = _cells(header, rows)
    sides = ["right" if r else "left" for r in right]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in text)
    head = f"<thead><tr>{line('th', header)}</tr></thead>"
    return f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>"


def _cells(
    header: Sequence[str], rows: Iterable[Sequence[object]]
) -> tuple[list[list[str]], list[bool]]:
    """The cells as text, and which columns hold numbers alone."""
    body = [list(row) for row in rows]
    right = [
        bool(body) and all(isinstance(row[j], int | float) for row in body)
        for j in range(len(header))
    ]
    return [[_cell(c) for c in row] for row in body], right


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
