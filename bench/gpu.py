"""GPU kernels in one short command: whether they are right, then how fast they are.

    python3 -m bench.gpu --out DIR --seconds 420

Runs with any Python that has jax, CUDA and this folder; nothing is installed. Every
part is a process with a time limit; every row is written to DIR/rows.jsonl when it is
there, in the form of `study.Row`. What ends a part, its rows stay and the others run:

    setup       versions, bandwidth and dense rate of the chip
    numerics    exact integers in every form of the kernel, twice
    times       packed, expanded and dense products; wall and kernel time
    cusparselt  2:4 by torch, in CUDA graphs
    block       the products of a decoder block, decode and prefill
    solvers     Gyro, TSENOR, SparseGPT, ALPS

A wrong or failing case leaves DIR/failed/CASE: seed, inputs, the matrix that the kernel
believes in (x = the identity), where it differs, PTX and machine code. `--merge` puts
the rows into bench/results/gpu.json. Without a GPU the sizes are tiny, the kernel is
interpreted (jax >= 0.11.2), and no time is that of a GPU.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import report, study

NUMERICS, TIMES = "GPU kernels, numerics", "GPU kernels, times"
BLOCK, SOLVERS, PARTS = "GPU, a decoder block", "GPU, solvers", "GPU, parts of the run"
STUDY = study.Study(
    "gpu",
    "Packed products, GPU",
    {},
    {
        NUMERICS: "Wrong elements of an exact product; the anchor is the limit.",
        TIMES: "Microseconds of one product; the anchor is the dense product (cuBLAS), "
        "a ratio below 1 is faster.",
        BLOCK: "Microseconds of all products of a block; the anchor is dense.",
        SOLVERS: "Seconds of one matrix on the GPU, compiled before.",
        PARTS: "Seconds; the anchor is the limit. 1 in `failed`: it did not end well.",
    },
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that runs in processes of its own.

    Attributes:
      share: of the seconds of the whole run.
      shards: processes at a time; each does its share of the cases. They compile at a
        time, and measure one after the other.
    """

    share: float
    shards: int = 1


CORES = os.cpu_count() or 1

PARTS_OF_RUN = {
    "setup": Part(0.05),
    "numerics": Part(0.2, shards=max(1, min(8, CORES // 2))),
    "times": Part(0.36, shards=min(4, CORES)),
    "cusparselt": Part(0.12),
    "block": Part(0.17, shards=min(3, CORES)),
    "solvers": Part(0.1),
}
"""Most of the time of numerics, times and a block goes into compiling, a core each."""


def write(out: Path, row: study.Row) -> None:
    """Appends a row at once: several processes write, lines stay whole."""
    line = json.dumps(row.document()) + "\n"
    handle = os.open(out / "rows.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read(out: Path) -> list[dict[str, Any]]:
    """All rows so far; a line that a killed process left is skipped."""
    path, rows = out / "rows.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def command(name: str, shard: int, out: Path) -> list[str]:
    """Starts one process of a part."""
    return [sys.executable, "-m", "bench.gpu_parts", name, str(shard), str(out)]


def run_part(
    name: str,
    part: Part,
    out: Path,
    seconds: float,
    start: Callable[[str, int, Path], list[str]] = command,
) -> bool:
    """Runs the processes of a part, ends them after `seconds`; whether all ended well.

    What they print goes to DIR/NAME-SHARD.log.
    """
    began = time.monotonic()
    root = report.BENCH.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = os.environ | {"PYTHONPATH": path}
    settings.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    running = []
    for shard in range(part.shards):
        log = (out / f"{name}-{shard}.log").open("w")
        process = subprocess.Popen(
            start(name, shard, out),
            cwd=root,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        running.append((process, log))
    ends = []
    for process, log in running:
        left = max(0.0, began + seconds - time.monotonic())
        try:
            ends.append(f"code {process.wait(left)}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ends.append("time limit")
        log.close()
    well = all(end == "code 0" for end in ends)
    more = {"failed": int(not well)}
    taken = round(time.monotonic() - began, 1)
    row = study.Row(PARTS, name, taken, round(seconds, 1), None, more, {"ended": ends})
    write(out, row)
    print(f"{name}: {taken} s, {', '.join(ends)}", flush=True)
    return well


def run(out: Path, seconds: float, names: Iterable[str]) -> bool:
    """Runs parts one after the other; each gets its share of what is left."""
    out.mkdir(parents=True, exist_ok=True)
    end, well = time.monotonic() + seconds, True
    left = {name: PARTS_OF_RUN[name] for name in names}
    while left:
        name, part = next(iter(left.items()))
        share = part.share / sum(p.share for p in left.values())
        limit = share * (end - time.monotonic())
        well &= run_part(name, part, out, limit)
        del left[name]
    return well


def main() -> int:
    """Runs the parts, prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--only", default=",".join(PARTS_OF_RUN), help="parts")
    parser.add_argument("--merge", action="store_true", help="into bench/results")
    flags = parser.parse_args()
    unknown = [n for n in flags.only.split(",") if n not in PARTS_OF_RUN]
    if unknown:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS_OF_RUN)}")
    well = run(flags.out.resolve(), flags.seconds, flags.only.split(","))
    rows = read(flags.out)
    for table, note in STUDY.notes.items():
        of_table = [row for row in rows if row["table"] == table]
        if of_table:
            print(report.markdown(table, note, of_table))
    if flags.merge:
        for row in rows:
            study.merge(report.RESULTS / "gpu.json", STUDY, row)
    wrong = [r for r in rows if r["table"] == NUMERICS and r.get("value")]
    required = [r for r in wrong if not r.get("data", {}).get("tried")]
    print(f"{len(rows)} rows, {len(required)} wrong; failures in {flags.out}/failed")
    return 0 if well and not required else 1


if __name__ == "__main__":
    sys.exit(main())
