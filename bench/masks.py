"""Learned masks: identities and anchors, one layer, MiniLM, and memory per weight.

    make bench-masks                                   # all parts, MiniLM takes hours
    make bench-masks ARGS="--part figures,layer,memory"
    make bench-masks ARGS="--part model --only patch --cpu-seconds 300"
    make bench-masks ARGS="--part model --only 'refine_mask>maskllm'"  # > in quotes
    make bench-masks ARGS="--part bytes --only wanda,proxsparse --cpu-seconds 60"
    make bench-masks ARGS="--part longer --cpu-seconds 300"
    make bench-masks ARGS="--part hyper,noise"         # ablations; MaskPro's gradient

Figures and layer are beside the anchors of the measurements that the methods were
built to. The layer is that recipe with inputs of our own: W 64 x 64 and X = Z (I + M /
4) e^(s / 2) with normal W, Z (512 x 64), M and s by `numpy.random.default_rng(seed)`,
drawn in this order; relative squared error of the outputs. Relations carry over,
absolute errors differ from layer to layer by a tenth. Parts with models are in
`bench.mask_models`. CPU seconds are process time.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from bench import mask_models
from flexhinm_jax.ops import gates, pattern_logits, plackett_luce, prox
from flexhinm_jax.types import Stats
from train import log, mask_rows
from train.mask_learner import Learner

NM = fh.NM(2, 4)
KEY = 0

#: strength -> percentage of groups with exactly two non-zeros, unit-normal weights.
FRACTIONS = {0.1: 3.66, 0.5: 57.87, 1.0: 91.31}

#: (weights, strength) -> (result, objective), float64 with 2000 sweeps.
PROX = (
    ([1, 0.8, 0.5, 0.3], 0.5, [0.942669, 0.725509, 0.158042, 0]),
    ([1, 0.8, 0.5, 0.3], 0.1, [0.951790, 0.739841, 0.402257, 0.161536]),
    ([1, 1, 1, 1], 0.25, [2 / 3] * 4),
    ([0.5, 2, -1, 0.9], 1.0, [0, 2, -1, 0]),
)

#: row -> error of the reference measurement (or its range over two seeds).
LAYER = {
    "magnitude": "0.1291",
    "wanda": "0.0749",
    "soft, 6 logits, 600 steps, no prior": "0.0567-0.0569",
    "soft, 6 logits, 600 steps, magnitude prior": "0.0573-0.0574",
    "soft, 6 logits, 600 steps, Wanda prior": "0.0565-0.0570",
    "soft, 4 scores, 600 steps, Wanda prior": "0.0568-0.0571",
    "straight-through, 600 steps, Wanda prior": "0.0616-0.0646",
    "soft, 6 logits, 150 steps, Wanda prior": "0.0587-0.0591",
    "soft, 6 logits, 40 steps, Wanda prior": "0.0621-0.0627",
    "coordinate descent from Wanda": "0.0552",
    "coordinate descent from magnitude": "0.0560",
}


def figures() -> list[dict[str, Any]]:
    """Identities and anchors, each beside what it should be."""
    keys = jax.random.split(jax.random.key(KEY), 5)
    logits = jax.random.normal(keys[0], (64, 64, 6), jnp.float32)
    soft = [
        pattern_logits.mask(keys[1], logits, jnp.float32(t), n=2, m=4)
        for t in (4.0, 1.0, 0.05)
    ]
    off = max(float(jnp.max(jnp.abs(jnp.sum(s, -1) - 2))) for s in soft)
    found = [figure("soft groups: largest |sum - 2|", off, 0.0, 1e-6)]
    found.append(figure("density of samples - identity", *density(keys[2]), 1e-6))
    prior = pattern_logits.initial(jnp.array([True, True, False, False]), n=2, m=4)
    p = np.sort(np.asarray(jax.nn.softmax(100 * prior)))[::-1]
    for name, mine, want in (
        ("the prior pattern", p[0], 0.832),
        ("a neighbour of it", p[1], 0.041),
        ("its complement", p[5], 0.002),
    ):
        found.append(figure(f"probability of {name}", mine, want, 5e-4))
    for z, lam, want in PROX:
        mine = np.asarray(prox.prox24(jnp.array(z, jnp.float32), lam, sweeps=400))
        worst = float(np.max(np.abs(mine - want)))
        found.append(figure(f"prox {z} at {lam}: largest error", worst, 0.0, 1e-6))
    z = np.random.default_rng(KEY).normal(size=(100_000, 4)).astype(np.float32)
    for lam, want in FRACTIONS.items():
        run = jax.jit(functools.partial(prox.prox24, sweeps=20))
        w = np.asarray(run(z, lam))
        share = 100 * float(np.mean(np.sum(w != 0, -1) == 2))
        found.append(figure(f"prox at {lam}: % of groups at 2:4", share, want, 0.3))
        seconds = cpu(lambda: jax.block_until_ready(run(z, lam)))  # noqa: B023
        name = f"prox at {lam}: CPU s of 1e5 groups, 20 sweeps"
        found.append(figure(name, seconds, None, 0.5))
    return found + maskpro()


def density(key: Any) -> tuple[float, float]:
    """Mean mask of a sample of PATCH, and what its tile gates say."""
    method = fh.Patch(fh.Tiles(16))
    tile_key, logit_key, key = jax.random.split(key, 3)
    state = method.solve(key, jnp.ones((64, 64)), ones(64), sparsity=0.25)
    learned = {
        "tiles": jax.random.normal(tile_key, (4, 4), jnp.float32) / 25,
        "logits": jax.random.normal(logit_key, (64, 16, 6), jnp.float32) / 100,
    }
    state = dataclasses.replace(state, learned=learned)
    mask = method.mask(state, key)
    noise = gates.logistic(jax.random.split(key)[0], (4, 4))
    fixed = state.fixed
    scaled = fixed["tile_scale"] * learned["tiles"] + noise
    gate = jax.nn.sigmoid(scaled / fixed["tile_temperature"])
    return float(jnp.mean(mask)), float(0.5 + jnp.mean(gate) / 2)


def maskpro() -> list[dict[str, Any]]:
    """The log-probability of a pair, its gradient, and the sum over all pairs."""
    logits = jnp.array([0.3, -0.2, 0.5, 0.1], jnp.float32)
    pair = jnp.array([True, False, True, False])
    log_prob = functools.partial(plackett_luce.log_prob, keep=pair, n=2)
    value, grad = jax.value_and_grad(lambda x: log_prob(x))(logits)
    want = np.array([0.510614, -0.406410, 0.444392, -0.548596])
    table = jnp.asarray(gates.pattern_table(2, 4), bool)
    each = jax.vmap(lambda keep: plackett_luce.log_prob(logits, keep, n=2))(table)
    worst = float(np.max(np.abs(np.asarray(grad) - want)))
    return [
        figure("MaskPro: log-probability", float(value), -1.3293316402, 1e-6),
        figure("MaskPro: largest error of its gradient", worst, 0.0, 1e-6),
        figure("MaskPro: sum over six pairs", float(jnp.exp(each).sum()), 1.0, 1e-6),
    ]


def figure(
    name: str, value: Any, want: float | None, tolerance: float
) -> dict[str, Any]:
    """One line; without `want` the tolerance is a limit from above."""
    value = float(value)
    fine = value <= tolerance if want is None else abs(value - want) <= tolerance
    row = {"name": name, "value": value, "want": want, "tolerance": tolerance}
    return row | {"within": bool(fine)}


def cpu(run: Callable[[], Any], times: int = 5) -> float:
    """Median CPU seconds of a call that is compiled."""
    run()
    found = []
    for _ in range(times):
        before = time.process_time()
        run()
        found.append(time.process_time() - before)
    return float(np.median(found))


def ones(inputs: int) -> Stats:
    """Statistics of inputs without correlation."""
    gram = jnp.eye(inputs, dtype=jnp.float32)
    return Stats(jnp.diag(gram), jnp.zeros(inputs), jnp.float32(1), gram)


def layer(seed: int) -> tuple[Any, Stats]:
    """The 64 x 64 layer of a seed and its statistics."""
    rng = np.random.default_rng(seed)
    w, z = rng.normal(size=(64, 64)), rng.normal(size=(512, 64))
    mix, scale = np.eye(64) + 0.25 * rng.normal(size=(64, 64)), rng.normal(size=64)
    x = z @ mix * np.exp(0.5 * scale)
    gram = jnp.asarray(x.T @ x / 512, jnp.float32)
    s = Stats(jnp.diag(gram), jnp.zeros(64), jnp.float32(512), gram)
    return jnp.asarray(w, jnp.float32), s


def lost(w: Any, pruned: Any, gram: Any) -> Any:
    """Relative squared error of the outputs."""
    d = w - pruned
    total = jnp.sum(jnp.matmul(w, gram, precision="highest") * w)
    return jnp.sum(jnp.matmul(d, gram, precision="highest") * d) / total


@functools.partial(jax.jit, static_argnums=(0, 1))
def learn(method: Any, steps: int, key: Any, w: Any, given: Stats) -> Any:
    """Error of the hard mask after AdamW as in the recipe."""
    tx = optax.adamw(1e-2, b2=0.95, weight_decay=0.0)
    solve_key, key = jax.random.split(key)
    state = method.solve(solve_key, w, given)

    def step(carry: Any, at: Any) -> Any:
        state, opt, key = carry
        key, sample = jax.random.split(key)
        state = method.anneal(state, at / max(steps - 1, 1))

        def loss(learned: Any) -> Any:
            now = dataclasses.replace(state, learned=learned)
            plan = method.decide(now, w, key=sample)
            return lost(w, plan.weight, given.gram)

        updates, opt = tx.update(jax.grad(loss)(state.learned), opt, state.learned)
        learned = optax.apply_updates(state.learned, updates)
        return (dataclasses.replace(state, learned=learned), opt, key), None

    start = (state, tx.init(state.learned), key)
    times = jnp.arange(steps, dtype=jnp.float32)
    (state, _, _), _ = jax.lax.scan(step, start, times)
    return lost(w, method.decide(state, w).weight, given.gram)


def layer_methods() -> dict[str, tuple[Any, int]]:
    """Row -> (method, steps); 0 steps only solve."""
    dense: dict[str, Any] = {"weights": "dense", "center": False}
    soft = fh.MaskLLM(NM, reward=0.0)
    hard = dataclasses.replace(soft, relaxation="straight_through")
    free = dataclasses.replace(soft, start=0.0)
    magnitude = dataclasses.replace(soft, scores=fh.Magnitude())
    scores = dataclasses.replace(soft, parameters="weights")
    return {
        "magnitude": (fh.Magnitude(NM), 0),
        "wanda": (fh.Wanda(NM), 0),
        "soft, 6 logits, 600 steps, no prior": (free, 600),
        "soft, 6 logits, 600 steps, magnitude prior": (magnitude, 600),
        "soft, 6 logits, 600 steps, Wanda prior": (soft, 600),
        "soft, 4 scores, 600 steps, Wanda prior": (scores, 600),
        "straight-through, 600 steps, Wanda prior": (hard, 600),
        "soft, 6 logits, 150 steps, Wanda prior": (soft, 150),
        "soft, 6 logits, 40 steps, Wanda prior": (soft, 40),
        "coordinate descent from Wanda": (fh.RefineMask(fh.Wanda(NM), **dense), 0),
        "coordinate descent from magnitude": (
            fh.RefineMask(fh.Magnitude(NM), **dense),
            0,
        ),
        "hyperprune, net of its own": (fh.HyperPrune(fh.Wanda(NM)), 0),
    }


def layer_table(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """Every row on the layers of all seeds."""
    found = []
    for name, (method, steps) in layer_methods().items():
        errors, seconds = [], []
        for seed in seeds:
            w, given = layer(seed)
            key = jax.random.key(seed)
            before = time.process_time()
            if steps:
                error = learn(method, steps, key, w, given)
            else:
                plan = method.decide(method.solve(key, w, given), w)
                error = lost(w, jnp.where(plan.support.keep, w, 0), given.gram)
            errors.append(float(error))
            seconds.append(time.process_time() - before)
        found.append(
            {
                "row": name,
                "errors": errors,
                "mean": float(np.mean(errors)),
                "anchor": LAYER.get(name),
                "cpu_seconds_compiled": seconds[-1],
            }
        )
    return found


def memory(side: int = 512) -> list[dict[str, Any]]:
    """Bytes per prunable weight, of the arrays of a training state."""
    w = jax.random.normal(jax.random.key(KEY), (side, side), jnp.float32)
    apply_fn = lambda p, x: x @ p["w"].T  # noqa: E731
    params = {"w": w}
    x = jnp.ones((2, side), jnp.float32)
    uses = fh.discover(apply_fn, params, x)
    given = {"w": ones(side)}
    found = []
    learners = dict(mask_rows.LEARNERS)
    adam = {n: dataclasses.replace(x, optimizer="adam") for n, x in learners.items()}
    for name, learner in {
        **learners,
        **{f"{n}, Adam": x for n, x in adam.items()},
    }.items():
        if name.endswith(", Adam") and learners[name[:-6]].optimizer == "adam":
            continue
        found.append(bytes_of(name, learner, params, uses, given))
    theta = fh.HyperPrune(fh.Wanda(NM)).net(jax.random.key(KEY), 6, 6)
    held = size(theta)
    row = {"row": "hyperprune (bytes of the net, any model)", "learned": held}
    return [*found, row | {"gradient": held, "optimizer": 2 * held, "total": 4 * held}]


def bytes_of(
    name: str, learner: Learner, params: Any, uses: Any, given: Any
) -> dict[str, Any]:
    """One line."""
    method: Any = learner.method
    if isinstance(method, fh.Patch):
        method = method.with_pattern(fh.Tiles(128))
    target = None if not isinstance(method, fh.Patch) else 0.25
    key = jax.random.key(KEY)
    states = fh.solve(method, key, params, uses, given, target)
    state = fh.init_training(
        method, params, uses, states, None, key=key, mask_tx=learner.tx()
    )
    weights = sum(x.size for x in jax.tree.leaves(params))
    learned = size([s.learned for s in state.states.values()])
    parts = {
        "learned": learned / weights,
        "gradient": learned / weights,
        "optimizer": size(state.learned_opt) / weights,
    }
    fixed = size([s.fixed for s in state.states.values()]) / weights
    return {"row": name, **parts, "total": sum(parts.values()), "masks": fixed}


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table."""
    made = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        made.add_column(name, no_wrap=name in ("row", "name"))
    for row in rows:
        made.add_row(*(text(row.get(name)) for name in columns))
    Console(width=150).print(made)


def text(value: Any) -> str:
    """A cell."""
    if isinstance(value, list):
        return " ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


RUNS: dict[str, Callable[[], Any]] = {
    "figures": figures,
    "layer": layer_table,
    "memory": memory,
    "hyper": mask_models.hyper,
    "noise": mask_models.noise,
}
PARTS = (*RUNS, *mask_models.MODELS)


def main() -> None:
    """Runs the benchmark; a part that is not run keeps its last result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--part", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    add("--only", default="", help="rows of the models, or a part of their text")
    add("--cpu-seconds", type=float, default=1000.0, help="per learned row")
    add("--minutes", type=float, help="wall time per learned row instead")
    add("--work", type=Path, default=Path("out/bench-masks"))
    add("--out", type=Path, default=Path("bench/results/masks.json"))
    args, args.rest = parser.parse_known_args()
    for part in args.part.split(","):
        if part not in PARTS:
            raise SystemExit(f"--part {part}: choose from {', '.join(PARTS)}")
        if part in mask_models.MODELS:
            found: Any = mask_models.rows(part, args)
        else:
            found = RUNS[part]()
            show(part, found)
        log.update(args.out, **{part: found, "jax": jax.__version__})


if __name__ == "__main__":
    main()
