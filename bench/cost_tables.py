"""The tables about cost: times, bytes, kernels.

One function per file of bench/results/; `bench.report` calls them.
"""

from collections.abc import Iterator
from typing import Any

from bench.tables import Row, Table


def overhead(found: Any) -> Iterator[Table]:
    """Cost of a training step."""
    goals, rows = found.get("goals", {}), []
    for name, model in found.items():
        if not isinstance(model, dict) or "ratio" not in model:
            continue
        command = "python -m bench.training"
        rows += [
            Row(f"{name}: {step}", ratio, goals.get(step), None, command)
            for step, ratio in model["ratio"].items()
            if step != "dense"
        ]
        change = model.get("stage_change_dense_steps")
        limit = goals.get("stage change, dense steps")
        what = f"{name}: change of a stage, in dense steps"
        rows.append(Row(what, change, limit, None, command))
    yield Table(
        "Training, CPU time over the dense step",
        "Median CPU time relative to the dense step of the same run, smaller is "
        "better; the anchor is the goal in `bench/training.py`; below 1 meets it.",
        rows,
    )


def scale(found: Any) -> Iterator[Table]:
    """Peak memory and time of streamed decoders, and growth with the width."""
    rows = []
    for name, run in found.items():
        if not isinstance(run, dict) or "peak" not in run:
            continue
        goal = run.get("goal_peak")
        rows.append(
            Row(
                name,
                run["peak"] / 2**30,
                None if goal is None else goal / 2**30,
                None,
                f'make bench-scale ARGS="--only {name}"',
                {
                    "planned GiB": run["plan"]["planned peak"] / 2**30,
                    "seconds of all blocks": sum(run["blocks_s"]),
                    "CPU s": run["cpu_seconds"],
                    "load of the machine": run.get("load"),
                },
            )
        )
    yield Table(
        "Peak resident memory in GiB, interpreter included",
        "The anchor is the goal; a ratio below 1 meets it. Seconds are wall time.",
        rows,
    )
    grown = found.get("growth", {}).get("rows", [])
    before: dict[str, float] = {}
    rows = []
    for r in grown:
        name, taken = r["method"], r["cpu_s"]
        ratio = {"times half the width": taken / before[name]} if name in before else {}
        before[name] = taken
        what = f"{name}, {r['width']} x {r['width']}"
        command = 'make bench-scale ARGS="--only growth --wide"'
        rows.append(Row(what, taken, None, None, command, ratio))
    if rows:
        yield Table(
            "Growth with the width",
            "CPU seconds of a second solve of one square matrix, 2:4, compilation not "
            "included (`bench/results/scale.png`).",
            rows,
        )


def peers(found: Any) -> Iterator[Table]:
    """The same formulas in PyTorch."""
    command = "make bench-peers"

    def row(r: Any, what: str) -> Row:
        ours, theirs = r.get("ours cpu_s"), r.get("torch 1 thread")
        return Row(
            what,
            ours,
            theirs,
            None,
            command,
            {
                "error or score, ours / PyTorch": r["ratio"],
                "same support": r["same support"],
            },
        )

    rows = [row(r, f"{r['method']}, seed {r['seed']}") for r in found.get("layers", [])]
    rows += [row(r, f"{r['method']}, {r['size']}") for r in found.get("masks", [])]
    yield Table(
        f"Beside PyTorch {found.get('torch', '')}",
        "CPU seconds after compilation; the anchor is the published formula in PyTorch "
        "with one thread, in the same run; a ratio below 1 is faster.",
        rows,
    )


