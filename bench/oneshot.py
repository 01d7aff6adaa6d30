"""Transposable masks and one-shot pruners beside their anchors.

    make bench-oneshot                    # everything, some minutes
    make bench-oneshot ARGS=--quick       # one seed, small tiles, no 4096

Anchors are the reference codes on the same inputs (PyTorch, one thread). Errors are
|| X (W - W')^T ||^2 / || X W^T ||^2 in float64, on calibration and hold-out inputs. CPU
seconds are the least process time of three calls after compilation.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.optimize import linprog

import flexhinm_jax as fh
from bench import inputs
from bench.study import Row, Study, anchors, timed
from flexhinm_jax.ops import transport
from flexhinm_jax.patterns import ChannelSearch

KEY = 0
FIFTY: transport.Stages = ((20.0, 50),)
LAYERS = "One-shot pruners, one layer"
TIMES = "Transposable masks 4:8, time"
TILES = "Transposable masks, distance to the optimum"


def methods() -> dict[str, tuple[fh.Method, float | None]]:
    """Every row of the layer table: name -> (method, sparsity)."""
    rows: dict[str, tuple[fh.Method, float | None]] = {}
    for label, pattern in (("2:4", fh.NM(2, 4)), ("4:8", fh.NM(4, 8))):
        for name in ("magnitude", "ria", "wanda", "sparsegpt", "alps"):
            rows[f"{name} {label}"] = fh.methods.parse(name, pattern), None
    row, layer = fh.Unstructured(scope="row"), fh.Unstructured()
    for name in ("magnitude", "ria", "wanda", "sparsegpt", "alps"):
        pattern = row if name in ("ria", "wanda") else layer
        rows[f"{name} 50%"] = fh.methods.parse(name, pattern), 0.5
    nm = fh.NM(2, 4)
    rows["refit(wanda) 2:4"] = fh.Refit(fh.Wanda(nm)), None
    rows["refit(magnitude) 2:4"] = fh.Refit(fh.Magnitude(nm)), None
    rows["refine_mask(wanda) 2:4, weights unmoved"] = (
        fh.RefineMask(fh.Wanda(nm), weights="dense"),
        None,
    )
    for n, m in ((2, 4), (4, 8), (16, 32)):
        pattern = fh.Transposable(n, m)
        rows[f"sparsegpt T{n}:{m}"] = fh.SparseGPT(pattern), None
        rows[f"alps T{n}:{m}"] = fh.ALPS(pattern), None
    slow = (1.1, 1.07, 1.03)
    rows["best 2:4, natural order"] = (
        fh.RefineMask(fh.ALPS(nm, growth=slow, damp=0.02), damp=0.02),
        None,
    )
    searched = fh.NM(2, 4, permute=ChannelSearch())
    rows["best 2:4, inputs permuted"] = (
        fh.RefineMask(fh.ALPS(searched, growth=slow, damp=0.02), damp=0.02),
        None,
    )
    return rows


def optimum(a: np.ndarray, n: int) -> float:
    """Sum over tiles of the exact best score: enumerated for m = 4, else HiGHS."""
    m = a.shape[-1]
    if m == 4:
        table = transport.mask_table(n, m).reshape(-1, 16).astype(np.float64)
        return float((a.reshape(-1, 16) @ table.T).max(1).sum())
    ones = np.ones((1, m))
    rows, columns = sparse.kron(sparse.eye(m), ones), sparse.kron(ones, sparse.eye(m))
    sums = sparse.vstack([rows, columns]).tocsr()
    cost = -a.reshape(len(a), -1).astype(np.float64)
    solve = functools.partial(
        linprog, A_eq=sums, b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs-ds"
    )
    return -sum(solve(c).fun for c in cost)


def tile_losses(flags: argparse.Namespace) -> Iterator[Row]:
    """Loss of the transposable solver against the exact optimum."""
    sizes = [(2, 4, 200), (4, 8, 200), (8, 16, 200), (16, 32, 100)]
    if flags.quick:
        sizes = [(2, 4, 200), (4, 8, 60), (8, 16, 20)]
    for n, m, count in sizes:
        for dist in ("normal", "t3"):
            every = [inputs.scores(s, dist) for s in range(1 if flags.quick else 3)]
            a = np.concatenate([inputs.tiles(s, m)[:count] for s in every])
            best, exact, lost = optimum(a, n), True, {}
            for name, stages, exchanges in (
                ("50 sweeps", FIFTY, 0),
                ("50 sweeps + 8 exchanges", FIFTY, 8),
                ("annealed", transport.ACCURATE, 8),
            ):
                solution = transport.solve(
                    jnp.asarray(a),
                    n=n,
                    stages=stages,
                    exchanges=exchanges,
                    certify=True,
                )
                keep = np.asarray(solution.keep)
                exact &= bool((keep.sum(1) == n).all() and (keep.sum(2) == n).all())
                lost[name] = 100 * (1 - (a * keep).sum(dtype=np.float64) / best)
            bound = np.asarray(solution.bound, np.float64).sum()
            value = lost.pop("50 sweeps + 8 exchanges")
            more = lost | {"certified": 100 * (bound / best - 1), "sums exact": exact}
            what = f"{n}:{m} {dist}, {len(a)} tiles"
            yield Row(TILES, what, value, more=more)


def tile_times(flags: argparse.Namespace) -> Iterator[Row]:
    """End-to-end time of Transposable(4, 8) by size, kept share beside it."""
    for size in (512, 1024) if flags.quick else (1024, 2048, 4096):
        a = jnp.asarray(inputs.scores(0, size=size))
        project = jax.jit(fh.Transposable(4, 8).project)
        timing = timed(functools.partial(project, jax.random.key(KEY), a))
        keep, wide = np.asarray(timing.result.keep), np.asarray(a, np.float64)
        more = {"kept": float(wide[keep].sum() / wide.sum())}
        data = {"first cpu_s": timing.first}
        yield Row(TIMES, f"{size} x {size}", timing.least, more=more, data=data)


def layer_errors(flags: argparse.Namespace) -> Iterator[Row]:
    """Every method on the calibrated layers."""
    for seed in range(1 if flags.quick else 3):
        w, x, held_out = inputs.held_out_layer(seed)
        stats = inputs.statistics(x)
        grams = [y.T.astype(np.float64) @ y for y in (x, held_out)]
        for name, (method, sparsity) in methods().items():
            what = f"{name}, seed {seed}"
            if seed > 0 and what not in anchors(LAYERS):
                continue
            target = None if sparsity is None else jnp.float32(sparsity)
            run = jax.jit(
                lambda key, w, stats, target, method=method: method.solve(
                    key, w, stats, sparsity=target
                )
            )
            args = jax.random.key(KEY), jnp.asarray(w), stats, target
            timing = timed(functools.partial(run, *args))
            plan = method.decide(timing.result, jnp.asarray(w))
            fh.verify(plan)
            error, other = (inputs.relative_error(w, plan.weight, h) for h in grams)
            data: dict[str, Any] = {"first cpu_s": timing.first}
            for kind in ("hold-out", "seconds"):
                data[f"anchor, {kind}"] = anchors(f"{LAYERS}, {kind}").get(what)
            yield Row(
                LAYERS, what, error, None, timing.least, {"hold-out": other}, data
            )


STUDY = Study(
    "oneshot",
    "One-shot pruners",
    {"layers": layer_errors, "times": tile_times, "tiles": tile_losses},
    {
        LAYERS: "Relative squared output error on the calibration inputs, smaller is "
        "better. The anchor is the reference code on the same inputs "
        "(`bench/anchors.json`).",
        TIMES: "CPU seconds after compilation, smaller is better.",
        TILES: "Percent below the exact optimum by linear programming, 50 sweeps and 8 "
        "exchanges; 0 is optimal. Beside it without exchanges, annealed with them, and "
        "how far the solver's own bound is above the optimum.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, small tiles")
    STUDY.main(parser)
