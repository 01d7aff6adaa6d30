"""GPU kernels in one short command: whether they are right, then how fast they are.

    python3 -m bench.gpu --out DIR --seconds 420

Runs with any Python that has jax, CUDA and this folder; nothing is installed. Every
part is a process with a time limit; every row is written to DIR/rows.jsonl when it is
there, in the form of `study.Row`: first when its case begins, then with the figure. A
case that hangs or ends its process keeps the first, and the process is started again
after it. What ends a part, its rows stay and the others run:

    setup       versions, bandwidth and dense rate of the chip
    numerics    exact integers in every form of the kernel, twice; its self-check
    times       packed, expanded and dense products; wall and kernel time
    cusparselt  2:4 by torch, in CUDA graphs
    block       the products of a decoder block, decode and prefill; the kernel if the
                self-check of numerics passed
    solvers     Gyro, TSENOR, SparseGPT, ALPS

A form of the kernel that is wrong, fails, hangs or ends its process leaves
DIR/failed/FORM: seed and PTX, machine code where CUDA's nvdisasm is found (CUDA_ROOT,
else /usr/local/cuda). If it is wrong, also inputs, the matrix that the kernel believes
in (x = the identity) and where it differs, and it is tried without selector 1.
`--merge` puts the rows into bench/results/gpu.json. Without a GPU the sizes are tiny
and no time is that of a GPU; the kernel is interpreted, left out with jax < 0.11.2.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import report, study
from bench.gpu_cases import PATIENCE, SINCE, lines, read, write

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
      patience: share of the seconds of the part after which a case hangs.
    """

    share: float
    shards: int = 1
    patience: float = 0.5


CORES = os.cpu_count() or 1

PARTS_OF_RUN = {
    "setup": Part(0.05),
    "numerics": Part(0.25, shards=max(2, min(9, CORES // 2 + 1)), patience=0.25),
    "times": Part(0.34, shards=min(4, CORES)),
    "cusparselt": Part(0.1),
    "block": Part(0.16, shards=min(3, CORES), patience=0.75),
    "solvers": Part(0.1),
}
"""Most of the time of numerics, times and a block goes into compiling, a core each."""

CUDA = Path("/usr/local/cuda")


def command(name: str, shard: int, out: Path) -> list[str]:
    """Starts one process of a part."""
    return [sys.executable, "-m", "bench.gpu_parts", name, str(shard), str(out)]


class Shard:
    """A process of a part and all that it starts; again after a case that ends it.

    What they print goes to DIR/NAME-NUMBER.log.

    Args:
      begin: its command.
      log: file.
      settings: environment.
      begun: cases that the shard has begun, in all its processes.
    """

    def __init__(
        self,
        begin: list[str],
        log: Path,
        settings: dict[str, str],
        begun: Callable[[], int],
    ) -> None:
        self.begin, self.log, self.settings, self.begun = begin, log, settings, begun
        self.ends: list[str] = []
        self._start()

    def _start(self) -> None:
        self.before, self.ended = self.begun(), False
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.begin,
                cwd=report.BENCH.parent,
                env=self.settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its children end with it
            )

    def runs(self) -> bool:
        """Whether it goes on."""
        if not self.ended and (code := self.process.poll()) is not None:
            self._end(f"code {code}")
            if code and self.begun() > self.before:
                self._start()
        return not self.ended

    def stop(self) -> str:
        """Ends it if it still runs; how its processes ended."""
        if not self.ended:
            self._end("time limit")
        return ", ".join(self.ends)

    def _end(self, how: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ends.append(how)
        self.ended = True


def run_part(
    name: str,
    part: Part,
    out: Path,
    seconds: float,
    start: Callable[[str, int, Path], list[str]] = command,
) -> bool:
    """Runs the processes of a part for at most `seconds`; whether all ended well."""
    began = time.monotonic()
    path = out / "rows.jsonl"
    since = path.stat().st_size if path.exists() else 0
    settings = environment(since, part.patience * seconds)
    ends, shards = [], []
    try:
        for number in range(part.shards):
            begin, log = start(name, number, out), out / f"{name}-{number}.log"
            begun = functools.partial(cases_begun, out, since, number)
            shards.append(Shard(begin, log, settings, begun))
        while any([s.runs() for s in shards]) and time.monotonic() < began + seconds:
            time.sleep(0.05)
    finally:
        ends = [shard.stop() for shard in shards]
    well = all(end == "code 0" for end in ends)
    more = {"failed": int(not well)}
    taken = round(time.monotonic() - began, 1)
    row = study.Row(PARTS, name, taken, round(seconds, 1), None, more, {"ended": ends})
    write(out, row)
    print(f"{name}: {taken} s, {'; '.join(ends)}", flush=True)
    return well


def environment(since: int, patience: float) -> dict[str, str]:
    """Of the processes of a part.

    Args:
      since: `SINCE`.
      patience: `PATIENCE`.
    """
    path = [str(report.BENCH.parent), os.environ.get("PYTHONPATH")]
    made = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        SINCE: str(since),
        PATIENCE: str(patience),
    }
    made.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if (CUDA / "bin" / "nvdisasm").exists():  # else jax may find no tools at all
        made.setdefault("CUDA_ROOT", str(CUDA))
    return made


def cases_begun(out: Path, since: int, shard: int) -> int:
    """How many cases a shard has begun."""
    rows = lines(out, since)
    return sum(row.get("data", {}).get("begun by") == shard for row in rows)


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
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
    exact = [(row, row.get("data", {})) for row in rows if row["table"] == NUMERICS]
    wrong = sum(
        bool(row["value"] or "error" in data) and not data.get("tried")
        for row, data in exact
    )
    print(f"{len(rows)} rows, {wrong} wrong; failures in {flags.out}/failed")
    return 0 if well and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
