"""Metrics as lines of JSON, a progress bar on a terminal, tables and figures.

    with log.Log(folder / "metrics.jsonl", total=600, title="dense") as records:
        records.write(step, loss=0.5)

Every record is on disk when `write` returns, so a stopped run keeps what it measured.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import flexhinm_jax as fh
from flexhinm_jax.training.run import NotFinite


class Diverged(ValueError):
    """The loss is not a number any more."""


class Log:
    """Writes records to a file and shows the last one beside a bar."""

    def __init__(self, path: Path | None, total: int, title: str, start: int = 0):
        """Opens the log.

        Args:
          path: JSONL file; None writes nothing.
          total: steps of the whole run, for the bar.
          title: what runs.
          start: step that the run begins with: records behind it, left by a run that
            was stopped, are dropped; 0 begins a new file.
        """
        self.records = [] if path is None else read(path, before=start)
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
            for record in self.records:
                self._file.write(json.dumps(record) + "\n")
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, last="")

    def __enter__(self) -> "Log":
        """Shows the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Closes the file and leaves the bar as it is."""
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def write(self, step: int, **values: Any) -> dict[str, Any]:
        """Appends one record; arrays become lists.

        Args:
          step: finished steps.
          **values: numbers, arrays or text.

        Raises:
          Diverged: a value named "loss" or ending in "_loss" is not finite; the record
            is written before.
        """
        record = {"step": step} | {k: _plain(v) for k, v in values.items()}
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        shown = [f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)]
        self._bar.update(self._task, completed=step, last=", ".join(shown[:3]))
        for name, value in record.items():
            if name.endswith("loss") and not np.all(np.isfinite(value)):
                raise Diverged(
                    f"{name} is {value} at step {step}: the run diverged; lower the "
                    "learning rate, or clip the gradients. What was written before "
                    "is kept"
                )
        return record


def follow(
    run: fh.Run,
    path: Path | None,
    title: str,
    total: int = 0,
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {},
) -> list[dict[str, Any]]:
    """Drives a run to its end and writes its steps.

    Args:
      run: the run.
      path: JSONL file, or None.
      title: what runs.
      total: steps of the whole run, for the bar; 0 where time is the limit.
      more: row -> further values.

    Returns:
      The records, those before an interruption too.

    Raises:
      Diverged: a loss or gradient is not finite.
    """
    left_out = ("kind", "step", "stage", "part", "seconds", "finite", "grad_norm")
    try:
        rows = iter(run)
        row = next(rows, None)
        with Log(path, total, title, start=run.begun) as records:
            while row is not None:
                if row["kind"] == "step" and "loss" in row:
                    values = {k: v for k, v in row.items() if k not in left_out}
                    records.write(row["step"], **more(row), **values)
                row = next(rows, None)
            return records.records
    except NotFinite as error:
        raise Diverged(str(error)) from None


def read(path: Path, before: float = math.inf) -> list[dict[str, Any]]:
    """The records of a file up to step `before`, included; a torn last line is left."""
    if before <= 0 or not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= before:
            found.append(record)
    return found


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
    """Prints a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(title=title)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


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


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()
