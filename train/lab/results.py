"""Runs with records as lines of JSON and a progress bar, tables and figures."""

import contextlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

import flexhinm_jax as fh
from flexhinm_jax.cli import console
from flexhinm_jax.io.checkpoints import Checkpoints
from flexhinm_jax.io.records import read_lines, write_lines

#: What JAX reports after every compilation, reading a cached program included.
COMPILED = "/jax/core/compile/backend_compile_duration"

#: Of a row of a run: what is no figure of its step.
PLACES = ("kind", "step", "stage", "part", "seconds", "finite", "grad_norm")


class Clock:
    """Seconds of a program, and how many of them XLA compiled.

    Attributes:
      compiled: seconds in the compiler since the clock was made.
    """

    def __init__(self):
        """Starts."""
        self.compiled = 0.0
        self._started = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def __str__(self) -> str:
        """Such as "226 seconds, 31 % of them compiling"."""
        seconds = time.perf_counter() - self._started
        share = self.compiled / seconds
        return f"{math.ceil(seconds)} seconds, {100 * share:.0f} % of them compiling"

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            self.compiled += duration_secs


def follow(
    run: fh.Run,
    path: Path | None,
    title: str,
    total: int = 0,
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> list[dict[str, Any]]:
    """Drives a run to its end and writes its steps, each before the next is taken.

    Args:
      run: the run.
      path: JSONL file; None writes nothing. Records after the step that a continued
        run begins with are dropped.
      title: what runs.
      total: steps of the whole run, for the bar; 0 where time is the limit.
      more: row -> further values.

    Returns:
      The records, those before an interruption too.

    Raises:
      NotFinite: a loss or gradient is not finite.
    """
    rows = iter(run)
    first = next(rows, None)

    def record(row: dict[str, Any]) -> dict[str, Any]:
        figures = {k: v for k, v in row.items() if k not in PLACES}
        return {"step": row["step"]} | more(row) | figures

    def is_step(row: dict[str, Any]) -> bool:
        return row["kind"] == "step" and "loss" in row

    records = [] if path is None else read(path, before=run.begun)
    # A run that died between its checkpoint and the record of that step has the row.
    known = {one["step"] for one in records}
    before = [row for row in run.rows if is_step(row) and row["step"] <= run.begun]
    records += [record(row) for row in before if row["step"] not in known]
    if path is not None:
        write_lines(path, records, append=False)
    with _bar(title, total, run.begun) as show:
        for row in () if first is None else itertools.chain([first], rows):
            if is_step(row):
                records.append(record(row))
                if path is not None:
                    write_lines(path, records[-1:], append=True)
                show(records[-1])
    return records


@contextlib.contextmanager
def _bar(title: str, total: int, start: int) -> Iterator[Callable[[dict], None]]:
    """A bar on a terminal, and what shows a record beside it."""
    terminal = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
        console=terminal,
        disable=not terminal.is_terminal,
    )
    task = bar.add_task(title, total=total, completed=start, last="")

    def show(record: dict) -> None:
        shown = [f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)]
        bar.update(task, completed=record["step"], last=", ".join(shown[:3]))

    with bar:
        yield show


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """A bar for every task, by its name; off a terminal a line for each."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    known: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:

        def show(name: str, done: float, total: float) -> None:
            if name not in known:
                known[name] = shown.add_task(name, total=total)
                if not console.is_terminal:
                    console.print(name, highlight=False)
            shown.update(known[name], completed=done, total=total)

        yield show


def saves(folder: Path, resume: bool, every: int | None = None, **more: Any) -> Any:
    """The checkpoints of a run: it continues from the newest, or removes old ones.

    Args:
      folder: of this run alone.
      resume: whether to continue.
      every: steps between two.
      **more: see `io.checkpoints.Checkpoints`.
    """
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    return Checkpoints(folder, every, resume="older", **more)


def read(path: Path, before: float = math.inf) -> list[dict[str, Any]]:
    """The records of a file up to step `before`, included; a torn last line is left."""
    return [record for record in read_lines(path) if record["step"] <= before]


def update(path: Path, **parts: Any) -> None:
    """Replaces parts of a JSON document and leaves its other parts alone."""
    document = json.loads(path.read_text()) if path.exists() else {}
    document.update(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; figures, all but the first column, to the right."""
    aligned = [columns[0], *(f">{name}" for name in columns[1:])]
    console.Console().result({}, title, console.table(aligned, rows))


def curves(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Sequence[str],
) -> None:
    """One panel per metric, one line per run, over the steps.

    Args:
      path: image file.
      runs: name of the run -> its records.
      names: metrics; one that no record has gets no panel. A list in a record, one
        number per seed, is drawn as its mean.
    """
    from matplotlib.figure import Figure

    present = {k for records in runs.values() for r in records for k in r}
    names = [name for name in names if name in present]
    figure = Figure(figsize=(2.0 + 4.0 * max(1, len(names)), 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        for title, records in runs.items():
            points = [(r["step"], np.mean(r[name])) for r in records if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=title, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1 and names:
        labels = panels[0].get_legend_handles_labels()
        figure.legend(*labels, loc="outside right upper", fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
