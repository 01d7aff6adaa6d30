"""How well pruned models train: recipes on digits, bits per byte, learned masks.

    make bench-comparison                                   # everything
    make bench-comparison ARGS="--only recipes"             # digits: 9 recipes, 3 seeds
    make bench-comparison ARGS="--only masks,bytes"

`recipes` compares all recipes on the digits. `masks` holds Hard Concrete gates against
fixed masks of the same pattern and start, with more seeds; `byte_masks` does it for the
byte-level decoder, one seed. `bytes` trains the decoder dense, under fixed masks and
with FlexHiNM-GP. Figures and records of every run go into `--work`.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import flexhinm_jax as fh
from bench.study import Row, Study
from train import compare, language, log, programs, vision
from train.recipes import Recipe, noiseless, recipes

SEEDS = tuple(range(8))
RECIPES = "Digits: test loss after pruning and training"
DECODER = "Byte-level decoder"
GATES = "Gates beside fixed masks, digits"
BYTE_GATES = "Gates beside fixed masks, bytes"


def lines(
    table: str,
    document: Mapping[str, Any],
    metric: str,
    anchor: str | None = None,
    told: str = "moved",
) -> Iterator[Row]:
    """Rows of a table: means over the seeds.

    Args:
      table: its heading.
      document: what `compare.write` returns.
      metric: the figure.
      anchor: recipe whose figure at the same sparsity is the anchor; of the dense
        model, its only one.
      told: another figure of a row, shown beside it.
    """
    rows, verdicts = document["rows"], document.get("verdicts", {})
    mean = lambda r, name: statistics.fmean(r[name])  # noqa: E731
    known = {r["target"]: mean(r, metric) for r in rows if r["recipe"] == anchor}
    for r in rows:
        more: dict[str, Any] = {told: mean(r, told)} if told in r else {}
        more |= {"seeds": len(r[metric])}
        verdict = verdicts.get(r["recipe"], {}).get(f"{r['target']:g}")
        more |= {} if verdict is None else {"verdict": verdict}
        data = {k: v for k, v in r.items() if isinstance(v, list)}
        held = known.get(0.0 if anchor == "dense" else r["target"])
        what = f"{r['title']}, {r['target']:.4g}"
        yield Row(table, what, mean(r, metric), held, r["cpu_seconds"], more, data)


def compared(
    task: Any, config: Any, chosen: Mapping[str, Recipe], folder: Path, seed: int
) -> list[dict[str, Any]]:
    """Every recipe at every sparsity."""
    targets, key = compare.SPARSITIES, jax.random.key(seed)
    return compare.compare(task, config, chosen, targets, folder, key)


def digit_recipes(flags: argparse.Namespace) -> Iterator[Row]:
    """Every recipe on the digits, three seeds."""
    config, folder = (
        programs.config("digits_mlp", vision.Config),
        flags.work / "recipes",
    )
    task = vision.task(config, None, (0, 1, 2))
    rows = compared(task, config, recipes(config.vector_size), folder, 0)
    document = compare.write(folder, rows, ["nll", "accuracy"], "hinm_gyro")
    yield from lines(RECIPES, document, "nll", "hinm_gyro", "accuracy")


def decoder(flags: argparse.Namespace) -> Iterator[Row]:
    """The byte decoder: dense, and with fixed and with learned masks."""
    config, folder = programs.config("bytes", language.Config), flags.work / "bytes"
    task, known = language.task(config, None, (0,)), recipes(config.vector_size)
    chosen = {k: known[k] for k in ("dense", "flexhinm_gyro", "flexhinm_gp")}
    targets, key = (0.5, *compare.SPARSITIES), jax.random.key(0)
    rows = compare.compare(task, config, chosen, targets, folder, key)
    for r in rows:
        path = folder / "runs" / f"{r['recipe']}-{r['target']:g}.jsonl"
        steps = ((x["step"] + config.dense_steps, x["loss"]) for x in log.read(path))
        r["curve"] = [[step, round(loss, 4)] for step, loss in steps]
    document = compare.write(folder, rows, ["bits_per_byte"], "dense")
    yield from lines(DECODER, document, "bits_per_byte", "dense", "zeros")


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


def digit_gates(flags: argparse.Namespace) -> Iterator[Row]:
    """Fixed and learned masks of one pattern on the digits, equal steps."""
    config, folder = programs.config("digits_mlp", vision.Config), flags.work / "masks"
    task, chosen = vision.task(config, None, SEEDS), rivals(config.vector_size)
    rows = compared(task, config, chosen, folder, 1)
    # A step under gates costs twice a fixed one here: the CPU time of "expected".
    config = dataclasses.replace(config, steps=int(1.5 * config.steps))
    longer = dataclasses.replace(chosen["fixed"], title="fixed, 1.5 x the steps")
    rows += compared(task, config, {"longer": longer}, folder, 1)
    document = compare.write(folder, rows, ["nll", "accuracy"], "expected")
    yield from lines(GATES, document, "nll")


def byte_gates(flags: argparse.Namespace) -> Iterator[Row]:
    """The same for the byte decoder, one seed."""
    config = programs.config("bytes", language.Config)
    folder, known = flags.work / "byte_masks", rivals(config.vector_size)
    chosen = {k: known[k] for k in ("fixed", "free", "still", "expected")}
    rows = compared(language.task(config, None, (0,)), config, chosen, folder, 1)
    document = compare.write(folder, rows, ["bits_per_byte"], "fixed")
    yield from lines(BYTE_GATES, document, "bits_per_byte")


MOVED = "smaller is better; moved: share of the kept weights exchanged."
VERDICT = "verdict that of a paired t-test against it, 5 %."

STUDY = Study(
    "comparison",
    "Quality of training",
    {
        "recipes": digit_recipes,
        "masks": digit_gates,
        "bytes": decoder,
        "byte_masks": byte_gates,
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

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/bench-comparison"))
    STUDY.main(parser)
