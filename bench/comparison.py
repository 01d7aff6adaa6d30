"""How well pruned models train: recipes on digits, bits per byte, learned masks.

    make bench-comparison                                   # everything
    make train-digits                                       # 9 recipes, 3 seeds
    make bench-comparison ARGS="--only recipes --config digits_vit --seeds 0,1"
    make bench-comparison ARGS="--only masks,bytes"

`recipes` compares all recipes of `train.lab.recipes` on one task. `masks` holds Hard
Concrete gates against fixed masks of the same pattern and start, with more seeds;
`byte_masks` does it for the byte-level decoder, one seed. `bytes` trains the decoder
dense, under fixed masks and with FlexHiNM-GP. All runs start from the same dense model
per seed and train for the same number of further steps on the same batches. The records
of every run go into `--work`.
"""

import argparse
import dataclasses
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats

import flexhinm_jax as fh
from bench.study import Row, Study
from train import language, vision
from train.lab import programs, tasks
from train.lab.recipes import Recipe, noiseless, recipes
from train.lab.tasks import Task
from train.lab.trainer import Config, Trainer

SEEDS = tuple(range(8))
SPARSITIES = (0.75, 0.875, 0.9375)
RECIPES = "Digits: test loss after pruning and training"
DECODER = "Byte-level decoder"
GATES = "Gates beside fixed masks, digits"
BYTE_GATES = "Gates beside fixed masks, bytes"


def compare(
    task: Task,
    config: Config,
    chosen: Mapping[str, Recipe],
    sparsities: Sequence[float],
    folder: Path,
    key: jax.Array,
) -> Iterator[dict[str, Any]]:
    """Runs every recipe at every sparsity.

    Args:
      task: the task; its lanes are the seeds.
      config: how long and how fast.
      chosen: the recipes by name.
      sparsities: targets; a recipe that does not prune runs once.
      folder: gets the records of every run and the dense model.
      key: PRNG key, consumed.

    Yields:
      One row per run: recipe, target, CPU seconds, and a list over the seeds of zeros
      and per metric of the task; "moved" for learned masks whose start ran with fixed
      masks; "curve", the loss by step.
    """
    trainer = Trainer(task, config)
    dense = trainer.dense(folder)
    fixed: dict[Any, Any] = {}
    for name, recipe in chosen.items():
        for target in sparsities if recipe.method is not None else (0.0,):
            before = time.process_time()
            path = folder / "runs" / f"{name}-{target:g}.jsonl"
            params, records = trainer.prune(recipe, target, dense, key, path)
            figures = {k: v.tolist() for k, v in task.evaluate(params).items()}
            if recipe.stages == 1:
                fixed[recipe.method, target] = params
            # The same start under masks that stay, if it ran before.
            scores = getattr(recipe.method, "scores", None)
            start = None if scores is None else fixed.get((scores, target))
            if start is not None:
                figures["moved"] = tasks.moved(task, start, params).tolist()
            yield {
                "recipe": name,
                "title": recipe.title,
                "target": target,
                "zeros": tasks.zeros(task, params).tolist(),
                "cpu_seconds": time.process_time() - before,
                "curve": [
                    [r["step"] + config.dense_steps, round(r["loss"], 4)]
                    for r in records
                ],
                **figures,
            }


