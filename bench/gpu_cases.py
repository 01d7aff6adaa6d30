"""The rows of one process of `bench.gpu`: a case at a time, each with its time.

What hangs, or ends its process, is known by the row that was written when it began.
"""

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.study import Row

SINCE = "BENCH_GPU_SINCE"
"""Environment of a process: bytes of rows.jsonl before its part."""

PATIENCE = "BENCH_GPU_PATIENCE"
"""Environment of a process: seconds of a case after which it ends itself."""

LOST = 75
"""Code of a process that ends because its GPU no longer answers it."""


class Case(NamedTuple):
    """A row to measure.

    Attributes:
      table: of the row.
      what: names the row.
      measure: fields of the row; what it raises is kept as data.
      data: what is known before.
    """

    table: str
    what: str
    measure: Callable[[], dict[str, Any]]
    data: dict[str, Any] = {}


def rows(cases: Iterable[Case], shard: int, known: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a shard: each when its case begins, then with what came out.

    Args:
      cases: to measure.
      shard: its number.
      known: data of every row.
    """
    for case in cases:
        data = {**known, **case.data}
        row = Row(case.table, case.what, None, data=data)
        ended = {"begun by": shard, "error": "its process ended before it did"}
        yield row._replace(data=data | ended)
        watch()
        try:
            fields = case.measure()
        except Exception as error:
            traceback.print_exc()
            fields = {"data": {"error": f"{type(error).__name__}: {error}"[:2000]}}
        faulthandler.cancel_dump_traceback_later()
        yield row._replace(**fields | {"data": data | fields.get("data", {})})


def watch() -> None:
    """From now on a case has its time; then the process ends, whatever it waits for."""
    if seconds := os.environ.get(PATIENCE):
        faulthandler.dump_traceback_later(float(seconds), exit=True)


def run(
    cases: Iterable[Case],
    shard: int,
    out: Path,
    known: Mapping[str, Any],
    answers: Callable[[], bool],
    command: str,
) -> None:
    """Writes every row when it is there; leaves out those of an earlier process.

    Args:
      cases: of the shard.
      shard: its number.
      out: folder of the run.
      known: data of every row.
      answers: whether programs still run; asked after an error.
      command: writes the rows again.

    Raises:
      SystemExit: code `LOST`.
    """
    since = int(os.environ.get(SINCE, "0"))
    done = {(row["table"], row["what"]) for row in lines(out, since)}
    fresh = (case for case in cases if (case.table, case.what) not in done)
    for row in rows(fresh, shard, known):
        write(out, row._replace(command=command))
        print(row.table, row.what, row.value, row.data.get("error", ""), flush=True)
        if "error" in row.data and "begun by" not in row.data and not answers():
            sys.exit(LOST)


def write(out: Path, row: Row) -> None:
    """Appends a row at once: several processes write, lines stay whole."""
    line = json.dumps(row.document()) + "\n"
    handle = os.open(out / "rows.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def lines(out: Path, since: int = 0) -> list[dict[str, Any]]:
    """All that was written; a line that a killed process left is skipped.

    Args:
      out: folder of the run.
      since: bytes to leave out.
    """
    path, rows = out / "rows.jsonl", []
    text = path.read_bytes()[since:].decode() if path.exists() else ""
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def read(out: Path, since: int = 0) -> list[dict[str, Any]]:
    """All rows so far, each as it was written last."""
    rows = {(row["table"], row["what"]): row for row in lines(out, since)}
    return list(rows.values())
