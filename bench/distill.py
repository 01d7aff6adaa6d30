"""Pruned MiniLM recovered by distillation: fixed masks beside Hard Concrete gates.

    make bench-distill                                   # every row, 8 minutes each
    make bench-distill ARGS="--rows 2:4,75%"             # the two of the goals
    make bench-distill ARGS="--rows % --cpu-seconds 60 --calibration 512"    # shorter

Gates of `-gates` rows start sure of their masks, those of `-moving` near the middle;
`-expected` and `-decided` have no noise, `-slow` is `-expected` for long budgets.
Rows with `-2048` were pruned with that many sentences.
Every row prunes one-shot (`train.distill`), trains for its budget on the docstrings of
the installed packages, and is evaluated on sentences of `train.lab.text` from other
documents. Rows of the same sparsity start from the same pruned model. The budget counts
everything but reading the text and pruning: compilation, teacher, training. Run it on
an idle machine for minutes that mean something.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flexhinm_jax as fh
from bench import minilm
from bench.study import Row, Study, alone, chosen
from train import distill as program
from train.distill import Config
from train.lab import models, text
from train.lab.models import packed_again
from train.lab.recovery import Gates

TABLE = "all-MiniLM-L6-v2, pruned and distilled"


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


def configured(
    name: str, amount: float, unit: Any, calibration: int | None
) -> tuple[str, Config]:
    """(title of a row, its configuration) under a budget."""
    config = rows()[name]
    changes: dict[str, Any] = {"budget": fh.Duration(amount, unit)}
    if calibration is not None:
        changes["calibration"] = calibration
    return f"{name}, {amount:g} {unit}", dataclasses.replace(config, **changes)


def measure(starts: str, *told: Any) -> dict[str, Any]:
    """One row; `starts` keeps pruned matrices for rows with the same start."""
    title, config = configured(*told)
    made = models.load(evaluation=config.evaluation)
    lists = made.tokenize(program.training_text(config))
    key = f"{config.pattern}-{config.sparsity}-{config.calibration}"
    pruned = program.start_of(made, config, Path(starts, key.replace(":", "_")))
    params, plans, figures = program.recover(made, pruned, lists, config, None)
    result = packed_again(plans, params, pruned.uses)
    before, after = made.scores(pruned.params), made.scores(result.params)
    zeros = result.report.total["zeros"]
    row = Row(
        TABLE,
        title,
        after["cosine"],
        minilm.goal("distilled", zeros),
        figures["cpu_seconds"],
        {"before": before["cosine"]}
        | minilm.figures(after, zeros)
        | {"mask bits moved": figures["moved"]},
        {
            "config": program.checkpoints.describe(config),
            "pruned": before,
            "digest": text.digest(),
            **figures,
        },
    )
    return row._asdict()


def measured(flags: argparse.Namespace) -> Iterator[Row]:
    """The rows, each in a process of its own."""
    budget = (flags.minutes, "minutes")
    if flags.cpu_seconds is not None:
        budget = (flags.cpu_seconds, "cpu-seconds")
    with tempfile.TemporaryDirectory() as scratch:
        starts = str(flags.starts or scratch)
        for name in chosen(rows(), flags):
            yield Row(**alone(measure, starts, name, *budget, flags.calibration))


STUDY = Study(
    "distill",
    "Distillation",
    {"rows": measured},
    {
        TABLE: 'Mean cosine after training the remaining weights; "before" is the '
        "one-shot start. The anchor is the goal for eight minutes on two idle cores."
    },
    by_row=True,
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="wall, per row")
    add("--cpu-seconds", type=float, help="instead of minutes")
    add("--calibration", type=int, help="sentences, in place of those of the row")
    add("--starts", type=Path, help="folder that keeps pruned matrices")
    STUDY.main(parser)
