"""Learned masks on whole models: rows, ablations of HyperPrune, noise of MaskPro.

The parts of `bench.masks` that need a model. Rows are those of `train.learn_masks`.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from bench.study import Row, chosen
from flexhinm_jax.training import model_gates
from flexhinm_jax.training.hyper import hyper_prune
from train.lab.masks import problems
from train.lab.masks import rows as mask_rows
from train.lab.masks.comparison import Comparison
from train.lab.masks.learner import started_at

KEY = 0

IDENTITIES = "Learned masks: identities"
LAYER = "Learned masks: one layer"
MEMORY = "Learned masks: memory"
MODEL = "Learned masks on all-MiniLM-L6-v2"
HYPER = "HyperPrune and its parts"
NOISE = "Noise of MaskPro's gradient on the byte decoder"
BYTE = "Learned masks of the byte decoder"

NOTES = {
    IDENTITIES: "The anchor is what the figure should be, to the tolerance.",
    LAYER: "Relative squared output error of one 64 x 64 layer, smaller is better.",
    MEMORY: "Bytes per weight while learning.",
    MODEL: "Mean cosine.",
    f"{MODEL}, longer": "Mean cosine.",
    BYTE: "Bits per byte, less is better.",
    HYPER: "Relative squared output error, mean over 8 attention matrices of MiniLM.",
    NOISE: "Samples on one batch whose mean gradient has as much signal as noise.",
}

#: Rows of "longer", which is meant for more time than the others get.
LONGER = ("refine_mask", "refine_mask>maskllm")

#: Settings of HyperPrune without one of its parts.
ABLATIONS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no embeddings": {"embedding": 0},
    "no outlier term": {"outlier": 0.0},
    "no continual term": {"continual": 0.0},
}

#: The ablations are made on the attention matrices of this many blocks: all of one
#: shape, because compilation would take most of the time.
BLOCKS = 2

#: Keeps the dense byte decoder; that of the part "bytes".
BYTES = Path("out/bench-masks-bytes")

#: Samples of the gradient of MaskPro, an even number.
SAMPLES = 48


def compared(part: str, model: str, table: str, choices: tuple[str, ...]) -> Any:
    """A part: the comparison of learned masks on one model."""

    def rows(flags: argparse.Namespace) -> Iterator[Row]:
        work = flags.work if part == "model" else Path(f"{flags.work}-{part}")
        work.mkdir(parents=True, exist_ok=True)
        budget = fh.Duration(flags.cpu_seconds, "cpu-seconds")
        if flags.minutes is not None:
            budget = fh.Duration(flags.minutes, "minutes")
        small = model == "bytes"
        problem = problems.bytes_decoder(work) if small else problems.minilm(None)
        compared = Comparison(problem, budget, work, resume=True)
        dense = problem.evaluate(problem.params) | {"row": "dense"} | problem.facts
        texts = chosen(choices, flags)
        row: Any
        for row in itertools.chain([dense], compared.rows(texts)):
            shown = ("row", problem.score, "cpu_seconds", "quantile")
            what, value, seconds, quantile = map(row.get, shown)
            more = {} if quantile is None else {"5 % quantile": quantile}
            data = {name: x for name, x in row.items() if name not in shown}
            yield Row(table, what, value, None, seconds, more, data)

    return rows


def attention() -> tuple[problems.Problem, Any, Any]:
    """MiniLM on fewer sentences; uses and statistics, of some attention blocks only."""
    sizes: Any = {"sentences": 1024, "calibration": 512, "evaluation": 64}
    problem = problems.minilm(None, **sizes)
    some = "|".join(map(str, range(BLOCKS)))
    uses = problem.discover({rf"^encoder\.layer\.(?!({some})\.attention)": "skip"})
    return problem, uses, {path: problem.stats[path] for path in uses.leaves}


def hyper(_: argparse.Namespace) -> Iterator[Row]:
    """Error of the outputs, mean over attention matrices of MiniLM."""
    problem, uses, stats = attention()
    wanda = mask_rows.ONE_SHOT["wanda"]
    for name, method in {
        "Wanda, the prior": fh.RefineMask(wanda, sweeps=0, weights="dense"),
        "RefineMask": mask_rows.ONE_SHOT["refine_mask"],
        **{
            f"HyperPrune, {name}": dataclasses.replace(mask_rows.HYPER, **options)
            for name, options in ABLATIONS.items()
        },
    }.items():
        before, key = time.process_time(), jax.random.key(KEY)
        args, worse = (key, problem.params, uses, stats), 0
        if isinstance(method, fh.HyperPrune):
            learned = hyper_prune(method, *args).rows
            errors = [r["error"] for r in learned]
            worse = sum(r["error"] > r["prior"] for r in learned)
        else:
            errors = [float(s.fixed["error"]) for s in fh.solve(method, *args).values()]
        seconds = time.process_time() - before
        more, data = {"matrices worse than the prior": worse}, {"errors": errors}
        yield Row(HYPER, name, float(np.mean(errors)), None, seconds, more, data)


def noise(_: argparse.Namespace) -> Iterator[Row]:
    """How much of MaskPro's gradient is signal, on one batch of the byte decoder.

    Two independent means of the gradient estimate its squared length by their product;
    the figure is the number of samples whose mean has as much signal as noise.
    """
    problem = problems.bytes_decoder(BYTES)
    uses, key = problem.uses, jax.random.key(KEY)
    keeps = mask_rows.one_shot(mask_rows.ONE_SHOT["refine_mask"], key, problem, uses)
    batch = problem.batch_at(0)
    for start in (10.0, 6.0, 3.0):
        method = fh.MaskPro(mask_rows.NM, start=start)
        states = fh.solve(method, key, problem.params, uses, problem.stats)
        yield samples_needed(method, started_at(method, states, keeps), problem, batch)


def samples_needed(
    method: Any, states: Any, problem: problems.Problem, batch: Any
) -> Row:
    """One line."""
    params, uses = problem.params, problem.uses
    base = model_gates.baseline(method, states, params, uses)
    start = {path: s.learned for path, s in states.items()}

    @jax.jit
    def lost(params: Any) -> Any:
        return problem.loss_fn(params, *batch)[0]

    @jax.jit
    def draw(key: Any) -> tuple[Any, Any]:
        """The loss of a sample, and the share of the weights that it changes."""
        sparse, _ = model_gates.sample(method, states, params, uses, key)
        changed = sum(
            jnp.sum((sparse[p] != 0) != (base[p] != 0), dtype=jnp.float32)
            for p in uses.leaves
        )
        return lost(sparse), changed / sum(params[p].size for p in uses.leaves)

    def log_prob(learned: Any, key: Any) -> Any:
        now = {p: dataclasses.replace(s, learned=learned[p]) for p, s in states.items()}
        return model_gates.log_prob(method, now, uses, key)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Any, key: Any, by: Any) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda g: by * g, jax.grad(log_prob)(start, key))
        square = sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))
        return jax.tree.map(jnp.add, total, grads), square

    keys = jax.random.split(jax.random.key(KEY + 1), SAMPLES)
    first, _ = float(lost(base)), draw(keys[0])
    before = time.process_time()
    drawn = np.asarray([[float(x) for x in draw(key)] for key in keys])
    seconds = time.process_time() - before
    gaps = drawn[:, 0] - first
    halves, squares = [], []
    for part in np.split(np.arange(SAMPLES), 2):
        # less the mean of the others, so that every term is without bias
        count = len(part)
        advantages = (gaps[part] - gaps[part].mean()) * count / (count - 1)
        total: Any = jax.tree.map(jnp.zeros_like, start)
        for k, advantage in zip(part, advantages, strict=True):
            total, square = add(total, keys[k], jnp.float32(advantage))
            squares.append(float(square))
        halves.append(jax.tree.leaves(total))
    pairs = zip(*halves, strict=True)
    signal = sum(float(jnp.vdot(a, b)) for a, b in pairs) / (SAMPLES / 2) ** 2
    more = {
        "weights changed": float(drawn[:, 1].mean()),
        "gap": float(gaps.mean()),
        "deviation of the gap": float(gaps.std(ddof=1)),
        "better": float(np.mean(gaps < 0)),
    }
    data = {"loss": first, "signal": signal, "noise": float(np.mean(squares))}
    samples = data["noise"] / signal if signal > 0 else None
    what = f"start {method.start:g}"
    return Row(NOISE, what, samples, None, seconds / SAMPLES, more, data)


PARTS = {
    "model": compared("model", "minilm", MODEL, mask_rows.DEFAULT),
    "longer": compared("longer", "minilm", f"{MODEL}, longer", LONGER),
    "bytes": compared("bytes", "bytes", BYTE, mask_rows.DEFAULT),
    "hyper": hyper,
    "noise": noise,
}
