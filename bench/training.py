"""What training with masks costs: steps against dense steps, and the change of a stage.

    python -m bench.training            # both models
    python -m bench.training --only vit --repeats 10

The dense step is the same loss under the same optimiser, jitted alone. Repetitions of
all variants are interleaved and the median of their CPU seconds is taken, so that a
busy machine slows all of them alike. Writes bench/results/overhead.json.
"""

import argparse
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from flexhinm_jax.models import decoder
from flexhinm_jax.models.vision import create
from train import data, language, programs, vision

RESULTS = Path(__file__).parent / "results" / "overhead.json"
GOALS = {"keep_sparse": 1.05, "flexhinm_gp": 1.25, "stage change, dense steps": 20}
TX = optax.adamw(1e-3)
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with one batch.

    Attributes:
      params: the parameters.
      uses: what can be pruned.
      loss_fn: (params, *batch) -> f32[].
      batch: arguments after the parameters.
      vector_size: rows of a tile.
    """

    params: Any
    uses: Any
    loss_fn: Callable[..., Any]
    batch: tuple[Any, ...]
    vector_size: int


def vit() -> Case:
    """The digits ViT of train/configs, one batch of random images."""
    config = programs.config("digits_vit", vision.Config)
    model = create("vit", 10, **config.fields)
    rng = np.random.default_rng(0)
    images = rng.random((config.batch_size, 8, 8, 1), np.float32)
    labels = rng.integers(0, 10, config.batch_size)
    params = model.init(KEY, images[:1])
    apply_fn = model.apply
    uses = fh.discover(apply_fn, params, images, rules=dict(config.rules))

    def loss_fn(params, images, labels):
        logits = apply_fn(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    return Case(params, uses, loss_fn, (images, labels), config.vector_size)


def byte_lm() -> Case:
    """The byte decoder of train/configs on its own text."""
    config = programs.config("bytes", language.Config)
    source = data.text(None, config.length)
    tokens = data.windows(source.train, config.batch_size, config.length, 0, 0)
    params = decoder.init(KEY, config.model)
    apply_fn = functools.partial(decoder.apply, config=config.model)
    uses = fh.discover(apply_fn, params, tokens[:, :-1], rules=dict(config.rules))

    def loss_fn(params, tokens):
        logits = apply_fn(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return Case(params, uses, loss_fn, (tokens,), config.vector_size)


CASES = {"vit": vit, "byte_lm": byte_lm}


def dense(case: Case) -> Callable[[], Any]:
    """One dense step."""
    copy = functools.partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
    carry = [copy(case.params), TX.init(case.params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(case.loss_fn)(params, *batch)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def run():
        *carry[:], loss = step(*carry, *case.batch)
        return loss

    return run


def kept(case: Case) -> Callable[[], Any]:
    """The dense step under `keep_sparse`."""
    method = fh.Magnitude(fh.FlexHiNM(case.vector_size, permute=None))
    states = fh.solve(method, KEY, case.params, case.uses, sparsity=0.75)
    plans = fh.decide(method, states, case.params, case.uses)
    params = fh.densify(plans, case.params, case.uses)
    tx = fh.keep_sparse(TX, fh.keep_tree(plans, params, case.uses))
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    carry = [params, tx.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(case.loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def run():
        *carry[:], loss = step(*carry, *case.batch)
        return loss

    return run


def learned(case: Case, method: fh.Method, sparsity: float = 0.5) -> Callable[[], Any]:
    """One step of `make_step`."""
    states = fh.solve(method, KEY, case.params, case.uses, sparsity=sparsity)
    carry = [
        fh.init_training(method, case.params, case.uses, states, TX, key=KEY).at(0.5)
    ]
    step = fh.make_step(method, case.loss_fn, TX, case.uses)

    def run():
        carry[0], metrics = step(carry[0], *case.batch)
        return metrics["loss"]

    return run


def stage_change(case: Case) -> float:
    """CPU seconds of regions and Gyro on all weights, then of a later stage, summed."""
    method = fh.HardConcrete(fh.FlexHiNM(case.vector_size))

    def both(key):
        first = fh.solve(method, key, case.params, case.uses, sparsity=0.5)
        jax.block_until_ready(first)
        middle = time.process_time()
        second = fh.solve(
            method, key, case.params, case.uses, sparsity=0.75, prev=first
        )
        jax.block_until_ready(second)
        return middle

    both(KEY)  # compiles
    spent = []
    for j in range(3):
        start = time.process_time()
        middle = both(jax.random.key(j))
        spent.append((middle - start, time.process_time() - middle))
    first, later = (sorted(x)[1] for x in zip(*spent, strict=True))
    return max(first, later)


def measure(
    case: Case, repeats: int, calls: int, chosen: list[str], stages: bool
) -> dict[str, Any]:
    """Medians of CPU milliseconds per step, and ratios to the dense step."""
    flex = fh.FlexHiNM(case.vector_size, permute=None)
    known = {
        "dense": lambda: dense(case),
        "keep_sparse": lambda: kept(case),
        "magnitude": lambda: learned(case, fh.Magnitude(flex)),
        "flexhinm_gp": lambda: learned(case, fh.HardConcrete(flex)),
        "gumbel": lambda: learned(case, fh.GumbelPatterns(flex)),
    }
    variants = {name: known[name]() for name in known if name in chosen}
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        for _ in range(3):
            jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.process_time()
            for _ in range(calls):
                loss = run()
            jax.block_until_ready(loss)
            spent[name].append((time.process_time() - start) / calls)
    cost = {name: float(np.median(times)) for name, times in spent.items()}
    ratio = {name: cost[name] / cost["dense"] for name in cost}
    found: dict[str, Any] = {
        "weights": sum(x.size for x in jax.tree.leaves(case.params)),
        "cpu_ms": {name: round(1e3 * x, 3) for name, x in cost.items()},
        "ratio": {name: round(x, 3) for name, x in ratio.items()},
    }
    if stages:
        change = stage_change(case)
        found["stage_change_cpu_s"] = round(change, 3)
        found["stage_change_dense_steps"] = round(change / cost["dense"], 1)
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(CASES), help="models, with commas")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--calls", type=int, default=10, help="steps per round")
    every = "dense,keep_sparse,magnitude,flexhinm_gp,gumbel"
    parser.add_argument("--variants", default=every, help="kinds of step, with commas")
    parser.add_argument("--no-stages", action="store_true", help="steps only")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"error: --only {unknown[0]}: choose from {', '.join(CASES)}")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        chosen = ["dense", *args.variants.split(",")]
        case = CASES[name]()
        new = measure(case, args.repeats, args.calls, chosen, not args.no_stages)
        found[name] = found.get(name, {}) | new
        print(name, json.dumps(new, indent=1), flush=True)
    found["machine"] = {"jax": jax.__version__, "python": platform.python_version()}
    found["goals"] = GOALS
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
