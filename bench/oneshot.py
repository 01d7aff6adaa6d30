"""Transposable masks and one-shot pruners beside their anchors.

    make bench-oneshot                    # everything, some minutes
    make bench-oneshot ARGS=--quick       # one seed, small tiles, no 4096

Anchors are the reference codes on the same inputs (PyTorch, one thread). Errors are
|| X (W - W')^T ||^2 / || X W^T ||^2 in float64, on calibration and hold-out inputs. CPU
seconds are the least process time of three calls after compilation.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.optimize import linprog

import flexhinm_jax as fh
from bench import oneshot_inputs as inputs
from flexhinm_jax.ops import transport
from flexhinm_jax.patterns import ChannelSearch

RESULTS = Path(__file__).parent / "results"
KEY = 0
FIFTY: transport.Stages = ((20.0, 50),)


# name: per seed (calibration, hold-out or None)
ANCHORS: dict[str, list[tuple[float, float | None]]] = {
    "magnitude 2:4": [(0.132080, 0.132317), (0.132401, 0.132434), (0.131623, 0.131374)],
    "ria 2:4": [(0.087936, 0.088147), (0.082729, 0.082936), (0.090056, 0.090022)],
    "wanda 2:4": [(0.079205, 0.079484), (0.073533, 0.073546), (0.082121, 0.082281)],
    "sparsegpt 2:4": [(0.027548, 0.030820), (0.025203, 0.028177), (0.028561, 0.031821)],
    "alps 2:4": [(0.015988, 0.021330), (0.015063, 0.019973), (0.016691, 0.022101)],
    "magnitude 4:8": [(0.102701, None), (0.103794, None), (0.102374, None)],
    "ria 4:8": [(0.064015, None), (0.061863, None), (0.066932, None)],
    "wanda 4:8": [(0.056345, None), (0.053749, None), (0.059045, None)],
    "sparsegpt 4:8": [(0.019186, 0.021577), (0.018032, 0.020247), (0.020020, 0.022452)],
    "alps 4:8": [(0.011325, 0.015246), (0.010911, 0.014545), (0.011948, 0.015945)],
    "magnitude 50%": [(0.070793, None), (0.071389, None), (0.070126, None)],
    "ria 50%": [(0.042234, None), (0.040522, None), (0.042974, None)],
    "wanda 50%": [(0.035660, None), (0.034392, None), (0.036790, None)],
    "sparsegpt 50%": [(0.012948, 0.014483), (0.012087, 0.013495), (0.013152, 0.014654)],
    "alps 50%": [(0.007089, 0.009684), (0.006881, 0.009342), (0.007286, 0.009892)],
    "refit(wanda) 2:4": [(0.018737, 0.022448)],
    "refit(magnitude) 2:4": [(0.031369, 0.037289)],
    "sparsegpt T2:4": [(0.056187, 0.062512)],
    "sparsegpt T4:8": [(0.039875, 0.044600)],
    "sparsegpt T16:32": [(0.027962, 0.031491)],
    "alps T2:4": [(0.032336, 0.042483)],
    "alps T4:8": [(0.023355, 0.031183)],
    "alps T16:32": [(0.016283, 0.022169)],
    "best 2:4, natural order": [(0.015988, 0.021330)],
    "best 2:4, inputs permuted": [(0.0150, 0.0205)],
}

# Seconds of the PyTorch reference, one thread.
SECONDS = {"sparsegpt 2:4": 0.12, "alps 2:4": 1.7, "alps T16:32": 9.5}


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


def timed(call: Any) -> tuple[Any, float, float]:
    """(result, least CPU seconds of three calls, seconds of the first call)."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - began
    least = float("inf")
    for _ in range(3):
        began = time.process_time()
        found = jax.block_until_ready(call())
        least = min(least, time.process_time() - began)
    return found, least, first


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


def tile_losses(quick: bool) -> list[dict]:
    """Loss of the transposable solver against the exact optimum."""
    found = []
    sizes = (
        [(2, 4, 200), (4, 8, 60), (8, 16, 20)]
        if quick
        else [
            (2, 4, 200),
            (4, 8, 200),
            (8, 16, 200),
            (16, 32, 100),
        ]
    )
    seeds = range(1 if quick else 3)
    for n, m, count in sizes:
        for dist in ("normal", "t3"):
            a = np.concatenate(
                [inputs.tiles(inputs.scores(s, dist), m)[:count] for s in seeds]
            )
            best = optimum(a, n)
            row = {"pattern": f"{n}:{m} {dist}", "tiles": len(a)}
            for name, stages, exchanges in (
                ("50 sweeps", FIFTY, 0),
                ("50 sweeps + 8 exchanges", FIFTY, 8),
                ("annealed + 8 exchanges", transport.ACCURATE, 8),
            ):
                solution = transport.solve(
                    jnp.asarray(a),
                    n=n,
                    stages=stages,
                    exchanges=exchanges,
                    certify=True,
                )
                keep = np.asarray(solution.keep)
                exact = (keep.sum(1) == n).all() and (keep.sum(2) == n).all()
                row[name] = 100 * (1 - (a * keep).sum(dtype=np.float64) / best)
                row["sums exact"] = row.get("sums exact", True) and bool(exact)
            bound = np.asarray(solution.bound, np.float64).sum()
            row["certified gap"] = 100 * (bound / best - 1)
            found.append(row)
    return found


