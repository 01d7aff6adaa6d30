"""Quality of one-shot pruning on all-MiniLM-L6-v2, beside its cost.

    make bench-minilm                            # all rows
    make bench-minilm ARGS="--only alps-2:4"     # rows whose name contains the text
    make bench-minilm ARGS="--ablation --once"   # 3 targets x 3 methods x 2 patterns

All 36 linear layers of the encoder are pruned. The cosine is that of the embeddings of
the pruned and of the dense model, over evaluation sentences of `train.corpus`; numbers
compare only where its digest is the same. CPU seconds are process time of discovery,
calibration, solving and packing; the second figure leaves out what a repetition does
not need: it is a second run that finds its programs in a compilation cache.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from flexhinm_jax.cli import source
from flexhinm_jax.methods.staged import StagedALPS
from flexhinm_jax.models import batches, encoder
from flexhinm_jax.patterns import ChannelSearch, RandomRows
from train import corpus, minilm

BUCKETS = (16, 24, 32, 48, 64, 128)
BATCH = 128

NM = fh.NM(2, 4)
SEARCHED = fh.NM(2, 4, permute=ChannelSearch())


@dataclasses.dataclass(frozen=True)
class Run:
    """One row: a method, what it is fitted to, and on how much."""

    method: fh.Method
    target: str | None
    sentences: int
    sparsity: float | None = None
    note: str = ""


#: What to fit to, by method and pattern: all on the same 512 sentences.
ABLATION = {
    f"{name}-{label}-{target}-c512": Run(method(pattern), target, 512, sparsity)
    for label, pattern, sparsity in (
        ("2:4", NM, None),
        ("flexhinm", fh.FlexHiNM(32, permute=None), 0.75),
    )
    for name, method in (
        ("refit-wanda", fh.Refit),
        ("sparsegpt", fh.SparseGPT),
        ("alps", fh.ALPS),
    )
    for target in ("seq", "asym", "resid")
}

RUNS = ABLATION | {
    "wanda-2:4-c128": Run(fh.Wanda(NM), None, 128),
    "alps-2:4-resid-c1024": Run(fh.ALPS(NM), "resid", 1024),
    "alps-2:4-permuted-resid-c512": Run(fh.ALPS(SEARCHED), "resid", 512),
    "alps-2:4-permuted-resid-c1024": Run(fh.ALPS(SEARCHED), "resid", 1024),
    "alps-2:4-permuted-resid-c2048": Run(fh.ALPS(SEARCHED), "resid", 2048),
    "alps-2:4-permuted-resid-c4096": Run(fh.ALPS(SEARCHED), "resid", 4096),
    "wanda-hinm-c512": Run(fh.Wanda(fh.HiNM(32)), None, 512, 0.75),
    "alps-hinm-seq-c512": Run(fh.ALPS(fh.HiNM(32)), "seq", 512, 0.75),
    "alps-hinm-resid-c512": Run(fh.ALPS(fh.HiNM(32)), "resid", 512, 0.75),
    "alps-hinm-resid-c1024": Run(fh.ALPS(fh.HiNM(32)), "resid", 1024, 0.75),
    "alps-hinm-random-resid-c1024": Run(
        fh.ALPS(fh.HiNM(32, permute=RandomRows())), "resid", 1024, 0.75, "control"
    ),
    "staged-hinm-resid-c512": Run(StagedALPS(fh.HiNM(32)), "resid", 512, 0.75),
    "staged-hinm-resid-c1024": Run(StagedALPS(fh.HiNM(32)), "resid", 1024, 0.75),
    "staged-hinm-search-resid-c1024": Run(
        StagedALPS(fh.HiNM(32, permute=ChannelSearch())), "resid", 1024, 0.75
    ),
    "staged-hinm-random-resid-c1024": Run(
        StagedALPS(fh.HiNM(32, permute=RandomRows())), "resid", 1024, 0.75, "control"
    ),
    "alps-flexhinm-resid-c1024": Run(fh.ALPS(fh.FlexHiNM(32)), "resid", 1024, 0.75),
}


def prepare(evaluation: int) -> tuple[Any, ...]:
    """(embed, params, model, evaluation batches, dense embeddings)."""
    model = source.load(minilm.model_directory())
    params = jax.tree.map(jnp.asarray, model.params)

    def embed(params: Any, tokens: Any, mask: Any) -> Any:
        return encoder.embed(params, tokens, mask, model.config)

    text = corpus.sentences("evaluation", evaluation)
    held_out = source.tokenize(model, text, 32, None)
    dense = minilm.embeddings(jax.jit(embed), params, held_out, evaluation)
    return embed, params, model, held_out, dense


def calibration(model: source.Source, count: int) -> list[tuple]:
    """Large batches of few shapes."""
    text = corpus.sentences("calibration", count)
    lists = [
        row[row_mask != 0].tolist()
        for b in source.tokenize(model, text, 128, None)
        for row, row_mask in zip(b.tokens[: len(b.rows)], b.mask, strict=False)
    ]
    found = batches.batches(lists, BATCH, BUCKETS[-1], buckets=BUCKETS)
    return [(b.tokens, b.mask) for b in found]


def prune(embed: Any, params: Any, given: list[tuple], run: Run, quiet: bool) -> Any:
    """Prunes as a row says."""
    options: dict[str, Any] = {
        "sparsity": run.sparsity,
        "key": jax.random.key(0),
        "token_mask": lambda _, mask: mask != 0,
    }
    if run.target is None:
        return fh.prune(embed, params, given, run.method, **options)
    show = None if quiet else lambda layer: print(layer, flush=True)
    return fh.prune_sequential(
        embed, params, given, run.method, target=run.target, progress=show, **options
    )


def measure(name: str, args: argparse.Namespace, prepared: tuple) -> dict[str, Any]:
    """One row of the table."""
    run = RUNS[name]
    embed, params, model, held_out, dense = prepared
    given = calibration(model, run.sentences)
    seconds = []
    for _ in range(1 if args.once else 2):
        before = time.process_time()
        result = prune(embed, params, given, run, args.quiet)
        jax.block_until_ready(result.params)
        seconds.append(time.process_time() - before)
        jax.clear_caches()
    count = len(dense)
    sparse = minilm.embeddings(jax.jit(embed), result.params, held_out, count)
    cosine, quantile, rank = minilm.compare(dense, sparse)
    return {
        "name": name,
        "method": type(run.method).__name__,
        "pattern": str(run.method.pattern),
        "target": run.target or "one-shot",
        "sentences": run.sentences,
        "zeros": result.report.total["zeros"],
        "cosine": cosine,
        "quantile": quantile,
        "spearman": rank,
        "cpu_seconds": seconds[0],
        "cpu_seconds_compiled": seconds[1] if len(seconds) > 1 else None,
        "note": run.note,
        "digest": corpus.digest(),
        "jax": jax.__version__,
    }


def show(rows: list[dict[str, Any]]) -> Table:
    """The table of the rows."""
    made = Table(title="all-MiniLM-L6-v2, one shot, 36 linear layers")
    for head in ("method", "pattern", "target"):
        made.add_column(head)
    for head in ("sentences", "zeros", "cosine", "5 %", "Spearman", "CPU s", "again"):
        made.add_column(head, justify="right")
    for r in rows:
        again = r["cpu_seconds_compiled"]
        numbers = (r["zeros"], r["cosine"], r["quantile"], r["spearman"])
        made.add_row(
            f"{r['method']} {r['note']}".strip(),
            r["pattern"],
            r["target"],
            str(r["sentences"]),
            *(f"{x:.4f}" for x in numbers),
            f"{r['cpu_seconds']:.0f}",
            "" if again is None else f"{again:.0f}",
        )
    return made


def main() -> None:
    """Runs the benchmark; every row in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--ablation", action="store_true", help="the rows about targets alone"
    )
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    parser.add_argument("--out", type=Path, default=Path("bench/results/minilm.json"))
    parser.add_argument("--once", action="store_true", help="no second run")
    parser.add_argument("--quiet", action="store_true", help="no line per layer")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        with tempfile.TemporaryDirectory() as folder:
            if not args.once:
                jax.config.update("jax_compilation_cache_dir", folder)
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
                jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
            row = measure(args.row, args, prepare(args.evaluation))
        args.out.write_text(json.dumps(row))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {r["name"]: r for r in known if r["name"] in RUNS}
    for name in ABLATION if args.ablation else RUNS:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, "row.json")
            again = [a for a in sys.argv[1:] if a in ("--once", "--quiet")]
            command = [sys.executable, "-m", "bench.minilm", "--row", name, *again]
            command += ["--evaluation", str(args.evaluation), "--out", str(part)]
            if subprocess.run(command, check=False).returncode == 0:
                rows[name] = json.loads(part.read_text())
        ordered = [rows[n] for n in RUNS if n in rows]
        args.out.write_text(json.dumps({"rows": ordered}, indent=2) + "\n")
    Console(width=140).print(show([rows[n] for n in RUNS if n in rows]))


if __name__ == "__main__":
    main()
