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

from train import log, loop
from train.recipes import Recipe, recipes
from train.tasks import Task

CONFIGS = Path(__file__).parent / "configs"


def add_flags(parser: argparse.ArgumentParser, config: str) -> None:
    """The flags of every training program.

    Args:
      parser: gets them.
      config: name of the default configuration.
    """
    add = parser.add_argument
    add("--config", default=config, help="a file of train/configs, without .py")
    add("--data", type=Path, help="a file or directory in place of the built-in data")
    add("--method", default="flexhinm_gp", help=f"one of {', '.join(recipes())}")
    add("--sparsity", type=float, default=0.875, help="fraction of zeros at the end")
    add("--seeds", type=seeds, default=(0,), help="such as 0,1,2: trained together")
    add("--steps", type=int, help="steps with pruning, in place of the configured ones")
    add("--dense-steps", type=int, help="steps of the dense model before")
    add("--batch-size", type=int, help="examples of a batch, per seed")
    add("--out", type=Path, help="folder of the results; out/<config> by default")


def add_resume(parser: argparse.ArgumentParser) -> None:
    """The flag of programs that go on where they were stopped."""
    parser.add_argument(
        "--resume", action="store_true", help="go on behind the newest checkpoint"
    )


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


def config(name: str, kind: type[loop.Config], **fields: Any) -> Any:
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


def recipe(name: str, told: loop.Config) -> Recipe:
    """The recipe of that name under a configuration.

    Raises:
      ValueError: an unknown name.
    """
    known = recipes(told.vector_size)
    if name not in known:
        raise ValueError(f"--method {name}: choose one of {', '.join(known)}")
    return known[name]


def run(
    args: argparse.Namespace,
    kind: type[loop.Config],
    make: Callable[[Any, Path | None, tuple[int, ...]], Task],
) -> dict[str, Any]:
    """Trains the dense model, prunes it, trains on, and writes what came out.

    Args:
      args: parsed flags of `add_flags` and `add_resume`.
      kind: configuration class of the program.
      make: makes the task of (config, data path, seeds).

    Returns:
      The summary, as written to summary.json.
    """
    try:
        told = config(args.config, kind, **changes(args))
        chosen = recipe(args.method, told)
        folder = args.out or Path("out") / told.name
        task = make(told, args.data, args.seeds)
        if chosen.method is not None:
            chosen.method.pattern.check((1024, 1024), args.sparsity, "--sparsity")
        before = time.process_time()
        trainer = loop.Trainer(task, told)
        dense = trainer.dense(folder)
        first = task.evaluate(dense)
        path = folder / "metrics.jsonl"
        key = jax.random.key(args.seeds[0])
        saves = loop.Saves(folder / "checkpoints", args.resume)
        params, records = trainer.prune(chosen, args.sparsity, dense, key, path, saves)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    last = task.evaluate(params)
    summary = {
        "config": told.name,
        "method": args.method,
        "sparsity": loop.zeros(task, params).tolist(),
        "seeds": list(args.seeds),
        "dense": {k: v.tolist() for k, v in first.items()},
        "pruned": {k: v.tolist() for k, v in last.items()},
        "cpu_seconds": time.process_time() - before,
    }
    log.update(folder / "summary.json", **summary)
    runs = {"dense": log.read(folder / "dense.jsonl"), chosen.title: records}
    log.curves(folder / "curves.png", runs, ["loss", "sparsity", "temperature"])
    columns = ["", *last, "zeros"]
    rows = [
        ["dense", *(spread(v) for v in first.values()), "0"],
        [
            chosen.title,
            *(spread(v) for v in last.values()),
            spread(summary["sparsity"]),
        ],
    ]
    log.show(f"{told.name}, {len(args.seeds)} seed(s)", columns, rows)
    print(f"{summary['cpu_seconds']:.0f} CPU seconds; wrote {folder}/")
    return summary


def spread(values: Any) -> str:
    """Mean and, of several values, their sample standard deviation."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return f"{values.mean():.4f}"
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
