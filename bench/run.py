"""Runs every benchmark that this machine can run, one after the other.

    make bench                                 # everything: many hours on two cores
    make bench ARGS=--list                     # what would run, what not, and why
    make bench ARGS="--only oneshot,gyro"
    make bench ARGS=--quick                    # the short form, where there is one

A benchmark is a module of this folder with a `Study`: a new one is found by itself.
Each runs in a process of its own, prints into out/bench/NAME.log and writes
bench/results/. One that fails is reported and the others run. At the end `bench.report`
renders bench/RESULTS.md. Exits with 1 if anything failed.
"""

import argparse
import shutil
import subprocess
import sys
import time

from bench import report

ROOT = report.BENCH.parent
LOGS = ROOT / "out" / "bench"

#: Modules that need an environment of their own, and the target that makes it.
ENVIRONMENTS = {
    "peers": (".venv-peers", "make bench-peers"),
    "gpu_compile": (".venv-gpu", "make gpu-compile"),
}
#: Modules that need a file, and the target that makes it.
FILES = {"language_models": (".cache/SmolLM2-135M/config.json", "make bench-llm")}
SHARED = {"study", "report", "run", "picture", "house", "gpu_parts", "pipeline"}


def benchmarks() -> list[str]:
    """Names of the modules that can be started, in the order of the report."""
    return sorted(
        (
            path.stem
            for path in report.BENCH.glob("*.py")
            if path.stem not in SHARED and '__name__ == "__main__"' in path.read_text()
        ),
        key=report.place,
    )


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def reason_to_skip(name: str, quick: bool) -> str | None:
    """Why a benchmark cannot run here, or None."""
    if name == "gpu" and not has_gpu():
        return "needs an NVIDIA GPU"
    environments = {k: (f"{at}/bin/python", by) for k, (at, by) in ENVIRONMENTS.items()}
    file, target = (FILES | environments).get(name, (None, None))
    if file is not None and not (ROOT / file).exists():
        return f"needs {file}; `{target}` makes it and runs this benchmark"
    if quick and '"--quick"' not in (report.BENCH / f"{name}.py").read_text():
        return "has no short form"
    return None


def run(name: str, quick: bool, limit: float | None) -> str:
    """Runs one benchmark; says how it ended."""
    folder, _ = ENVIRONMENTS.get(name, (None, None))
    python = sys.executable if folder is None else ROOT / folder / "bin" / "python"
    command = [str(python), "-m", f"bench.{name}", *(["--quick"] if quick else [])]
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"STOPPED after {limit:g} s"
    if done.returncode == 0:
        return "done"
    last = [*log.read_text().splitlines(), "no output"][-2:][0]
    return f"FAILED ({done.returncode}): {last[:120]}; see {log.relative_to(ROOT)}"


def main() -> int:
    """Runs the chosen benchmarks and the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="short forms alone")
    parser.add_argument("--limit", type=float, help="seconds for each of them")
    parser.add_argument("--list", action="store_true", help="say what would run")
    flags = parser.parse_args()
    known = benchmarks()
    chosen = flags.only.split(",") if flags.only else known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(known)}")
    failed = 0
    for place, name in enumerate(chosen, start=1):
        head = f"[{place}/{len(chosen)}] {name:12}"
        skip = reason_to_skip(name, flags.quick)
        if skip is not None or flags.list:
            print(head, f"skipped: {skip}" if skip else "would run", flush=True)
            continue
        print(head, end=" ", flush=True)
        began = time.monotonic()
        ended = run(name, flags.quick, flags.limit)
        print(f"{ended} ({time.monotonic() - began:.0f} s)", flush=True)
        failed += ended != "done"
    if not flags.list:
        command = [sys.executable, "-m", "bench.report"]
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
