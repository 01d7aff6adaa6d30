"""A gradual run with checkpoints, as a program: `test_resume.py` kills it.

Arguments: folder for checkpoints, file for the result, resume mode.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh

STAGES = [fh.Stage(0.5, 6, anneals=3), fh.Stage(0.75, 6)]
METHOD = fh.HardConcrete(fh.FlexHiNM(8, permute=fh.RandomRows()))


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


def make(folder=None, resume=False, method=METHOD, stages=STAGES, **options):
    dense = params()
    uses = fh.discover(model, dense, batch_at(0)[0])
    defaults = {
        "batch_at": batch_at,
        "tx": optax.adamw(1e-2),
        "key": jax.random.key(5),
    }
    return fh.gradual(
        method,
        loss_fn,
        dense,
        uses,
        stages=stages,
        checkpoints=folder,
        save_every=2,
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
    np.savez(result, **outcome(run))
