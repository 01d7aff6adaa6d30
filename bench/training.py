"""What training with masks costs: steps against dense steps, and the change of a stage.

    make bench-training
    make bench-training ARGS="--only vit --repeats 10"

The dense step is the same loss under the same optimiser, jitted alone. Repetitions of
all variants are interleaved and the median of their CPU seconds is taken, so that a
busy machine slows all of them alike.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from bench.study import Row, Study
from flexhinm_jax.models import decoder
from flexhinm_jax.models.vision import create
from flexhinm_jax.training.state import MASK_TX
from train import language, vision
from train.lab import data, optimizers, programs, recipes

TABLE = "Training, CPU time over the dense step"
GOALS = {"keep_sparse": 1.05, "flexhinm_gp": 1.25, "gates without noise": 1.35}
STAGE_GOAL = 20  # dense steps
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


def mlp() -> Case:
    """The residual MLP of train/configs: 37 thousand weights."""
    return classifier("digits_mlp")


def vit() -> Case:
    """The digits ViT of train/configs."""
    return classifier("digits_vit")


def classifier(name: str) -> Case:
    """A classifier of digits, one batch of random images.

    Args:
      name: of its configuration.
    """
    config = programs.config(name, vision.Config)
    model = create(config.model, 10, **config.fields)
    rng = np.random.default_rng(0)
    images = rng.random((config.batch_size, 8, 8, 1), np.float32)
    labels = rng.integers(0, 10, config.batch_size)
    params = model.init(KEY, images[:1])
    apply_fn = model.apply
    uses = fh.discover(apply_fn, params, images, rules=dict(config.rules))

    def loss_fn(params, images, labels):
        logits: Any = apply_fn(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    return Case(params, uses, loss_fn, (images, labels), config.vector_size)


def linears() -> Case:
    """Two layers of the shape of MiniLM's, 512 tokens: what gates cost per weight."""
    params = {
        f"w{k}": jax.random.normal(jax.random.key(k), (384, 1536)) for k in range(2)
    }
    x = jax.random.normal(jax.random.key(2), (512, 384))

    def apply_fn(params, x):
        return x @ params["w0"] + x @ params["w1"]

    def loss_fn(params, x):
        return jnp.mean(jnp.square(apply_fn(params, x)))

    return Case(params, fh.discover(apply_fn, params, x), loss_fn, (x,), 32)


def byte_lm() -> Case:
    """The byte decoder of train/configs on its own text."""
    config = programs.config("bytes", language.Config)
    source = data.text(None, config.length)
    tokens = data.windows(source.train, config.batch_size, config.length, 0, 0)
    params = decoder.init(KEY, config.model)
    apply_fn = functools.partial(decoder.apply, config=config.model)
    uses = fh.discover(apply_fn, params, tokens[:, :-1], rules=dict(config.rules))

    def loss_fn(params, tokens):
        return language.nats(apply_fn(params, tokens[:, :-1]), tokens)

    return Case(params, uses, loss_fn, (tokens,), config.vector_size)