def kernels(found: Any) -> Iterator[Table]:
    """Packed products on the CPU."""
    rows = []
    for r in found.get("layers", []):
        out, inputs = r["shape"]
        dense = min(
            t["cpu_ms"] for name, t in r["times"].items() if name.startswith("dense")
        )
        rows.append(
            Row(
                f"{out} x {inputs}, batch {r['batch']}",
                r["times"]["prepared"]["cpu_ms"],
                dense,
                None,
                'make bench-kernels ARGS="--only layers"',
                {
                    "dense / prepared": dense / r["times"]["prepared"]["cpu_ms"],
                    "dense / packed": dense / r["times"]["packed"]["cpu_ms"],
                    "packed bytes": r["bytes"],
                },
            )
        )
    machine = found.get("machine", {})
    yield Table(
        "Packed products on a CPU, FlexHiNM at 75 %",
        "CPU milliseconds of a prepared packed product; the anchor is the faster dense "
        f"layout in the same run (load {machine.get('load', 0):.3g} on "
        f"{machine.get('cores', '?')} cores); a ratio below 1 is faster than dense.",
        rows,
    )
    command = 'make bench-kernels ARGS="--only minilm"'
    rows = [
        Row(
            f"V={r['vector_size']}, {r['sentences']} x {r['tokens']} tokens",
            r["prepared"]["cpu_ms"],
            1.15,
            None,
            command,
            {
                "wall ratio": r["prepared"]["median_ms"],
                "ratio of minima": r["prepared"]["min_ms"],
                "not prepared": r["packed"]["cpu_ms"],
            },
        )
        for r in found.get("minilm", [])
    ]
    yield Table(
        "MiniLM packed on a CPU, 75 %",
        "CPU time of the dense model over that of the prepared one, larger is better; "
        "the anchor is the goal.",
        rows,
    )


def gpu(found: Any) -> Iterator[Table]:
    """GPU kernels."""
    command = "make bench-gpu"
    where = found.get("device", "?")
    where += ", interpreted" if found.get("interpreted") else ""
    worst: dict[str, list[float]] = {}
    for r in found.get("numerics", []):
        worst.setdefault(r["kernel"], []).append(r["worst"])
    rows = [
        Row(f"{kernel}, {len(each)} cases", max(each), 1.0, None, command)
        for kernel, each in worst.items()
    ]
    yield Table(
        f"GPU kernels, numerics ({where})",
        "Largest error in units of the tolerance; the anchor, 1, is the limit.",
        rows,
    )
    times = found.get("times")
    if not isinstance(times, list):
        rows = [Row("every kernel", None, None, None, f"{command}  # on a GPU")]
        yield Table("GPU kernels, times", "No run on a GPU is recorded.", rows)
        return
    rows = []
    for r in times:
        for kernel in kernels_of(r):
            rows.append(
                Row(
                    f"{r['size']}, {r['n']} tokens, {kernel}",
                    r[kernel] * 1e6,
                    r["dense"] * 1e6,
                    None,
                    command,
                    {
                        "times faster than dense": r["dense"] / r[kernel],
                        "share of the roofline": r["floor"] / r[kernel],
                    },
                )
            )
    yield Table(
        f"GPU kernels, times ({where})",
        "Microseconds of one product; the anchor is the dense product (cuBLAS), a "
        "ratio below 1 is faster.",
        rows,
    )


def kernels_of(row: Any) -> list[str]:
    """Names of the kernels that a row of GPU times has a time of."""
    given = ("size", "n", "dense", "floor")
    return [k for k, v in row.items() if k not in given and isinstance(v, float)]


def gpu_compile(found: Any) -> Iterator[Table]:
    """Kernels compiled offline."""
    chips: dict[tuple[str, str], list[Any]] = {}
    for case in found.get("cases", []):
        chips.setdefault((case["chip"], case["kernel"]), []).append(case)
    rows = [
        Row(
            f"{chip}, {kernel}",
            sum(not c["failures"] for c in cases),
            len(cases),
            None,
            "make gpu-compile",
            {
                "registers, most": max(c["registers"] for c in cases),
                "spills": sum(c["spills"] for c in cases),
            },
        )
        for (chip, kernel), cases in chips.items()
    ]
    yield Table(
        "GPU kernels compiled offline",
        "Cases that pass; the anchor is how many there are. Compiled, not executed.",
        rows,
    )
