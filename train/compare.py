"""Compares all recipes on one task: a table, a figure, and who beats whom.

    python -m train.compare                        # digits, 9 recipes x 3 sparsities
    python -m train.compare --config digits_vit --seeds 0,1
    python -m train.compare --only dense,hinm_gyro,flexhinm_gp --sparsities 0.875

All runs start from the same dense model per seed and train for the same number of
further steps on the same batches. Writes comparison.json, comparison.md and
comparison.png into `--out`, and the records of every run below it.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

from train import language, log, loop, programs, vision
from train.recipes import Recipe, recipes
from train.tasks import Task

SPARSITIES = (0.75, 0.875, 0.9375)


def compare(
    task: Task,
    config: loop.Config,
    chosen: Mapping[str, Recipe],
    sparsities: Sequence[float],
    folder: Path,
    key: jax.Array,
) -> list[dict[str, Any]]:
    """Runs every recipe at every sparsity.

    Args:
      task: the task; its lanes are the seeds.
      config: how long and how fast.
      chosen: the recipes by name.
      sparsities: targets; a recipe that does not prune runs once.
      folder: gets the records of every run and the dense model.
      key: PRNG key, consumed.

    Returns:
      One row per run: recipe, target, zeros, seconds, and per metric of the task a list
      over the seeds; "moved" for learned masks whose start ran with fixed masks.
    """
    trainer = loop.Trainer(task, config)
    dense = trainer.dense(folder)
    rows = []
    fixed: dict[Any, Any] = {}
    for name, recipe in chosen.items():
        targets = sparsities if recipe.method is not None else (0.0,)
        for target in targets:
            before = time.process_time()
            path = folder / "runs" / f"{name}-{target:g}.jsonl"
            params, _ = trainer.prune(recipe, target, dense, key, path)
            found = {k: v.tolist() for k, v in task.evaluate(params).items()}
            if recipe.stages == 1:
                fixed[recipe.method, target] = params
            # The same start under masks that stay, if it ran before.
            scores = getattr(recipe.method, "scores", None)
            start = None if scores is None else fixed.get((scores, target))
            if start is not None:
                found["moved"] = loop.moved(task, start, params).tolist()
            rows.append(
                {
                    "recipe": name,
                    "title": recipe.title,
                    "target": target,
                    "zeros": loop.zeros(task, params).tolist(),
                    "cpu_seconds": time.process_time() - before,
                    **found,
                }
            )
            log.update(folder / "comparison.json", rows=rows)
    return rows


def verdict(a: Sequence[float], b: Sequence[float], level: float = 0.05) -> str:
    """Whether a is lower than b, seed by seed: "lower", "higher" or "tie".

    A tie is a paired t-test that does not reject equal means.

    Args:
      a: one number per seed.
      b: numbers of the same seeds.
      level: of significance, two-sided.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if len(difference) < 2 or np.ptp(difference) == 0:
        mean = difference.mean()
        return "tie" if len(difference) < 2 or mean == 0 else _sign(mean)
    p = scipy.stats.ttest_1samp(difference, 0.0).pvalue
    return _sign(difference.mean()) if p < level else "tie"


def _sign(x: float) -> str:
    return "lower" if x < 0 else "higher"


