"""What the programs share: flags, configuration files, and one run from end to end."""

import argparse
import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexhinm_jax.training.run import NotFinite
from train.lab import results, tasks
from train.lab.recipes import Recipe, recipes
from train.lab.tasks import Task
from train.lab.trainer import Config, Trainer

CONFIGS = Path(__file__).parents[1] / "configs"


def parser(
    about: str | None, config: str, *, resumes: bool = False
) -> argparse.ArgumentParser:
    """The flags of every training program.

    Args:
      about: docstring of the program; its first line says what it does.
      config: name of the default configuration.
      resumes: whether the program goes on where it was stopped.
    """
    made = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    add = made.add_argument
    add("--config", default=config, help="a file of train/configs, without .py")
    add("--data", type=Path, help="a file or directory in place of the built-in data")
    add("--method", default="flexhinm_gp", help=f"one of {', '.join(recipes())}")
    add("--sparsity", type=float, default=0.875, help="fraction of zeros at the end")
    add("--seeds", type=seeds, default=(0,), help="such as 0,1,2: trained together")
    add("--steps", type=int, help="steps with pruning, in place of the configured ones")
    add("--dense-steps", type=int, help="steps of the dense model before")
    add("--batch-size", type=int, help="examples of a batch, per seed")
    add("--out", type=Path, help="folder of the results; out/<config> by default")
    if resumes:
        add("--resume", action="store_true", help="go on after the newest checkpoint")
    return made


def seeds(text: str) -> tuple[int, ...]:
    """Different numbers >= 0, separated by commas."""
    found = tuple(int(part) for part in text.split(","))
    if len(set(found)) < len(found) or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text}: need different numbers >= 0")
    return found


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration that flags replace; None where they do not."""
    return {
        "steps": args.steps,
        "dense_steps": args.dense_steps,
        "batch_size": args.batch_size,
    }


def config(name: str, kind: type[Config], **fields: Any) -> Any:
    """The configuration of that name.

    Args:
      name: a file of `train/configs`, without .py.
      kind: class that it must be of.
      **fields: to replace; None leaves a field as it is.

    Raises:
      ValueError: no such file, or one for another program.
    """
    known = sorted(
        path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__"
    )
    if name not in known:
        raise ValueError(f"unknown config {name!r}; known: {', '.join(known)}")
    found = importlib.import_module(f"train.configs.{name}").CONFIG
    if not isinstance(found, kind):
        raise ValueError(
            f"config {name!r} is for {type(found).__module__}, not for "
            f"{kind.__module__}"
        )
    given = {k: v for k, v in fields.items() if v is not None}
    return dataclasses.replace(found, **given)


def recipe(name: str, told: Config) -> Recipe:
    """The recipe of that name under a configuration.

    Raises:
      ValueError: an unknown name.
    """
    known = recipes(told.vector_size)
    if name not in known:
        raise ValueError(f"--method {name}: choose one of {', '.join(known)}")
    return known[name]


def run(
    flags: argparse.ArgumentParser,
    kind: type[Config],
    make: Callable[[Any, Path | None, tuple[int, ...]], Task],
) -> dict[str, Any]:
    """Trains the dense model, prunes it, trains on, and writes what came out.

    Args:
      flags: of `parser`, not parsed yet.
      kind: configuration class of the program.
      make: makes the task of (config, data path, seeds).

    Returns:
      The summary, as written to summary.json.
    """
    args = flags.parse_args()
    try:
        told = config(args.config, kind, **changes(args))
        chosen = recipe(args.method, told)
        folder = args.out or Path("out") / told.name
        task = make(told, args.data, args.seeds)
        if chosen.method is not None:
            chosen.method.pattern.check((1024, 1024), args.sparsity, "--sparsity")
        before = time.process_time()
        trainer = Trainer(task, told)
        dense = trainer.dense(folder)
        first = task.evaluate(dense)
        path = folder / "metrics.jsonl"
        key = jax.random.key(args.seeds[0])
        saves = results.saves(folder / "checkpoints", args.resume, told.every)
        params, records = trainer.prune(chosen, args.sparsity, dense, key, path, saves)
    except (ValueError, NotFinite) as error:
        raise SystemExit(f"error: {error}") from None
    last = task.evaluate(params)
    summary = {
        "config": told.name,
        "method": args.method,
        "sparsity": tasks.zeros(task, params).tolist(),
        "seeds": list(args.seeds),
        "dense": {k: v.tolist() for k, v in first.items()},
        "pruned": {k: v.tolist() for k, v in last.items()},
        "cpu_seconds": time.process_time() - before,
    }
    results.update(folder / "summary.json", **summary)
    runs = {"dense": results.read(folder / "dense.jsonl"), chosen.title: records}
    results.curves(folder / "curves.png", runs, ["loss", "sparsity", "temperature"])
    columns = ["", *last, "zeros"]
    rows = [
        ["dense", *(spread(v) for v in first.values()), "0"],
        [
            chosen.title,
            *(spread(v) for v in last.values()),
            spread(summary["sparsity"]),
        ],
    ]
    results.show(f"{told.name}, {len(args.seeds)} seed(s)", columns, rows)
    print(f"{summary['cpu_seconds']:.0f} CPU seconds; wrote {folder}/")
    return summary


def spread(values: Any) -> str:
    """Mean and, of several values, their sample standard deviation."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return f"{values.mean():.4f}"
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
