"""Pruned MiniLM recovered by distillation: fixed masks beside Hard Concrete gates.

    make bench-distill                                   # every row, 8 minutes each
    make bench-distill ARGS="--rows 2:4,75%"             # the two of the goals
    make bench-distill ARGS="--quick"                    # the gates' question, shorter

Gates of `-gates` rows start sure of their masks, those of `-moving` near the middle;
`-expected` and `-decided` have no noise, `-slow` is `-expected` for long budgets.
Rows with `-2048` were pruned with that many sentences.
Every row prunes one-shot (`train.distill`), trains for its budget on the docstrings of
the installed packages, and is evaluated on sentences of `train.corpus` from other
documents. Rows of the same sparsity start from the same pruned model. The budget counts
everything but reading the text and pruning: compilation, teacher, training. Results are
added to bench/results/distill.json after every row; run on an idle machine for minutes
that mean something.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train import distill as program
from train import log, minilm
from train.distill import Config
from train.gated import Gates
from train.recovery import Budget

OUT = Path("bench/results/distill.json")


def rows() -> dict[str, Config]:
    """Name -> configuration."""
    hinm = Config(pattern="hinm:v=32")
    found = {"2:4": Config(calibration=2048)}
    for title, sparsity in (("75%", 0.75), ("87.5%", 0.875), ("93.75%", 0.9375)):
        fixed = dataclasses.replace(hinm, sparsity=sparsity)
        found[title] = fixed
        sampled = Gates(
            share=0.5,
            rate=0.01,
            optimizer="adam",
            start=1.0,
            temperature=(2 / 3, 0.1),
            sparsity_weight=0.01,
            relaxation="soft",
        )
        better = dataclasses.replace(fixed, calibration=2048)
        found[f"{title}-2048"] = better
        for name, gates in (
            ("gates", sampled),
            ("moving", dataclasses.replace(sampled, share=0.3, rate=0.02, start=0.5)),
            ("expected", Gates()),
            ("slow", Gates(rate=0.001)),
            ("decided", Gates(temperature=(0.5, 0.5), relaxation="decided")),
        ):
            found[f"{title}-{name}"] = dataclasses.replace(fixed, gates=gates)
    return found


def chosen(args: argparse.Namespace) -> dict[str, Config]:
    """The rows that the flags ask for, with their budgets.

    Raises:
      ValueError: an unknown row.
    """
    known = rows()
    names = args.rows.split(",") if args.rows else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown row {name!r}; known: {', '.join(known)}")
    budget, calibration = Budget(args.minutes, "minutes"), None
    if args.cpu_seconds is not None:
        budget = Budget(args.cpu_seconds, "cpu-seconds")
    if args.quick:
        names = [name for name in names if name in args.rows.split(",") or "%" in name]
        budget, calibration = Budget(args.cpu_seconds or 60, "cpu-seconds"), 512
    return {
        name: dataclasses.replace(
            known[name],
            budget=budget,
            calibration=calibration or known[name].calibration,
        )
        for name in names
    }


def measure(name: str, config: Config, starts: Path) -> dict[str, Any]:
    """One row; `starts` keeps pruned matrices for rows with the same start."""
    made = program.load(minilm.model_directory(), config.evaluation)
    lists = program.tokenize(made.model, program.training_text(config))
    key = f"{config.pattern}-{config.sparsity}-{config.calibration}"
    folder = starts / key.replace(":", "_")
    pruned = program.start_of(made, config, folder)
    params, plans, figures = program.recover(made, pruned, lists, config, None)
    result = program.packed_again(plans, params, pruned.uses)
    return {
        "name": name,
        "config": program.checkpoints.describe(config),
        "pruned": made.scores(pruned.params),
        "distilled": made.scores(result.params),
        "zeros": result.report.total["zeros"],
        **figures,
        "digest": program.corpus.digest(),
    }


def table(found: list[dict[str, Any]]) -> None:
    """Prints the rows."""
    columns = ("row", "budget", "pruned", "distilled", "5 %", "Spearman", "moved")
    lines = []
    for r in found:
        budget = r["config"]["budget"]
        lines.append(
            [
                r["name"],
                f"{budget['amount']:g} {budget['unit']}",
                f"{r['pruned']['cosine']:.4f}",
                f"{r['distilled']['cosine']:.4f}",
                f"{r['distilled']['quantile']:.4f}",
                f"{r['distilled']['spearman']:.4f}",
                "" if r["moved"] is None else f"{r['moved']:.1%}",
            ]
        )
    log.show("all-MiniLM-L6-v2, pruned and distilled: cosines", columns, lines)


def main() -> None:
    """Runs the rows, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="", help="names, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall, per row")
    parser.add_argument("--cpu-seconds", type=float, help="instead of minutes")
    parser.add_argument("--quick", action="store_true", help="60 CPU seconds a row")
    parser.add_argument("--starts", type=Path, help="folder for pruned matrices")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        row = measure(args.row, chosen(args)[args.row], args.starts)
        args.out.write_text(json.dumps(row))
        return
    try:
        configs = chosen(args)
    except ValueError as error:
        raise SystemExit(f"bench.distill: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        starts = args.starts or Path(scratch)
        for name, config in configs.items():
            part = Path(scratch, "row.json")
            command = [sys.executable, "-m", "bench.distill", *sys.argv[1:]]
            command += ["--rows", name, "--row", name]
            command += ["--starts", str(starts), "--out", str(part)]
            if subprocess.run(command, check=False).returncode:
                continue
            row = json.loads(part.read_text())
            unit = config.budget.unit
            title = f"{name} {config.budget.amount:g} {unit}"
            known = json.loads(args.out.read_text()) if args.out.exists() else {}
            known[title] = row
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(known, indent=1) + "\n")
            table([row])
    if args.out.exists():
        table(list(json.loads(args.out.read_text()).values()))


if __name__ == "__main__":
    main()
