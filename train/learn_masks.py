"""Learns masks of frozen weights by every method and compares them.

    python -m train.learn_masks --minutes 10                     # MiniLM, all rows
    python -m train.learn_masks --methods 'wanda>maskllm,refine_mask>patch@0.25' \\
        --cpu-seconds 300
    python -m train.learn_masks --model bytes --steps 500 --loss kl

Every row gets the same calibration sentences or bytes: one-shot rows their statistics,
learned rows the same budget of training steps or time on them, compilation included.
The weights stay as they are except in rows that say so. Hard masks are validated on
calibration data held back from training, the best are kept, the first among them; the
figures are those of evaluation data that nothing was chosen by.

Writes into `--out`: rows/ (a JSON document for every finished row, and its masks),
metrics/ (JSONL), summary.json and table.md. With `--resume` finished rows are read from
there, and the row that was stopped goes on at its last checkpoint.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import flexhinm_jax as fh
from flexhinm_jax.training.run import NotFinite
from train.lab import results, text
from train.lab.masks import problems, rows
from train.lab.masks.comparison import Comparison, table
from train.lab.masks.learner import Learner
from train.lab.masks.problems import Problem


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    add("--model", default="minilm", help="minilm, bytes, or an encoder directory")
    add(
        "--methods",
        default=",".join(rows.DEFAULT),
        help=f"rows, separated by commas: {', '.join(rows.known())}; "
        "NAME@SPARSITY for tiles, START>NAME to start from another row's masks",
    )
    add("--data", type=Path, help="text: a sentence a line, or bytes to predict")
    time_or_steps = made.add_mutually_exclusive_group()
    time_or_steps.add_argument("--minutes", type=float, help="wall time per row")
    time_or_steps.add_argument("--cpu-seconds", type=float, help="per row (600)")
    add("--steps", type=int, help="at most so many; alone: reproducible to the bit")
    add("--sentences", type=int, default=4096, help="calibration sentences")
    add("--statistics", type=int, default=1024, help="the first ones, for Grams")
    add("--evaluation", type=int, default=512, help="evaluation sentences")
    add("--rows", type=int, help="packed rows of sentences in a step")
    add("--dense-steps", type=int, help="of the byte model")
    add("--loss", choices=("cross_entropy", "kl"), default="cross_entropy")
    add("--rates", default="", help="peak learning rates: maskllm=1e-3,patch=1e-3")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder of the results; out/masks-<model>")
    add("--resume", action="store_true", help="go on where the last run stopped")
    add("--checkpoint-seconds", type=float, default=60.0, help="between checkpoints")
    return made


def budget(args: argparse.Namespace) -> fh.Duration:
    """The budget of a learned row.

    Raises:
      ValueError: a budget that is not positive.
    """
    if args.minutes is not None:
        return fh.Duration(args.minutes, "minutes", args.steps)
    if args.cpu_seconds is None and args.steps is not None:
        return fh.Duration(float(args.steps), "steps")
    seconds = 600.0 if args.cpu_seconds is None else args.cpu_seconds
    return fh.Duration(seconds, "cpu-seconds", args.steps)


def learners(text: str) -> dict[str, Learner]:
    """The learners, with the rates of a text in place of their own.

    Raises:
      ValueError: an unknown name, or a rate that is not a positive number.
    """
    found = dict(rows.LEARNERS)
    for part in filter(None, text.split(",")):
        name, _, rate = part.partition("=")
        if name not in found:
            raise ValueError(f"--rates {part}: choose from {', '.join(found)}")
        try:
            found[name] = dataclasses.replace(found[name], rate=float(rate))
        except ValueError as error:
            raise ValueError(f"--rates {part}: {error}") from None
    return found


def problem_of(args: argparse.Namespace, out: Path) -> Problem:
    """The model and its data."""
    if args.model == "bytes":
        return problems.bytes_decoder(
            out,
            path=args.data,
            dense_steps=args.dense_steps,
            seed=args.seed,
            loss=args.loss,
        )
    recipe = problems.RECIPE
    recipe = dataclasses.replace(recipe, seed=args.seed, rows=args.rows or recipe.rows)
    return problems.minilm(
        None if args.model == "minilm" else Path(args.model),
        sentences=args.sentences,
        calibration=args.statistics,
        evaluation=args.evaluation,
        given=None if args.data is None else text.from_files([args.data]),
        recipe=recipe,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    args = parser().parse_args(argv)
    out = args.out or Path("out", f"masks-{Path(args.model).name}")
    try:
        texts = [row.text for row in map(rows.parse, args.methods.split(","))]
        given, trained = budget(args), learners(args.rates)
        out.mkdir(parents=True, exist_ok=True)
        problem = problem_of(args, out)
        comparison = Comparison(
            problem,
            given,
            out,
            seed=args.seed,
            learners=trained,
            resume=args.resume,
            every=args.checkpoint_seconds,
        )
        lines = list(comparison.rows(texts))
    except (ValueError, NotFinite, OSError) as error:
        raise SystemExit(f"learn_masks: {error}") from error
    results.show(f"masks of {problem.name}", *table(lines, problem.score))
    print(f"wrote {out}/")


if __name__ == "__main__":
    main()
