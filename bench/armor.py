"""NoWag-P and ARMOR beside their anchors, and ARMOR on all-MiniLM-L6-v2.

    make bench-armor ARGS="--only layers"     # some minutes
    make bench-armor ARGS="--only layers --quick"
    make bench-armor ARGS="--only model"      # the sentence encoder, slow

The proxy is the loss that ARMOR fits, relative to the zero matrix; out is
|| X (W - W')^T ||^2 / || X W^T ||^2 in float64. CPU seconds are the process time of a
second solve, after compilation. "Published loop" is the author's code at 500
iterations, the anchor an exact solver with a few updates per block and step; both on
the same inputs.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from bench import inputs
from bench.minilm import Run, prune
from bench.study import Row, Study, anchors, chosen, timed
from flexhinm_jax.ops import factorised, saliency
from flexhinm_jax.patterns import ChannelSearch
from flexhinm_jax.pruning.apply import dense_weight
from train.lab import models, text

SEARCHED = fh.NM(2, 4, permute=ChannelSearch())
LAYERS = "Factors around a 2:4 core, one layer"
MODEL = "Factors on all-MiniLM-L6-v2"

STEPS = {32: 40, 64: 40, 128: 80}
"""block: exact steps, as many as the goals took or more."""


SHOWN = (0, 1, 2, 3, 5, 10, 15, 20, 30, 40, 80, 100, 200, 300, 500)
"""Steps whose loss is kept."""


def proxy_loss(w: np.ndarray, pruned: Any, stats: fh.Stats) -> float:
    """The loss of ARMOR."""
    bar, r, c = saliency.normalise(jnp.asarray(w))
    weights = saliency.channel_weights(stats.sq_norm)
    return float(factorised.loss(pruned / r[:, None] / c, bar, weights))


def cases(quick: bool) -> Iterator[tuple[str, fh.Method]]:
    """(layer, method) of every row; the slow ones come last."""
    names = ("synth512", "minilm")
    for layer in names:
        yield layer, fh.NoWagP()
        for block, steps in STEPS.items():
            if not quick or block == 32:
                yield layer, fh.ARMOR(block=block, steps=steps)
        yield layer, fh.ARMOR(SEARCHED, block=32, steps=40)
    if quick:
        return
    for layer in names:
        yield layer, fh.ARMOR(block=32, weighting="gram", damp=1e-3)
    for layer in names:
        for block in STEPS:
            yield layer, fh.ARMOR(block=block, steps=500, solver="adam")


def layers(flags: argparse.Namespace) -> Iterator[Row]:
    """Every method on both layers."""
    published = anchors(f"{LAYERS}, published loop")
    for layer, method in cases(flags.quick):
        w, x = inputs.layer(layer)
        stats, weight, key = inputs.statistics(x), jnp.asarray(w), jax.random.key(0)
        # Adam runs long beside its compilation: once is enough.
        repeats = 0 if getattr(method, "solver", "") == "adam" else 1
        timing = timed(lambda m=method: m.solve(key, weight, stats), repeats)  # noqa: B023
        plan = method.decide(timing.result, weight)
        fh.verify(plan)
        pruned = dense_weight(plan)
        gram = x.astype(np.float64).T @ x
        what, data = f"{layer}, {type(method).__name__}", {"first cpu_s": timing.first}
        more = {"out": inputs.relative_error(w, pruned, gram)}
        if isinstance(method, fh.ARMOR):
            what += f" block {method.block}, {method.solver}, "
            loss = np.asarray(timing.result.fixed["trace"], np.float64)
            what += f"{len(loss) - 1} steps"
            what += "" if method.weighting == "diagonal" else f", {method.weighting}"
            what += "" if method.pattern == fh.NM(2, 4) else ", inputs ordered"
            goal = anchors(LAYERS).get(what)
            data |= facts(method, timing, loss, goal, plan, weight, stats)
            if what in published:
                more = {"published loop": published[what]} | more
        value = proxy_loss(w, pruned, stats)
        yield Row(LAYERS, what, value, None, timing.least, more, data)


def facts(
    method: fh.ARMOR, timing: Any, loss: Any, goal: Any, plan: Any, w: Any, stats: Any
) -> dict[str, Any]:
    """The curve of a solve, when it met its goal, and how many groups it changed."""
    kept = {
        "overhead": float(timing.result.fixed["overhead"]),
        "monotone": bool((np.diff(loss) <= 0).all()),
        "trace": {str(k): loss[k] for k in SHOWN if k < len(loss)},
    }
    if method.pattern == fh.NM(2, 4):
        was = fh.NoWagP().solve(jax.random.key(0), w, stats).fixed["support"].keep
        moved = np.asarray(was != plan.support.keep).reshape(len(w), -1, 4)
        kept["groups changed"] = float(moved.any(-1).mean())
    if goal is not None and (loss <= goal).any():
        first = int(np.argmax(loss <= goal))
        kept["steps to goal"] = first
        kept["cpu_s to goal"] = timing.least * first / (len(loss) - 1)
    return kept


ALPS, WIDER = fh.ALPS(fh.NM(2, 4)), fh.ALPS(fh.NM(7, 12))
GRAM = fh.ARMOR(block=32, weighting="gram", updates=4)
FROM_ALPS = dataclasses.replace(GRAM, start=ALPS)

RUNS = {
    "alps-2:4": Run(ALPS, None, 128),
    "alps-7:12": Run(WIDER, None, 128, note="equal bytes"),
    "armor": Run(fh.ARMOR(block=32), None, 128),
    "armor-gram": Run(GRAM, None, 128),
    "armor-gram-from-alps": Run(FROM_ALPS, None, 128),
    "alps-2:4-resid": Run(ALPS, "resid", 512),
    "alps-7:12-resid": Run(WIDER, "resid", 512, note="equal bytes"),
    "armor-gram-from-alps-resid": Run(FROM_ALPS, "resid", 512),
}
"""All linear layers of the encoder: one shot, then in order with repaired targets."""


def model(flags: argparse.Namespace) -> Iterator[Row]:
    """The rows of the encoder."""
    dense = models.load(evaluation=flags.evaluation)
    for name in chosen(RUNS, flags):
        run = RUNS[name]
        given = dense.calibration(run.sentences)
        before = time.process_time()
        result = prune(dense, given, run)
        jax.block_until_ready(result.params)
        seconds, total = time.process_time() - before, result.report.total
        scores = dense.scores(result.params)
        more = {
            "5 % quantile": scores["quantile"],
            "packed / dense bytes": total["packed_ratio"],
        }
        data = {
            "method": repr(run.method),
            "target": run.target or "one-shot",
            "sentences": run.sentences,
            "overhead": total["overhead"],
            "spearman": scores["spearman"],
            "digest": text.digest(),
            "note": run.note,
        }
        command = f'make bench-armor ARGS="--only model --rows {name}"'
        yield Row(MODEL, name, scores["cosine"], None, seconds, more, data, command)
        jax.clear_caches()


STUDY = Study(
    "armor",
    "ARMOR",
    {"layers": layers, "model": model},
    {
        LAYERS: "Weighted squared error relative to the zero matrix, smaller is "
        "better. The anchor is the author's code for NoWag-P and the published loop, "
        "else the goal of an exact solver (`bench/anchors.json`). Out: relative "
        "squared output error.",
        MODEL: "Mean cosine, one-shot, 128 calibration sentences; CPU seconds with "
        "compilation.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    add = parser.add_argument
    add("--rows", default="", help="of the encoder: names that have one of these texts")
    add("--quick", action="store_true", help="block 32, exact only")
    add("--evaluation", type=int, default=512, help="sentences")
    STUDY.main(parser)
