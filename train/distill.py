"""Prunes all-MiniLM-L6-v2 and recovers it by distilling its own dense embeddings.

    python -m train.distill --pattern 2:4 --minutes 8
    python -m train.distill --pattern hinm:v=32 --sparsity 0.75 --minutes 8
    python -m train.distill --steps 200 --out out/short      # reproducible to the bit

ALPS finds supports and weights, matrix by matrix (`flexhinm_jax.prune_sequential`);
then all weights of the layers are trained under these supports on unlabeled sentences,
the docstrings of the installed packages or the files of `--text`. Evaluation is on
sentences of `train.lab.text` from other documents, as in `bench.minilm`.

Writes into `--out`: `model/` (a Hugging Face directory with zeros in place, with
packed.safetensors and report.json), metrics.jsonl, curves.png, summary.json, and
`checkpoints/` while it runs. A run that was killed goes on where its last checkpoint is
when the same command is given again.
"""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import flexhinm_jax as fh
from flexhinm_jax import atomic
from flexhinm_jax.io import checkpoints, huggingface, packed
from flexhinm_jax.training.run import NotFinite
from train.lab import models, results, text
from train.lab.models import Encoder, method, packed_again
from train.lab.recovery import Gates, Recovery
from train.lab.teacher import Recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
      pattern: text form of the pattern, as on the command line: "2:4", "hinm:v=32".
      sparsity: fraction of weights removed; None for a pattern that has only one.
      calibration: sentences that ALPS is fitted to.
      sentences: distinct training sentences, at most.
      text: files with training text, one sentence a line; none takes `text.training`.
      evaluation: sentences to evaluate on.
      budget: how long to train.
      recipe: how to train.
      gates: Hard Concrete gates that move the masks first; None fixes the masks.
    """

    pattern: str = "2:4"
    sparsity: float | None = None
    calibration: int = 1024
    sentences: int = 30_000
    text: tuple[str, ...] = ()
    evaluation: int = 512
    budget: fh.Duration = fh.Duration(8.0, "minutes")
    recipe: Recipe = Recipe()
    gates: Gates | None = None

    def __post_init__(self):
        """Validates what needs no data."""
        for name in ("calibration", "sentences", "evaluation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        method(self.pattern)


def recover(
    made: Encoder,
    start: fh.Pruned,
    lists: Sequence[Sequence[int]],
    config: Config,
    out: Path | None,
    *,
    every: float = 60.0,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Trains a pruned encoder under its masks.

    Args:
      made: the dense model.
      start: what `prune` returned.
      lists: token ids of the training sentences.
      config: recipe, budget and gates.
      out: folder for metrics.jsonl and checkpoints, where a run goes on if it was
        killed; None keeps nothing.
      every: seconds between checkpoints.

    Returns:
      The parameters, the plans, and figures: steps, sentences seen, seconds.

    Raises:
      ValueError: too few sentences, or checkpoints of a run with another
        configuration.
      NotFinite: a loss or gradient is not finite.
    """
    cpu, saves = time.process_time(), None
    if out is not None:
        folder = out / "checkpoints"
        saves = checkpoints.Checkpoints(folder, None, resume="older", seconds=every)
    gates = None
    if config.gates is not None:
        gates = config.gates, method(config.pattern).pattern
    run = Recovery(
        made.params,
        start,
        lists,
        made.model.config,
        config.recipe,
        config.budget,
        gates,
        saves=saves,
        told=config,
    )
    total = int(config.budget.amount) if config.budget.unit == "steps" else 0
    path = None if out is None else out / "metrics.jsonl"
    records = results.follow(run, path, "distilling", total, run.figures)
    figures = {
        "steps": run.step,
        "spent": run.spent,
        "sentences_seen": sum(record["sentences"] for record in records),
        "sentences": run.sentences.used,
        "cpu_seconds": time.process_time() - cpu,
        "moved": run.moved,
    }
    return run.params(), run.plans(), figures


def write(
    out: Path, made: Encoder, result: fh.Pruned, summary: Mapping[str, Any]
) -> None:
    """Writes the model, the summary and the curves."""
    with atomic.directory(out / "model", overwrite=True) as folder:
        huggingface.write(
            folder,
            result.params,
            source=made.model.directory,
            report={"base": made.name, **result.report.to_dict()},
            overwrite=True,
        )
        packed.write_packed(folder / "packed.safetensors", result.packed)
    results.update(out / "summary.json", **summary)
    records = results.read(out / "metrics.jsonl")
    results.curves(
        out / "curves.png", {"student": records}, ("loss", "cosine", "hidden")
    )


def start_of(made: Encoder, config: Config, folder: Path | None) -> fh.Pruned:
    """The pruned model before training; `folder` keeps finished matrices."""
    return models.prune(
        made,
        config.pattern,
        config.sparsity,
        config.calibration,
        seed=config.recipe.seed,
        folder=folder,
    )