def tile_times(quick: bool) -> list[dict]:
    """End-to-end time of Transposable(4, 8) by size, kept share beside it."""
    found = []
    for size in (512, 1024) if quick else (1024, 2048, 4096):
        a = jnp.asarray(inputs.scores(0, size=size))
        project = jax.jit(fh.Transposable(4, 8).project)
        call = functools.partial(project, jax.random.key(KEY), a)
        support, seconds, first = timed(call)
        keep = support.keep
        kept = float(np.asarray(a)[np.asarray(keep)].sum(dtype=np.float64))
        row = {"size": size, "cpu_s": seconds, "first_s": first}
        row["kept"] = kept / float(np.asarray(a).sum(dtype=np.float64))
        row["anchor_s"] = {4096: 17.0, 1024: 0.63}.get(size)
        found.append(row)
    return found


def relative_error(w: np.ndarray, other: Any, gram: np.ndarray) -> float:
    """tr(D H D^T) / tr(W H W^T) in float64."""
    w = w.astype(np.float64)
    delta = np.asarray(other, np.float64) - w
    return float(np.sum(delta @ gram * delta) / np.sum(w @ gram * w))


def layer_errors(quick: bool) -> list[dict]:
    """Every method on the calibrated layers."""
    found = []
    for seed in range(1 if quick else 3):
        w, x, held_out = inputs.layer(seed)
        grams = [y.T.astype(np.float64) @ y for y in (x, held_out)]
        stats = fh.Stats(
            sq_norm=jnp.asarray(np.diag(grams[0]), jnp.float32),
            mean=jnp.asarray(x.mean(0)),
            count=jnp.float32(len(x)),
            gram=jnp.asarray(grams[0], jnp.float32),
        )
        for name, (method, sparsity) in methods().items():
            anchors = ANCHORS.get(name, [])
            if seed > 0 and len(anchors) <= seed:
                continue
            target = None if sparsity is None else jnp.float32(sparsity)
            run = jax.jit(
                lambda key, w, stats, target, method=method: method.solve(
                    key, w, stats, sparsity=target
                )
            )
            call = functools.partial(
                run, jax.random.key(KEY), jnp.asarray(w), stats, target
            )
            state, seconds, first = timed(call)
            plan = method.decide(state, jnp.asarray(w))
            fh.verify(plan)
            errors = [relative_error(w, plan.weight, h) for h in grams]
            row = {"method": name, "seed": seed, "calibration": errors[0]}
            row |= {"hold_out": errors[1], "cpu_s": seconds, "first_s": first}
            if len(anchors) > seed:
                row |= {"anchor": anchors[seed][0], "anchor_hold_out": anchors[seed][1]}
                row["ratio"] = errors[0] / anchors[seed][0]
            row["anchor_s"] = SECONDS.get(name)
            found.append(row)
    return found


def table(title: str, rows: list[dict]) -> Table:
    """Rows of equal keys as a table."""
    view = Table(title=title)
    names = list(dict.fromkeys(k for row in rows for k in row))
    for name in names:
        view.add_column(
            name, justify="left" if name in ("method", "pattern") else "right"
        )
    for row in rows:
        cells = [row.get(name) for name in names]
        view.add_row(
            *(
                "" if c is None else f"{c:.6f}" if isinstance(c, float) else str(c)
                for c in cells
            )
        )
    return view


def main() -> None:
    """Runs, prints and writes `results/oneshot.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, small tiles")
    parser.add_argument(
        "--only", choices=("tiles", "times", "layers"), help="one table alone"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args()
    console = Console(width=160)
    parts = {
        "tiles": ("Transposable: % loss to the exact optimum", tile_losses),
        "times": ("Transposable(4, 8) by size", tile_times),
        "layers": ("768 x 768 layers: relative squared error", layer_errors),
    }
    results: dict[str, Any] = {"quick": flags.quick, "jax": jax.__version__}
    for name, (title, run) in parts.items():
        if flags.only in (None, name):
            results[name] = run(flags.quick)
            console.print(table(title, results[name]))
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / "oneshot.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