def verdict(a: Sequence[float], b: Sequence[float], level: float = 0.05) -> str:
    """Whether a is lower than b, seed by seed: "lower", "higher", "tie" or "one seed".

    A tie is a paired t-test that does not reject equal means; one seed tells nothing.

    Args:
      a: one number per seed.
      b: numbers of the same seeds.
      level: of significance, two-sided.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    sign = "lower" if difference.mean() < 0 else "higher"
    if len(difference) < 2:
        return "one seed"
    if np.ptp(difference) == 0:
        return "tie" if difference.mean() == 0 else sign
    tested: Any = scipy.stats.ttest_1samp(difference, 0.0)
    return sign if tested.pvalue < level else "tie"


def lines(
    table: str,
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    anchor: str | None = None,
    base: str | None = None,
    told: str = "moved",
) -> Iterator[Row]:
    """Rows of a table: means over the seeds.

    Args:
      table: its heading.
      rows: what `compare` yields.
      metric: the figure.
      anchor: recipe whose figure at the same sparsity is the anchor; of the dense
        model, its only one.
      base: recipe that the others are tested against at the same sparsity.
      told: another figure of a row, shown beside it.
    """
    mean = lambda r, name: statistics.fmean(r[name])  # noqa: E731
    known = {r["target"]: mean(r, metric) for r in rows if r["recipe"] == anchor}
    tested = {r["target"]: r[metric] for r in rows if r["recipe"] == base}
    for r in rows:
        more: dict[str, Any] = {told: mean(r, told)} if told in r else {}
        more |= {"seeds": len(r[metric])}
        if r["recipe"] not in (base, "dense") and r["target"] in tested:
            more["verdict"] = verdict(r[metric], tested[r["target"]])
        data = {k: v for k, v in r.items() if isinstance(v, list)}
        held = known.get(0.0 if anchor == "dense" else r["target"])
        what = f"{r['title']}, {r['target']:.4g}"
        yield Row(table, what, mean(r, metric), held, r["cpu_seconds"], more, data)


def part(
    config: str | None,
    choose: Any,
    table: str,
    seeds: Sequence[int] | None,
    key: int,
    **shown: Any,
) -> Any:
    """A part: recipes on one task.

    Args:
      config: name of the configuration; None for that of the flags.
      choose: rows of a tile -> the recipes by name.
      table: heading of its table.
      seeds: trained together; None for those of the flags.
      key: seed of the choice of masks.
      **shown: see `lines`; "longer" is a recipe that runs again for half as many steps
        more, "sparsities" are further ones.
    """
    longer, further = shown.pop("longer", None), shown.pop("sparsities", ())

    def run(flags: argparse.Namespace) -> Iterator[Row]:
        steps = {"steps": flags.steps, "dense_steps": flags.dense_steps}
        told = programs.config(config or flags.config, Config, **steps)
        bytewise = isinstance(told, language.Config)
        make: Any = language.task if bytewise else vision.task
        task = make(told, flags.data, seeds or flags.seeds)
        known = choose(told.vector_size)
        names = flags.recipes.split(",") if flags.recipes else list(known)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise SystemExit(
                f"error: --recipes {unknown[0]}: choose from {', '.join(known)}"
            )
        targets = (*further, *map(float, flags.sparsities.split(",")))
        folder = flags.work / re.sub(r"\W+", "-", f"{told.name} {table}").lower()
        given = targets, folder, jax.random.key(key)
        rows = list(compare(task, told, {name: known[name] for name in names}, *given))
        if longer in names:
            # A step under gates costs twice a fixed one here.
            told = dataclasses.replace(told, steps=int(1.5 * told.steps))
            title = f"{known[longer].title}, 1.5 x the steps"
            again = {"longer": dataclasses.replace(known[longer], title=title)}
            rows += compare(task, told, again, *given)
        metric = "bits_per_byte" if bytewise else "nll"
        yield from lines(table, rows, metric, **shown)

    return run


def few(*names: str, of: Any) -> Any:
    """Some of the recipes that `of` makes."""
    return lambda vector_size: {name: of(vector_size)[name] for name in names}


def rivals(vector_size: int) -> dict[str, Recipe]:
    """Fixed masks of one pattern, and gates that start from them and move."""
    flex = fh.FlexHiNM(vector_size)
    fixed = fh.Magnitude(flex)
    soft = fh.HardConcrete(flex)
    free = fh.HardConcrete(flex, start=0.5, temperature=(0.3, 0.05))
    hard = dataclasses.replace(free, relaxation="straight_through")
    quiet = dataclasses.replace(noiseless(flex), title="gates without noise")
    still = dataclasses.replace(quiet, title=f"{quiet.title}, rate 0", mask_rate=0.0)
    return {
        "fixed": Recipe("fixed masks", fixed),
        "fixed_staged": Recipe("fixed masks, 4 stages", fixed, stages=4, pruning=0.3),
        "sure": Recipe("sampled gates, start 2", soft, pruning=0.3),
        "fast": Recipe("sampled gates, rate .1", soft, pruning=0.3, mask_rate=0.1),
        "free": Recipe("sampled, start .5, rate .1", free, pruning=0.3, mask_rate=0.1),
        "relative": Recipe(
            "sampled, start .5, relative",
            free,
            pruning=0.3,
            mask_rate=0.003,
            mask_optimizer="relative",
        ),
        "hard": Recipe("straight through, rate .1", hard, pruning=0.3, mask_rate=0.1),
        "still": still,
        "expected": quiet,
    }


MOVED = "smaller is better; moved: share of the kept weights exchanged."
VERDICT = "verdict that of a paired t-test against it, 5 %."

STUDY = Study(
    "comparison",
    "Quality of training",
    {
        "recipes": part(
            *(None, recipes, RECIPES, None, 0),
            anchor="hinm_gyro",
            base="hinm_gyro",
            told="accuracy",
        ),
        "masks": part(
            "digits_mlp", rivals, GATES, SEEDS, 1, base="expected", longer="fixed"
        ),
        "bytes": part(
            "bytes",
            few("dense", "flexhinm_gyro", "flexhinm_gp", of=recipes),
            *(DECODER, (0,), 0),
            anchor="dense",
            told="zeros",
            sparsities=(0.5,),
        ),
        "byte_masks": part(
            "bytes",
            few("fixed", "free", "still", "expected", of=rivals),
            *(BYTE_GATES, (0,), 1),
        ),
    },
    {
        RECIPES: "Mean negative log-likelihood, smaller is better; the anchor is HiNM "
        f"+ Gyro at the same sparsity, and the {VERDICT}",
        DECODER: "Bits per byte, one seed, smaller is better; the anchor is the dense "
        "model trained as long.",
        GATES: f"Mean nll, {MOVED} Verdict: paired t-test, 5 %, against gates "
        "without noise.",
        BYTE_GATES: f"Mean bits per byte, {MOVED}",
    },
)


def main() -> None:
    """Runs the comparison."""
    parser = STUDY.parser(__doc__)
    add = parser.add_argument
    add("--config", default="digits_mlp", help="of `recipes`: a file of train/configs")
    add("--data", type=Path, help="a file or directory in place of the built-in data")
    add("--seeds", type=programs.seeds, default=(0, 1, 2), help="of `recipes`")
    add("--sparsities", default=",".join(map(str, SPARSITIES)))
    add("--recipes", help="names of recipes, separated by commas")
    add("--steps", type=int, help="steps after the dense model")
    add("--dense-steps", type=int, help="steps of the dense model")
    add("--work", type=Path, default=Path("out/bench-comparison"))
    STUDY.main(parser)


if __name__ == "__main__":
    main()