def training_text(config: Config) -> list[str]:
    """The training sentences.

    Raises:
      FileNotFoundError: a text file is missing.
      ValueError: a text file is not UTF-8 or has no text.
    """
    if config.text:
        return text.from_files(map(Path, config.text))[: config.sentences]
    return text.training(config.sentences)


def show(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Prints the table of scores."""
    columns = ("model", "mean cosine", "5 %", "Spearman")
    names = ("cosine", "quantile", "spearman")
    cells = [[title, *(f"{r[n]:.4f}" for n in names)] for title, r in rows]
    results.show("embeddings beside those of the dense model", columns, cells)


def parser() -> argparse.ArgumentParser:
    """The flags; their defaults are those of `Config`."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    add("--pattern", default=Config.pattern, help="2:4, hinm:v=32, flexhinm:v=32 ...")
    add("--sparsity", type=float, help="fraction removed; not for n:m")
    add("--calibration", type=int, default=Config.calibration, help="sentences of ALPS")
    add("--text", action="append", default=[], help="training text, a sentence a line")
    add("--sentences", type=int, default=Config.sentences, help="distinct, at most")
    add("--evaluation", type=int, default=Config.evaluation, help="sentences")
    time_or_steps = made.add_mutually_exclusive_group()
    time_or_steps.add_argument(
        "--minutes", type=float, help="wall time of training (8)"
    )
    time_or_steps.add_argument("--cpu-seconds", type=float, help="of this process")
    time_or_steps.add_argument("--steps", type=int, help="reproducible to the bit")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    add("--gates", action="store_true", help="Hard Concrete gates move the masks first")
    for field in dataclasses.fields(Gates):
        kind = type(field.default)
        if kind in (float, str):
            name = f"--gate-{field.name.replace('_', '-')}"
            add(name, type=kind, default=field.default)
    add("--model", type=Path, help="model directory; default: all-MiniLM-L6-v2")
    add("--start", type=Path, help="folder for the pruned matrices, used again later")
    add("--out", type=Path, default=Path("out/distill"))
    add("--checkpoint-seconds", type=float, default=60.0, help="between checkpoints")
    return made


def configuration(args: argparse.Namespace) -> Config:
    """The configuration that the flags give.

    Raises:
      ValueError: a value is out of range, or the pattern is unknown.
    """
    budget = Config.budget
    for unit in ("minutes", "cpu-seconds", "steps"):
        amount = getattr(args, unit.replace("-", "_"))
        if amount is not None:
            budget = fh.Duration(float(amount), unit)
    names = [field.name for field in dataclasses.fields(Recipe)]
    chosen = {
        field.name: getattr(args, f"gate_{field.name}")
        for field in dataclasses.fields(Gates)
        if hasattr(args, f"gate_{field.name}")
    }
    return Config(
        pattern=args.pattern,
        sparsity=args.sparsity,
        calibration=args.calibration,
        sentences=args.sentences,
        text=tuple(args.text),
        evaluation=args.evaluation,
        budget=budget,
        recipe=Recipe(**{name: getattr(args, name) for name in names}),
        gates=Gates(**chosen) if args.gates else None,
    )


def run(
    config: Config,
    model: Path | None,
    out: Path,
    start: Path | None = None,
    every: float = 60.0,
) -> dict[str, Any]:
    """Prunes, recovers, writes; returns the summary.

    Args:
      config: what to do.
      model: model directory; None for all-MiniLM-L6-v2.
      out: folder to write.
      start: folder of pruned matrices; None for one in `out`.
      every: seconds between checkpoints.
    """
    seconds, clock = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    made = models.load(model, config.evaluation)
    lists = made.tokenize(training_text(config))
    lap("reading")
    pruned = start_of(made, config, start or out / "start")
    lap("pruning")
    params, plans, figures = recover(made, pruned, lists, config, out, every=every)
    lap("distilling")
    summary = {
        "config": checkpoints.describe(config),
        "pruned": made.scores(pruned.params),
        "distilled": made.scores(params),
        "seconds": seconds,
        **figures,
        "digest": text.digest(),
        "jax": jax.__version__,
    }
    write(out, made, packed_again(plans, params, pruned.uses), summary)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    args = parser().parse_args(argv)
    try:
        config = configuration(args)
        summary = run(config, args.model, args.out, args.start, args.checkpoint_seconds)
    except (ValueError, NotFinite, OSError) as error:
        raise SystemExit(f"distill: {error}") from error
    title = f"{config.pattern}" + (f", {config.sparsity}" if config.sparsity else "")
    show([(f"{title}, {k}", summary[k]) for k in ("pruned", "distilled")])
    console = Console(soft_wrap=True, highlight=False)
    parts = ", ".join(f"{k} {v:.0f} s" for k, v in summary["seconds"].items())
    console.print(
        f"{parts}; {summary['steps']} steps, {summary['sentences_seen']} sentences of "
        f"{summary['sentences']} distinct ones\nwrote {args.out}/"
    )


if __name__ == "__main__":
    main()
