"""What all benchmarks share: rows of one form, the files that keep them, stopwatches.

A benchmark is a module of this folder with a `Study`, run by `make bench-NAME`. Its
parts yield rows. Every row is merged into bench/results/NAME.json when it is there, so
a run that is stopped keeps what it measured, and `bench.report` renders the files
without knowing any benchmark: a new one is one new file. docs/benchmarks.md writes one.
"""

import argparse
import dataclasses
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench import report

#: Environment of a process that computes with one thread: XLA's, then the BLAS's.
ONE_THREAD = dict.fromkeys(
    ("NPROC", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


class Row(NamedTuple):
    """One line of a table.

    Attributes:
      table: heading of the table.
      what: what was measured, in words; names the row within its table.
      value: the figure.
      anchor: what it is held against; None takes that of bench/anchors.json, if any.
      seconds: CPU seconds, or None.
      more: further figures, by name; columns of the table.
      data: what else is worth keeping (curves, settings); not shown.
      command: writes the figure again; `Study.main` fills it in.
    """

    table: str
    what: str
    value: float | None
    anchor: float | None = None
    seconds: float | None = None
    more: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}
    command: str = ""

    def document(self) -> dict[str, Any]:
        """The row as it is stored: without empty mappings."""
        return {k: v for k, v in self._asdict().items() if v != {}}


@dataclasses.dataclass(frozen=True)
class Study:
    """A benchmark.

    Attributes:
      name: of its module and of its file of results.
      title: heading of its section.
      parts: name -> yields rows; called with the flags.
      notes: table -> what its figure and its anchor are, and which way is better.
      by_row: whether `--rows` chooses rows, so that a row has a command of its own.
    """

    name: str
    title: str
    parts: Mapping[str, Callable[[argparse.Namespace], Iterable[Row]]]
    notes: Mapping[str, str]
    by_row: bool = False

    def parser(self, about: str | None) -> argparse.ArgumentParser:
        """The flags that every benchmark has."""
        made = argparse.ArgumentParser(description=(about or "").split("\n")[0])
        add = made.add_argument
        add("--only", default=",".join(self.parts), help="parts, with commas")
        if self.by_row:
            add("--rows", default="", help="rows whose name has one of these texts")
        add("--out", type=Path, help=f"file instead of bench/results/{self.name}.json")
        return made

    def main(self, parser: argparse.ArgumentParser) -> None:
        """Runs the parts that were asked for and merges their rows into the file."""
        flags = parser.parse_args()
        unknown = [part for part in flags.only.split(",") if part not in self.parts]
        if unknown:
            raise SystemExit(
                f"error: --only {unknown[0]}: choose from {', '.join(self.parts)}"
            )
        path = flags.out or report.RESULTS / f"{self.name}.json"
        measured: dict[str, list[dict[str, Any]]] = {}
        for part in flags.only.split(","):
            for row in self.parts[part](flags):
                known = row._replace(command=row.command or self._command(part, row))
                if row.anchor is None:
                    known = known._replace(anchor=anchors(row.table).get(row.what))
                document = known.document()
                merge(path, self, document)
                measured.setdefault(row.table, []).append(document)
                line = f"{row.table}: {row.what}: {report.number(row.value)}"
                print(line, file=sys.stderr, flush=True)
        if not measured:
            raise SystemExit("error: no row has that name")
        for table, rows in measured.items():
            print(report.markdown(table, self.notes.get(table, ""), rows))

    def _command(self, part: str, row: Row) -> str:
        """Chooses the row and repeats the other flags that were given."""
        flags = ["--only", part] if len(self.parts) > 1 else []
        flags += ["--rows", row.what.split(",")[0]] if self.by_row else []
        given = iter(sys.argv[1:])
        for flag in given:
            if flag in ("--only", "--rows", "--out"):
                next(given)
            elif not flag.startswith(("--only=", "--rows=", "--out=")):
                flags.append(flag)
        arguments = f' ARGS="{shlex.join(flags)}"' if flags else ""
        return f"make bench-{self.name}{arguments}"


def chosen(names: Iterable[str], flags: argparse.Namespace) -> list[str]:
    """The names that `--rows` asks for: equal to a text of it, else containing one."""
    known, texts = list(names), flags.rows.split(",")
    equal = [name for name in known if name in texts]
    return equal or [name for name in known if any(text in name for text in texts)]


def anchors(table: str) -> dict[str, Any]:
    """Name of a row -> what it is held against, of bench/anchors.json."""
    return json.loads((report.BENCH / "anchors.json").read_text()).get(table, {})


def merge(path: Path, study: Study, row: Mapping[str, Any]) -> None:
    """Puts a row in the place of the former one of its name, else at the end."""
    document: Any = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = {(r["table"], r["what"]): r for r in document["rows"]}
    rows[row["table"], row["what"]] = dict(row)
    notes = document.get("notes", {}) | study.notes
    tables = {r["table"] for r in rows.values()}
    document = {
        "title": study.title,
        "measured": {"python": ".".join(map(str, sys.version_info[:3]))} | machine(),
        "notes": {table: note for table, note in notes.items() if table in tables},
        "rows": list(rows.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Version of jax, cores and load: what times depend on."""
    import jax

    return {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


class Timed(NamedTuple):
    """What a call returned, and its CPU seconds: the first time, the least, median."""

    result: Any
    first: float
    least: float
    median: float


def timed(call: Callable[[], Any], repeats: int = 3) -> Timed:
    """Calls once, then `repeats` times, in process time; waits for the arrays."""
    import jax

    spent = []
    for _ in range(1 + repeats):
        before = time.process_time()
        result = jax.block_until_ready(call())
        spent.append(time.process_time() - before)
    again = sorted(spent[1:] or spent)
    return Timed(result, spent[0], again[0], again[len(again) // 2])


def use_cores(count: int) -> None:
    """Keeps this process on so many cores; XLA computes with as many threads.

    NumPy's and PyTorch's libraries are kept to one thread by `ONE_THREAD`.

    Raises:
      SystemExit: it may not use as many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if count > len(allowed):
        raise SystemExit(
            f"error: {count} cores are wanted and this process may use {len(allowed)};"
            " ask for fewer, or start it with more of them (taskset)"
        )
    os.sched_setaffinity(0, allowed[-count:])


def alone(call: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """What `call(*args)` returns in a process of its own; both ways as JSON.

    Args:
      call: a function of a module.
      *args: anything that JSON knows.
      **environment: further variables of the environment.

    Raises:
      RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "bench.study", call.__module__, call.__name__]
    spec = sys.modules["__main__"].__spec__
    if call.__module__ == "__main__" and spec is not None:
        command[3] = spec.name
    done = subprocess.run(
        [*command, json.dumps(args)],
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{call.__name__}{args} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    called = getattr(importlib.import_module(module), function)
    print("\n" + json.dumps(called(*json.loads(arguments))))
