"""Finds which leaves of a parameter tree are contracted, with what, along which axes.

The function is traced and walked once without running it. Every contraction of a leaf
becomes a `Use`; every other leaf is skipped for a reason that a person can act on.
"""

import dataclasses
import difflib
import html
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax import numpy as jnp

from flexhinm_jax import arguments
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.tracing.finder import Traced
from flexhinm_jax.tracing.program import is_array
from flexhinm_jax.tracing.scales import on_grid
from flexhinm_jax.tracing.stops import Kind, Stop
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import AxisFactor, Layout, Use, Uses

logger = logging.getLogger("flexhinm_jax")

#: Skipped leaves that are listed by name with their reason.
MAX_SKIPPED_LINES = 3


def discover(
    apply_fn: Callable,
    params: Any,
    *batch: Any,
    rules: dict[str, Pattern | str] | None = None,
) -> Uses:
    """Finds the matrices of a model.

    Args:
      apply_fn: pure function, called as apply_fn(params, *batch).
      params: any tree of arrays or `jax.ShapeDtypeStruct`s.
      *batch: the other arguments, arrays or abstract arrays; anything else is static.
      rules: regex -> a pattern for the leaves it matches, "skip" to leave them dense,
        or "prune" to prune a leaf that is skipped by default. The first rule whose
        `re.search` on the normalised path succeeds wins. A leaf that is read as an
        embedding and also contracted (a tied head) is skipped unless a rule asks for
        it. A leaf whose dense value is also needed otherwise, or that is contracted in
        different layouts, is skipped unless a rule says "prune".

    Returns:
      Every leaf, as uses that can be pruned or as skipped with a reason.

    Raises:
      ValueError: a rule that matches no leaf, is neither a pattern nor a known word, or
        whose leaves can all not be pruned.
    """
    arguments.parameters(params)
    leaves = Leaves.of(params)
    paths, finder = list(leaves), Traced.of(apply_fn).find(params, batch)
    chosen = choose(rules or {}, paths)
    by_leaf = {path: finder.of(path) for path in paths}
    skipped, prunable = {}, set()
    for path, leaf in leaves.items():
        hindrance = finder.hindrance(path) if by_leaf[path] else None
        reason = hindrance.text if hindrance else None
        if not by_leaf[path]:
            reason = finder.reason(path, leaf)
        rule, action = chosen.get(path, (None, None))
        if action == "skip":
            reason = f"skipped by rule {rule!r}"
        elif by_leaf[path] and (action == "prune" or (action and tied(hindrance))):
            reason = None
        if reason is None:
            prunable.add(path)
        else:
            skipped[path] = reason
    for rule, action in (rules or {}).items():
        hits = [path for path in paths if chosen.get(path, (None,))[0] == rule]
        if action != "skip" and hits and not prunable.intersection(hits):
            reasons = "; ".join(f"{path}: {skipped[path]}" for path in hits[:3])
            raise ValueError(f"rule {rule!r} asks to prune what cannot be: {reasons}")
    uses = []
    for _, use in finder.uses:
        if use.path in prunable:
            action = chosen.get(use.path, (None, None))[1]
            pattern = action if isinstance(action, Pattern) else None
            uses.append(dataclasses.replace(use, pattern=pattern))
    logger.info("%d leaves prunable, %d skipped", len(prunable), len(skipped))
    dense = {path: leaves[path].size for path in skipped if is_weight(leaves[path])}
    return Uses(tuple(renumbered(uses)), skipped, dense)


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is floating, or of eight bits, and has two or more axes."""
    floating = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return (floating or (is_array(leaf) and on_grid(leaf))) and len(leaf.shape) > 1


def tied(hindrance: Stop | None) -> bool:
    """Whether nothing but a lookup of rows speaks against pruning a leaf."""
    return hindrance is not None and hindrance.kind is Kind.LOOKUP


def choose(
    rules: dict[str, Pattern | str], paths: list[str]
) -> dict[str, tuple[str, Pattern | str]]:
    """Leaf path -> (rule, action) of the first rule that matches the path.

    Raises:
      ValueError: a rule that matches no path, or an unknown action.
    """
    if not isinstance(rules, Mapping):
        raise ValueError(
            f"rules is {arguments.shown(rules)}: need {{regex on leaf paths: pattern, "
            '"skip" or "prune"}'
        )
    for rule, action in rules.items():
        if not isinstance(rule, str):
            raise ValueError(
                f"rules: {arguments.shown(rule)} is no regular expression on leaf "
                "paths; write it as text"
            )
        if not isinstance(action, Pattern) and action not in ("skip", "prune"):
            raise ValueError(
                f'rule {rule!r}: expected a pattern, "skip" or "prune", got {action!r};'
                " patterns.parse reads the text form of a pattern"
            )
        try:
            re.compile(rule)
        except re.error as error:
            raise ValueError(
                f"rule {rule!r} is no regular expression: {error}; re.escape makes "
                "one of a path"
            ) from error
        if not any(re.search(rule, path) for path in paths):
            near = difflib.get_close_matches(rule, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"rule {rule!r} matches no leaf; the nearest paths are {near}"
            )
    out = {}
    for path in paths:
        for rule, action in rules.items():
            if path not in out and re.search(rule, path):
                out[path] = rule, action
    return out


def renumbered(uses: Iterable[Use]) -> list[Use]:
    """The uses with sources counted from 0 in order of execution."""
    numbers: dict[int, int] = {}
    return [
        dataclasses.replace(use, source=numbers.setdefault(use.source, len(numbers)))
        for use in uses
    ]


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
