"""How well pruned models train: recipes on digits, bits per byte, learned masks.

    make bench-training                                   # everything
    python -m bench.comparison --only recipes             # digits: 8 recipes, 3 seeds
    python -m bench.comparison --only bytes,masks

`recipes` compares all recipes on the digits. `bytes` trains the byte-level decoder
dense and as FlexHiNM-GP at 50, 75 and 87.5 %. `masks` holds tuned Hard Concrete gates
against fixed masks of the same pattern, on both tasks at equal steps. Writes the
tables' numbers into bench/results/training.json and figures into `--out`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax

import flexhinm_jax as fh
from train import compare, language, log, loop, programs, vision
from train.recipes import Recipe, recipes
from train.tasks import Task

RESULTS = Path(__file__).parent / "results" / "training.json"
DIGIT_SEEDS = tuple(range(8))


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
    """The byte decoder: dense, and FlexHiNM-GP at three sparsities."""
    config, task = _bytes()
    known = recipes(config.vector_size)
    chosen = {name: known[name] for name in ("dense", "flexhinm_gp")}
    rows = compare.compare(
        task, config, chosen, (0.5, 0.75, 0.875), folder, jax.random.key(0)
    )
    found = compare.write(folder, rows, ["bits_per_byte"], "dense")
    runs = {"dense, before pruning": log.read(folder / "dense.jsonl")}
    for row in rows:
        name = f"{row['recipe']}-{row['target']:g}"
        records = log.read(folder / "runs" / f"{name}.jsonl")
        for record in records:
            record["step"] += config.dense_steps
        title = "dense" if row["recipe"] == "dense" else f"{100 * row['target']:g} %"
        runs[title] = records
    log.curves(folder / "curves.png", runs, ["loss"])
    curve = {
        title: [[r["step"], round(r["loss"], 4)] for r in records]
        for title, records in runs.items()
    }
    return {"rows": found["rows"], "curve": curve}


def run_masks(folder: Path) -> dict[str, Any]:
    """Tuned gates against fixed masks of the same pattern, equal steps."""
    digits = programs.config("digits_mlp", vision.Config)
    text, decoder = _bytes()
    found = {}
    for name, metric, config, task in (
        ("digits", "nll", digits, vision.task(digits, None, DIGIT_SEEDS)),
        ("bytes", "bits_per_byte", text, decoder),
    ):
        chosen = masks(config)
        rows = compare.compare(
            task, config, chosen, compare.SPARSITIES, folder / name, jax.random.key(1)
        )
        found[name] = compare.write(folder / name, rows, [metric], "fixed")
    return found


def masks(config: loop.Config) -> dict[str, Recipe]:
    """Fixed and learned masks of one pattern; the gates as tuned on other seeds."""
    flex = fh.FlexHiNM(config.vector_size)
    return {
        "fixed": Recipe("fixed masks, one shot", fh.Magnitude(flex)),
        "fixed_staged": Recipe("fixed masks, 4 stages", fh.Magnitude(flex), stages=4),
        "gates": recipes(config.vector_size)["flexhinm_gp"],
    }


def _bytes() -> tuple[language.Config, Task]:
    config = programs.config("bytes", language.Config)
    return config, language.task(config, None, (0,))


PARTS = {"recipes": run_recipes, "bytes": run_bytes, "masks": run_masks}


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