def plain(loss_fn: Any, params: Any, tx: Any, batch: Any) -> Callable[[], Any]:
    """One step of an optimiser."""
    copy = functools.partial(jax.tree.map, lambda x: jnp.array(x, copy=True))
    carry = [copy(params), tx.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def run():
        *carry[:], loss = step(*carry, *batch)
        return loss

    return run


def kept(case: Case) -> Callable[[], Any]:
    """The dense step under `keep_sparse`."""
    method = fh.Magnitude(fh.FlexHiNM(case.vector_size, permute=None))
    states = fh.solve(method, KEY, case.params, case.uses, sparsity=0.75)
    plans = fh.decide(method, states, case.params, case.uses)
    params = fh.densify(plans, case.params, case.uses)
    tx = fh.keep_sparse(TX, fh.keep_tree(plans, params, case.uses))
    return plain(case.loss_fn, params, tx, case.batch)


def learned(case: Case, method: fh.Method, mask_tx: Any = MASK_TX) -> Callable[[], Any]:
    """One step of `make_step`."""
    states = fh.solve(method, KEY, case.params, case.uses, sparsity=0.5)
    like = functools.partial(fh.init_training, key=KEY, mask_tx=mask_tx)
    carry = [like(method, case.params, case.uses, states, TX).at(0.5)]
    step = fh.make_step(method, case.loss_fn, TX, case.uses, mask_tx=mask_tx)

    def run():
        carry[0], metrics = step(carry[0], *case.batch)
        return metrics["loss"]

    return run


def without_noise(case: Case, pattern: fh.Pattern) -> Callable[[], Any]:
    """One step of the gates that did best, see train/LOG.md."""
    recipe = recipes.noiseless(pattern)
    assert recipe.method is not None
    tx = optimizers.make(recipe.mask_optimizer, recipe.mask_rate)
    return learned(case, recipe.method, tx)


def stage_change(case: Case) -> float:
    """CPU seconds of regions and Gyro on all weights; a later stage's if longer."""
    method = fh.HardConcrete(fh.FlexHiNM(case.vector_size))
    solve = functools.partial(fh.solve, method)
    spent: list[tuple[float, float]] = []
    for j in range(4):  # the first compiles
        start, key = time.process_time(), jax.random.key(j)
        first = solve(key, case.params, case.uses, sparsity=0.5)
        jax.block_until_ready(first)
        middle = time.process_time()
        later = solve(key, case.params, case.uses, sparsity=0.75, prev=first)
        jax.block_until_ready(later)
        spent.append((middle - start, time.process_time() - middle))
    return max(sorted(x)[1] for x in zip(*spent[1:], strict=True))


def costs(make: Callable[[], Case]) -> Callable[[argparse.Namespace], Iterator[Row]]:
    """A part: one model."""

    def part(flags: argparse.Namespace) -> Iterator[Row]:
        case, name = make(), make.__name__
        flex = fh.FlexHiNM(case.vector_size, permute=None)
        variants = {
            "dense": plain(case.loss_fn, case.params, TX, case.batch),
            "keep_sparse": kept(case),
            "magnitude": learned(case, fh.Magnitude(flex)),
            "flexhinm_gp": learned(case, fh.HardConcrete(flex)),
            "gates without noise": without_noise(case, flex),
            "gumbel": learned(case, fh.GumbelPatterns(flex)),
        }
        spent: dict[str, list[float]] = {variant: [] for variant in variants}
        for run in variants.values():
            for _ in range(3):
                jax.block_until_ready(run())
        for _ in range(flags.repeats):
            for variant, run in variants.items():
                start = time.process_time()
                for _ in range(flags.calls):
                    loss = run()
                jax.block_until_ready(loss)
                spent[variant].append((time.process_time() - start) / flags.calls)
        cost = {variant: float(np.median(times)) for variant, times in spent.items()}
        weights = {"weights": sum(x.size for x in jax.tree.leaves(case.params))}
        for variant, seconds in cost.items():
            ratio, more = seconds / cost["dense"], {"CPU ms": 1e3 * seconds}
            goal = GOALS.get(variant)
            what = f"{name}: {variant}"
            yield Row(TABLE, what, ratio, goal, more=more, data=weights)
        seconds = stage_change(case)
        steps, what = seconds / cost["dense"], "change of a stage, in dense steps"
        more = {"CPU ms": 1e3 * seconds}
        yield Row(TABLE, f"{name}: {what}", steps, STAGE_GOAL, more=more)

    return part


STUDY = Study(
    "training",
    "Cost of training",
    {f.__name__: costs(f) for f in (byte_lm, vit, mlp, linears)},
    {
        TABLE: "Median CPU time relative to the dense step of the same run, smaller is "
        "better; the anchor is the goal in `bench/training.py`; below 1 meets it."
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--calls", type=int, default=10, help="steps per round")
    STUDY.main(parser)
