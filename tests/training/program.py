"""A gradual run with checkpoints, as a program: `test_resume.py` kills it.

Arguments: folder for checkpoints, file for the result, resume mode.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh

STAGES = [fh.Stage(0.5, 6, anneals=3), fh.Stage(0.75, 6)]
METHOD = fh.HardConcrete(fh.FlexHiNM(8, permute=fh.RandomRows()))
TX = optax.adamw(1e-2)


def model(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def loss_fn(params, x, y):
    return jnp.mean(jnp.square(model(params, x) - y))


def batch_at(step):
    rng = np.random.default_rng(step)
    x = rng.standard_normal((16, 16), dtype=np.float32)
    return x, np.sin(3 * x[:, :8])


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "in": jax.random.normal(keys[0], (16, 24)) / 4,
        "bias": jnp.zeros(24),
        "out": jax.random.normal(keys[1], (24, 8)) / 5,
    }


@functools.cache
def uses():
    return fh.discover(model, params(), batch_at(0)[0])


STEPS: dict[Any, Any] = {}


def make_step(method, loss_fn, tx, uses, *, mask_tx, shardings):
    """Runs that do the same share a compiled step."""
    assert shardings is None
    name = method, loss_fn, tx, mask_tx
    if name not in STEPS:
        STEPS[name] = fh.make_step(method, loss_fn, tx, uses, mask_tx=mask_tx)
    return STEPS[name]


def make(folder=None, resume=False, method=METHOD, stages=STAGES, **options):
    defaults = {
        "batch_at": batch_at,
        "tx": TX,
        "key": jax.random.key(5),
        "make_step": make_step,
    }
    return fh.gradual(
        method,
        loss_fn,
        params(),
        uses(),
        stages=stages,
        checkpoints=folder,
        save_every=4,
        log_every=1,
        resume=resume,
        **(defaults | options),
    )


def outcome(run):
    """Arrays that a resumed run must reproduce, by name."""
    found = {f"p/{k}": v for k, v in run.params.items()}
    found |= {f"k/{k}": p.support.keep for k, p in run.plans.items()}
    tree = (run.training.opt_state, run.training.learned_opt)
    found |= {f"o/{j}": x for j, x in enumerate(jax.tree.leaves(tree))}
    return {k: np.asarray(v) for k, v in found.items()}


if __name__ == "__main__":
    folder, result, resume = sys.argv[1:]
    mode = {"new": False, "auto": "auto"}[resume]
    run = make(folder, mode)
    for row in run:
        print("step", row["step"], flush=True)
    arrays: Any = outcome(run)
    np.savez(result, **arrays)
