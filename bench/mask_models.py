"""Learned masks on whole models: rows, ablations of HyperPrune, noise of MaskPro.

The parts of `bench.masks` that need a model. Rows come from `train.learn_masks`.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.training import relax
from flexhinm_jax.training.hyper import hyper_prune
from train import learn_masks, mask_rows, mask_tasks
from train.mask_learner import started_at

KEY = 0

#: Part -> the model whose rows it compares.
MODELS = {"model": "minilm", "longer": "minilm", "bytes": "bytes"}

#: Rows of "longer", which is meant for more time than the others get.
LONGER = ("refine_mask", "refine_mask>maskllm")

#: Settings of HyperPrune without one of its parts.
ABLATIONS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no embeddings": {"embedding": 0},
    "no outlier term": {"outlier": 0.0},
    "no continual term": {"continual": 0.0},
}

#: The ablations are made on the attention matrices of so many blocks: all of one shape,
#: because compilation would take most of the time.
BLOCKS = 2

#: Keeps the dense byte decoder; that of the part "bytes".
BYTES = Path("out/bench-masks-bytes")

#: Samples of the gradient of MaskPro, an even number.
SAMPLES = 48


def rows(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """The comparison on one model, merged into what is known of it.

    Args:
      part: of `MODELS`.
      args: flags of `bench.masks`; `only` names rows, or a part of their text, `out` is
        the file of the results.
    """
    named = args.only.split(",")
    choices = LONGER if part == "longer" else mask_rows.DEFAULT
    texts = [row for row in choices if row in named]
    texts = texts or [row for row in choices if args.only in row]
    work = args.work if part == "model" else Path(f"{args.work}-{part}")
    flags = ["--model", MODELS[part], "--methods", ",".join(texts), "--out", str(work)]
    flags += ["--cpu-seconds", str(args.cpu_seconds)] if not args.minutes else []
    flags += ["--minutes", str(args.minutes)] if args.minutes else []
    learn_masks.main([*flags, "--resume", *args.rest])
    found = json.loads((work / "summary.json").read_text())
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    before = {r["row"]: r for r in known.get(part, {}).get("rows", ())}
    before |= {r["row"]: r for r in found["rows"]}
    return found | {"rows": [before[r] for r in choices if r in before]}


def attention() -> tuple[mask_tasks.Problem, Any, Any]:
    """MiniLM on fewer sentences; uses and statistics, of some attention blocks only."""
    flags = "--sentences 1024 --statistics 512 --evaluation 64".split()
    problem = learn_masks.problem_of(learn_masks.parser().parse_args(flags), Path())
    some = "|".join(map(str, range(BLOCKS)))
    uses = problem.discover({rf"^encoder\.layer\.(?!({some})\.attention)": "skip"})
    return problem, uses, {path: problem.stats[path] for path in uses.leaves}


def hyper() -> list[dict[str, Any]]:
    """Error of the outputs, mean over attention matrices of MiniLM."""
    problem, uses, stats = attention()
    found, wanda = [], mask_rows.ONE_SHOT["wanda"]
    for name, method in {
        "Wanda, the prior": fh.RefineMask(wanda, sweeps=0, weights="dense"),
        "RefineMask": mask_rows.ONE_SHOT["refine_mask"],
        **{
            f"HyperPrune, {name}": dataclasses.replace(mask_rows.HYPER, **options)
            for name, options in ABLATIONS.items()
        },
    }.items():
        before, key = time.process_time(), jax.random.key(KEY)
        args = problem.params, uses, stats
        worse = 0
        if isinstance(method, fh.HyperPrune):
            learned = hyper_prune(method, key, *args).rows
            errors = [r["error"] for r in learned]
            worse = sum(r["error"] > r["prior"] for r in learned)
        else:
            states = fh.solve(method, key, *args)
            errors = [float(s.fixed["error"]) for s in states.values()]
        found.append(
            {
                "row": name,
                "error": float(np.mean(errors)),
                "worse_than_prior": worse,
                "cpu_seconds": time.process_time() - before,
                "errors": errors,
            }
        )
    return found


def noise() -> list[dict[str, Any]]:
    """How much of MaskPro's gradient is signal, on one batch of the byte decoder.

    Two independent means of the gradient estimate its squared length by their product;
    "steps to see it" is the number of samples whose mean has as much signal as noise.
    """
    problem = mask_tasks.bytes_decoder(BYTES)
    uses, key = problem.uses, jax.random.key(KEY)
    keeps = mask_rows.one_shot(mask_rows.ONE_SHOT["refine_mask"], key, problem, uses)
    batch = problem.batch_at(0)
    found = []
    for start in (10.0, 6.0, 3.0):
        method = fh.MaskPro(mask_rows.NM, start=start)
        states = fh.solve(method, key, problem.params, uses, problem.stats)
        found.append(_noise(method, started_at(method, states, keeps), problem, batch))
    return found


def _noise(
    method: Any, states: Any, problem: mask_tasks.Problem, batch: Any
) -> dict[str, Any]:
    params, uses = problem.params, problem.uses
    base = relax.baseline(method, states, params, uses)
    start = {path: s.learned for path, s in states.items()}

    @jax.jit
    def lost(params: Any) -> Any:
        return problem.loss_fn(params, *batch)[0]

    @jax.jit
    def draw(key: Any) -> tuple[Any, Any]:
        """The loss of a sample, and the share of the weights that it changes."""
        sparse, _ = relax.sample(method, states, params, uses, key)
        changed = sum(
            jnp.sum((sparse[p] != 0) != (base[p] != 0), dtype=jnp.float32)
            for p in uses.leaves
        )
        return lost(sparse), changed / sum(params[p].size for p in uses.leaves)

    def log_prob(learned: Any, key: Any) -> Any:
        now = {p: dataclasses.replace(s, learned=learned[p]) for p, s in states.items()}
        return relax.log_prob(method, now, uses, key)

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
    return {
        "row": f"start {method.start:g}",
        "loss": first,
        "weights_changed": float(drawn[:, 1].mean()),
        "gap": float(gaps.mean()),
        "gap_deviation": float(gaps.std(ddof=1)),
        "better": float(np.mean(gaps < 0)),
        "signal": signal,
        "noise": float(np.mean(squares)),
        "cpu_seconds_per_sample": seconds / SAMPLES,
    }
