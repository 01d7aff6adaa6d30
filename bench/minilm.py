"""Quality of one-shot pruning on all-MiniLM-L6-v2, beside its cost.

    make bench-minilm                               # all rows
    make bench-minilm ARGS="--rows alps-2:4"        # rows whose name contains the text
    make bench-minilm ARGS="--only ablation --once" # 3 targets, 3 methods, 2 patterns

All 36 linear layers of the encoder are pruned; quality as in `train.lab.models`. CPU
seconds are process time of discovery, calibration, solving and packing, of a second run
that finds its programs in a compilation cache; with `--once`, of the first.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

import flexhinm_jax as fh
from bench.study import Row, Study, alone, chosen
from flexhinm_jax.patterns import ChannelSearch, RandomRows
from train.lab import models, text

TABLE = "all-MiniLM-L6-v2, one-shot"


#: (how, sparsity) -> mean cosine of the embeddings of all-MiniLM-L6-v2, all 36 linear
#: layers pruned, to those of the dense model: the excellent level. Distilled: eight
#: minutes on two idle cores, teacher included. At 75 % in HiNM tiles of 32 rows.
GOALS = {
    ("one-shot", 0.5): 0.95,
    ("one-shot", 0.75): 0.83,
    ("distilled", 0.5): 0.97,
    ("distilled", 0.75): 0.89,
}


def goal(how: str, zeros: float) -> float | None:
    """The level at a sparsity, or None where no goal was set."""
    return GOALS.get((how, round(zeros, 3)))


def figures(scores: dict[str, float], zeros: float | None = None) -> dict[str, float]:
    """The figures beside the mean cosine, as columns of a table."""
    found = {} if zeros is None else {"zeros": zeros}
    return found | {"5 % quantile": scores["quantile"], "Spearman": scores["spearman"]}


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
FITTED: dict[str, Any] = {
    "refit-wanda": fh.Refit,
    "sparsegpt": fh.SparseGPT,
    "alps": fh.ALPS,
}
ABLATION = {
    f"{name}-{label}-{target}-c512": Run(method(pattern), target, 512, sparsity)
    for label, pattern, sparsity in (
        ("2:4", NM, None),
        ("flexhinm", fh.FlexHiNM(32, permute=None), 0.75),
    )
    for name, method in FITTED.items()
    for target in ("seq", "asym", "resid")
}

RUNS = {
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
    "staged-hinm-resid-c512": Run(fh.StagedALPS(fh.HiNM(32)), "resid", 512, 0.75),
    "staged-hinm-resid-c1024": Run(fh.StagedALPS(fh.HiNM(32)), "resid", 1024, 0.75),
    "staged-hinm-search-resid-c1024": Run(
        fh.StagedALPS(fh.HiNM(32, permute=ChannelSearch())), "resid", 1024, 0.75
    ),
    "staged-hinm-random-resid-c1024": Run(
        fh.StagedALPS(fh.HiNM(32, permute=RandomRows())), "resid", 1024, 0.75, "control"
    ),
    "alps-flexhinm-resid-c1024": Run(fh.ALPS(fh.FlexHiNM(32)), "resid", 1024, 0.75),
}


def prune(dense: Any, given: list[tuple], run: Run) -> fh.Pruned:
    """Prunes as a row says."""
    options: dict[str, Any] = {"sparsity": run.sparsity, "key": jax.random.key(0)}
    options["token_mask"] = dense.model.token_mask
    if run.target is None:
        return fh.prune(dense.embed, dense.params, given, run.method, **options)
    options["target"] = run.target
    return fh.prune_sequential(dense.embed, dense.params, given, run.method, **options)


def measure(name: str, once: bool, evaluation: int) -> dict[str, Any]:
    """One row, to be run in a process of its own."""
    run, dense = (ABLATION | RUNS)[name], models.load(evaluation=evaluation)
    given, seconds = dense.calibration(run.sentences), []
    with tempfile.TemporaryDirectory() as folder:
        if not once:
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        for _ in range(1 if once else 2):
            before = time.process_time()
            result = prune(dense, given, run)
            jax.block_until_ready(result.params)
            seconds.append(time.process_time() - before)
            jax.clear_caches()
    scores, zeros = dense.scores(result.params), result.report.total["zeros"]
    row = Row(
        TABLE,
        f"{name} {run.note}".strip(),
        scores["cosine"],
        goal("one-shot", zeros),
        seconds[-1],
        figures(scores, zeros),
        {
            "method": type(run.method).__name__,
            "pattern": str(run.method.pattern),
            "target": run.target or "one-shot",
            "sentences": run.sentences,
            "first cpu_s": seconds[0],
            "digest": text.digest(),
        },
        f'make bench-minilm ARGS="--rows {name}"',
    )
    return row._asdict()


def rows(runs: dict[str, Run]) -> Any:
    """A part: some of the rows, each in a process of its own."""

    def part(flags: argparse.Namespace) -> Iterator[Row]:
        for name in chosen(runs, flags):
            yield Row(**alone(measure, name, flags.once, flags.evaluation))

    return part


STUDY = Study(
    "minilm",
    "Sentence encoder",
    {"ablation": rows(ABLATION), "rows": rows(RUNS)},
    {
        TABLE: "Mean cosine of the embeddings to those of the dense model, all 36 "
        "linear layers pruned; the name gives method, pattern, target and calibration "
        "sentences. The anchor is the excellent level of the goals in "
        "`bench/minilm.py`; larger is better. "
        "CPU seconds without compilation where a second run was made, else with it."
    },
    by_row=True,
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    parser.add_argument("--once", action="store_true", help="no second run")
    STUDY.main(parser)