def table(
    rows: Sequence[Mapping[str, Any]], metric: str
) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: recipes down, targets across, mean and spread of a metric."""
    targets = sorted({r["target"] for r in rows if r["recipe"] != "dense"})
    columns = [metric.replace("_", " "), *(f"{100 * t:g} %" for t in targets)]
    lines = []
    for name in dict.fromkeys(r["recipe"] for r in rows):
        mine = {r["target"]: r for r in rows if r["recipe"] == name}
        first = next(iter(mine.values()))
        # A model that was not pruned has one figure for all columns.
        cells = [
            programs.spread((first if name == "dense" else mine[t])[metric])
            if name == "dense" or t in mine
            else ""
            for t in targets
        ]
        lines.append([first["title"], *cells])
    return columns, lines


def figure(path: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Mean and range over the seeds, one line per recipe, over the sparsity."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = drawing.subplots()
    names = list(dict.fromkeys(r["recipe"] for r in rows))
    targets = sorted({r["target"] for r in rows if r["recipe"] != "dense"})
    width = 0.8 / max(1, len(names) - 1)
    place = 0
    for name in names:
        mine = [r for r in rows if r["recipe"] == name]
        if name == "dense":
            mean = np.mean(mine[0][metric])
            axes.axhline(mean, color="#444444", linewidth=0.8, linestyle="--")
            axes.text(-0.45, mean, "dense", fontsize=7, va="bottom")
            continue
        x = [targets.index(r["target"]) - 0.4 + (place + 0.5) * width for r in mine]
        y = np.array([np.mean(r[metric]) for r in mine])
        low = y - [np.min(r[metric]) for r in mine]
        high = np.array([np.max(r[metric]) for r in mine]) - y
        axes.errorbar(
            x, y, [low, high], fmt="o", markersize=4, label=mine[0]["title"], capsize=2
        )
        place += 1
    axes.set_xticks(range(len(targets)), [f"{100 * t:g} % zeros" for t in targets])
    axes.set_ylabel(metric.replace("_", " "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=150)


def verdicts(
    rows: Sequence[Mapping[str, Any]], metric: str, base: str
) -> dict[str, dict[str, str]]:
    """Recipe -> target -> whether its metric is lower than that of `base`."""
    reference = {r["target"]: r[metric] for r in rows if r["recipe"] == base}
    found: dict[str, dict[str, str]] = {}
    for r in rows:
        if r["recipe"] not in (base, "dense") and r["target"] in reference:
            told = verdict(r[metric], reference[r["target"]])
            found.setdefault(r["recipe"], {})[f"{r['target']:g}"] = told
    return found


def write(
    folder: Path, rows: list[dict[str, Any]], metrics: Sequence[str], base: str
) -> dict[str, Any]:
    """Writes tables, figure and JSON; the first metric decides who wins.

    Returns:
      The document of comparison.json.
    """
    texts = []
    for metric in metrics:
        columns, lines = table(rows, metric)
        log.show(f"{metric.replace('_', ' ')}: mean ± deviation", columns, lines)
        texts.append(log.markdown(columns, lines))
    document: dict[str, Any] = {"rows": rows}
    if any(r["recipe"] == base for r in rows):
        document["base"] = base
        document["verdicts"] = verdicts(rows, metrics[0], base)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text("\n".join(texts))
    log.update(folder / "comparison.json", **document)
    figure(folder / "comparison.png", rows, metrics[0])
    return document


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", default="digits_mlp", help="a file of train/configs, without .py")
    add("--data", type=Path, help="a file or directory in place of the built-in data")
    add("--seeds", type=programs.seeds, default=(0, 1, 2), help="trained together")
    add("--sparsities", default=",".join(map(str, SPARSITIES)))
    add("--only", help="names of recipes, separated by commas")
    add("--base", default="hinm_gyro", help="the recipe that others are held against")
    add("--steps", type=int, help="steps after the dense model")
    add("--dense-steps", type=int, help="steps of the dense model")
    add("--out", type=Path, help="folder of the results; out/compare-<config>")
    args = parser.parse_args()
    before = time.process_time()
    try:
        config = programs.config(
            args.config, loop.Config, steps=args.steps, dense_steps=args.dense_steps
        )
        known = recipes(config.vector_size)
        names = args.only.split(",") if args.only else list(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"--only {unknown[0]}: choose from {', '.join(known)}")
        make = language.task if isinstance(config, language.Config) else vision.task
        task = make(config, args.data, args.seeds)
        folder = args.out or Path("out") / f"compare-{config.name}"
        rows = compare(
            task,
            config,
            {name: known[name] for name in names},
            [float(s) for s in args.sparsities.split(",")],
            folder,
            jax.random.key(args.seeds[0]),
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    metrics = [k for k in ("nll", "accuracy", "bits_per_byte") if k in rows[0]]
    write(folder, rows, metrics, args.base)
    print(f"{time.process_time() - before:.0f} CPU seconds; wrote {folder}/")


if __name__ == "__main__":
    main()
