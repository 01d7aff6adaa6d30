"""Learned masks: identities and anchors, one layer, MiniLM, and memory per weight.

    make bench-masks                                   # all parts, MiniLM takes hours
    make bench-masks ARGS="--only figures,layer,memory"
    make bench-masks ARGS="--only model --rows patch --cpu-seconds 300"
    make bench-masks ARGS="--only model --rows 'refine_mask>maskllm'"  # > in quotes
    make bench-masks ARGS="--only bytes --rows wanda,proxsparse --cpu-seconds 60"
    make bench-masks ARGS="--only longer --cpu-seconds 300"
    make bench-masks ARGS="--only hyper,noise"         # ablations; MaskPro's gradient

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from bench import mask_models
from bench.mask_models import IDENTITIES, LAYER, MEMORY
from bench.study import Row, Study, anchors, timed
from flexhinm_jax.ops import gates, prox
from flexhinm_jax.types import Stats
from train.lab.masks import rows as mask_rows
from train.lab.masks.learner import Learner, state_bytes

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


def identity(
    name: str, value: Any, want: float | None, tolerance: float, **data: Any
) -> Row:
    """One line; without `want` the tolerance is a limit from above."""
    value = float(value)
    within = value <= tolerance if want is None else abs(value - want) <= tolerance
    more = {"tolerance": tolerance, "within": bool(within)}
    return Row(IDENTITIES, name, value, want, None, more, data)


def figures(_: argparse.Namespace) -> Iterator[Row]:
    """Identities and anchors, each beside what it should be."""
    keys = jax.random.split(jax.random.key(KEY), 5)
    logits = jax.random.normal(keys[0], (64, 64, 6), jnp.float32)
    soft = [
        gates.pattern_mask(keys[1], logits, jnp.float32(t), n=2, m=4)
        for t in (4.0, 1.0, 0.05)
    ]
    off = max(float(jnp.max(jnp.abs(jnp.sum(s, -1) - 2))) for s in soft)
    yield identity("soft groups: largest |sum - 2|", off, 0.0, 1e-6)
    yield identity("density of samples - identity", *density(keys[2]), 1e-6)
    prior = gates.initial_logits(jnp.array([True, True, False, False]), n=2, m=4)
    p = np.sort(np.asarray(jax.nn.softmax(100 * prior)))[::-1]
    for name, value, want in (
        ("the prior pattern", p[0], 0.832),
        ("a neighbour of it", p[1], 0.041),
        ("its complement", p[5], 0.002),
    ):
        yield identity(f"probability of {name}", value, want, 5e-4)
    for z, lam, best in PROX:
        reached = np.asarray(prox.prox24(jnp.array(z, jnp.float32), lam, sweeps=400))
        worst = np.max(np.abs(reached - best))
        yield identity(f"prox {z} at {lam}: largest error", worst, 0.0, 1e-6)
    z = np.random.default_rng(KEY).normal(size=(100_000, 4)).astype(np.float32)
    run = jax.jit(functools.partial(prox.prox24, sweeps=20))
    for lam, want in FRACTIONS.items():
        found = timed(functools.partial(run, z, lam), repeats=5)
        share = 100 * np.mean(np.sum(np.asarray(found.result) != 0, -1) == 2)
        yield identity(f"prox at {lam}: % of groups at 2:4", share, want, 0.3)
        name = f"prox at {lam}: CPU s of 1e5 groups, 20 sweeps"
        yield identity(name, found.median, None, 0.5)
    yield from maskpro()


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


def maskpro() -> Iterator[Row]:
    """The log-probability of a pair, its gradient, and the sum over all pairs."""
    logits = jnp.array([0.3, -0.2, 0.5, 0.1], jnp.float32)
    pair = jnp.array([True, False, True, False])
    log_prob = functools.partial(gates.log_prob, keep=pair, n=2)
    value, grad = jax.value_and_grad(lambda x: log_prob(x))(logits)
    want = np.array([0.510614, -0.406410, 0.444392, -0.548596])
    table = jnp.asarray(gates.pattern_table(2, 4), bool)
    each = jax.vmap(lambda keep: gates.log_prob(logits, keep, n=2))(table)
    worst = np.max(np.abs(np.asarray(grad) - want))
    yield identity("MaskPro: log-probability", value, -1.3293316402, 1e-6)
    yield identity("MaskPro: largest error of its gradient", worst, 0.0, 1e-6)
    yield identity("MaskPro: sum over six pairs", jnp.exp(each).sum(), 1.0, 1e-6)


def ones(inputs: int) -> Stats:
    """Statistics of inputs without correlation."""
    gram = jnp.eye(inputs, dtype=jnp.float32)
    return Stats(jnp.diag(gram), jnp.zeros(inputs), jnp.float32(1), gram)


def layer_of(seed: int) -> tuple[Any, Stats]:
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


def layer(_: argparse.Namespace) -> Iterator[Row]:
    """Every row on the layers of two seeds."""
    for name, (method, steps) in layer_methods().items():
        errors = []
        for seed in (0, 1):
            w, stats = layer_of(seed)
            key = jax.random.key(seed)
            before = time.process_time()
            if steps:
                error = learn(method, steps, key, w, stats)
            else:
                plan = method.decide(method.solve(key, w, stats), w)
                error = lost(w, jnp.where(plan.support.keep, w, 0), stats.gram)
            errors.append(float(error))
            seconds = time.process_time() - before  # of the second: compiled
        known = anchors(f"{LAYER}, reference")
        more = {"reference": known[name]} if name in known else {}
        data = {"errors": errors}
        yield Row(LAYER, name, float(np.mean(errors)), None, seconds, more, data)


def memory(_: argparse.Namespace) -> Iterator[Row]:
    """Bytes per prunable weight, of the arrays of a training state."""
    params = {"w": jax.random.normal(jax.random.key(KEY), (512, 512), jnp.float32)}
    x = jnp.ones((2, 512), jnp.float32)
    uses = fh.discover(lambda p, x: x @ p["w"].T, params, x)
    learners = dict(mask_rows.LEARNERS)
    for name, learner in list(learners.items()):
        if learner.optimizer != "adam":
            learners[f"{name}, Adam"] = dataclasses.replace(learner, optimizer="adam")
    for name, learner in learners.items():
        yield bytes_of(name, learner, params, uses)
    net = fh.HyperPrune(fh.Wanda(NM)).net(jax.random.key(KEY), 6, 6)
    held = sum(x.nbytes for x in jax.tree.leaves(net))
    more = {"learned": held, "gradient": held, "optimizer": 2 * held}
    yield Row(MEMORY, "hyperprune (bytes of the net, any model)", 4 * held, more=more)


def bytes_of(name: str, learner: Learner, params: Any, uses: Any) -> Row:
    """One line."""
    method, target = learner.method, None
    if isinstance(method, fh.Patch):
        method, target = method.with_pattern(fh.Tiles(128)), 0.25
    key, stats = jax.random.key(KEY), {"w": ones(512)}
    states = fh.solve(method, key, params, uses, stats, target)
    state = fh.init_training(
        method, params, uses, states, None, key=key, mask_tx=learner.tx()
    )
    weights, held = params["w"].size, state_bytes(state)
    more = {name: size / weights for name, size in held.items()}
    fixed = jax.tree.leaves([s.fixed for s in state.states.values()])
    masks = sum(x.nbytes for x in fixed)
    data = {"masks": masks / weights}
    return Row(MEMORY, name, sum(more.values()), more=more, data=data)


STUDY = Study(
    "masks",
    "Learned masks",
    {"figures": figures, "layer": layer, "memory": memory, **mask_models.PARTS},
    mask_models.NOTES,
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    add = parser.add_argument
    add("--rows", default="", help="of the models, or a part of their text")
    add("--cpu-seconds", type=float, default=1000.0, help="per learned row")
    add("--minutes", type=float, help="wall time per learned row instead")
    add("--work", type=Path, default=Path("out/bench-masks"))
    STUDY.main(parser)
