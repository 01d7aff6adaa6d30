"""How well pruned models train: recipes on digits, bits per byte, learned masks.

    make bench-training                                   # everything
    python -m bench.comparison --only recipes             # digits: 9 recipes, 3 seeds
    python -m bench.comparison --only masks,bytes

`recipes` compares all recipes on the digits. `masks` holds Hard Concrete gates against
fixed masks of the same pattern and start, with more seeds; `byte_masks` does it for the
byte-level decoder, one seed. `bytes` trains the decoder dense, under fixed masks and
with FlexHiNM-GP. Writes the tables' numbers into bench/results/training.json and
figures into `--out`.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

import flexhinm_jax as fh
from train import compare, language, log, programs, vision
from train.recipes import Recipe, noiseless, recipes

RESULTS = Path(__file__).parent / "results" / "training.json"
SEEDS = tuple(range(8))


def run_recipes(folder: Path) -> dict[str, Any]:
    """Every recipe on the digits, three seeds."""
    config = programs.config("digits_mlp", vision.Config)
    task = vision.task(config, None, (0, 1, 2))
    chosen = recipes(config.vector_size)
    rows = compare.compare(
        task, config, chosen, compare.SPARSITIES, folder, jax.random.key(0)
    )
    return compare.write(folder, rows, ["nll", "accuracy"], "hinm_gyro")


def run_bytes(folder: Path) -> dict[str, Any]:
    """The byte decoder: dense, and with fixed and with learned masks."""
    config = programs.config("bytes", language.Config)
    task = language.task(config, None, (0,))
    known = recipes(config.vector_size)
    chosen = {k: known[k] for k in ("dense", "flexhinm_gyro", "flexhinm_gp")}
    targets = (0.5, *compare.SPARSITIES)
    rows = compare.compare(task, config, chosen, targets, folder, jax.random.key(0))
    found = compare.write(folder, rows, ["bits_per_byte"], "dense")
    runs = {"dense, before pruning": log.read(folder / "dense.jsonl")}
    for row in rows:
        name = f"{row['recipe']}-{row['target']:g}"
        records = log.read(folder / "runs" / f"{name}.jsonl")
        for record in records:
            record["step"] += config.dense_steps
        title = row["title"]
        if row["recipe"] != "dense":
            title += f", {100 * row['target']:g} %"
        runs[title] = records
    log.curves(folder / "curves.png", runs, ["loss"])
    curve = {
        title: [[r["step"], round(r["loss"], 4)] for r in records]
        for title, records in runs.items()
    }
    return {"rows": found["rows"], "curve": curve}


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


def run_masks(folder: Path) -> dict[str, Any]:
    """Fixed and learned masks of one pattern on the digits, equal steps."""
    config = programs.config("digits_mlp", vision.Config)
    task = vision.task(config, None, SEEDS)
    chosen = rivals(config.vector_size)
    rows = compare.compare(
        task, config, chosen, compare.SPARSITIES, folder, jax.random.key(1)
    )
    # A step under gates costs twice a fixed one here: the CPU time of "expected".
    config = dataclasses.replace(config, steps=int(1.5 * config.steps))
    more = dataclasses.replace(chosen["fixed"], title="fixed, 1.5 x the steps")
    longer = {"longer": more}
    rows += compare.compare(
        task, config, longer, compare.SPARSITIES, folder, jax.random.key(1)
    )
    return compare.write(folder, rows, ["nll", "accuracy"], "expected")


def run_byte_masks(folder: Path) -> dict[str, Any]:
    """The same for the byte decoder, one seed."""
    config = programs.config("bytes", language.Config)
    task = language.task(config, None, (0,))
    known = rivals(config.vector_size)
    chosen = {k: known[k] for k in ("fixed", "free", "still", "expected")}
    rows = compare.compare(
        task, config, chosen, compare.SPARSITIES, folder, jax.random.key(1)
    )
    return compare.write(folder, rows, ["bits_per_byte"], "fixed")


PARTS = {
    "recipes": run_recipes,
    "masks": run_masks,
    "bytes": run_bytes,
    "byte_masks": run_byte_masks,
}


def main() -> None:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--out", type=Path, default=Path("out/bench-training"))
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"error: --only {unknown[0]}: choose from {', '.join(PARTS)}")
    for name in names:
        before = time.process_time()
        found = PARTS[name](args.out / name)
        found["cpu_seconds"] = time.process_time() - before
        log.update(RESULTS, **{name: found})


if __name__ == "__main__":
    main()
