"""Speed of packed products on the CPU, beside the faster of two dense layouts.

    make bench-kernels                        # layers, then MiniLM
    make bench-kernels ARGS="--only layers"   # or --only minilm

A layer is timed as x @ W.T with W [out, in], as x @ Wt with Wt [in, out], packed as
files hold it, and packed and prepared (`kernels.prepare`). Repetitions are interleaved,
so other work on the machine meets all programs alike; a ratio is that of the faster
dense median to the packed median, and of the minima. CPU ratios compare process time,
which other processes disturb least but which does not see idle cores. Every row names
the form that the product takes (`kernels.xla`).
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.kernels import xla
from flexhinm_jax.patterns import FlexHiNM

RESULTS = Path(__file__).parent / "results" / "kernels.json"
SHAPES = ((1536, 384), (4096, 4096))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SPARSITY = 0.75


def times(programs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Name -> median, least wall and median process milliseconds, interleaved."""
    for run in programs.values():
        jax.block_until_ready(run())
    wall: dict[str, list[float]] = {name: [] for name in programs}
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 7 or (time.perf_counter() < end and rounds < 300):
        for name, run in programs.items():
            c, w = time.process_time(), time.perf_counter()
            jax.block_until_ready(run())
            wall[name].append(1e3 * (time.perf_counter() - w))
            cpu[name].append(1e3 * (time.process_time() - c))
        rounds += 1
    return {
        name: {
            "median_ms": float(np.median(wall[name])),
            "min_ms": min(wall[name]),
            "cpu_ms": float(np.median(cpu[name])),
        }
        for name in programs
    }


def ratios(found: dict[str, Any], name: str) -> dict[str, float]:
    """How many times faster than the faster dense layout."""
    dense = [found[k] for k in found if k.startswith("dense")]
    return {
        key: min(d[key] for d in dense) / found[name][key]
        for key in ("median_ms", "min_ms", "cpu_ms")
    }


def pack(shape: tuple[int, int], vector_size: int) -> tuple[Any, Any]:
    """(packed weight, dense weight) of a Gaussian matrix pruned by magnitude."""
    w = jax.random.normal(jax.random.key(0), shape)
    method = fh.Magnitude(FlexHiNM(vector_size, permute=None))
    state = method.solve(jax.random.key(1), w, None, sparsity=SPARSITY)
    plan = method.decide(state, w)
    return kernels.pack(plan), plan.weight


def layers(
    vector_size: int, batches: list[int], seconds: float
) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        packed, w = pack(shape, vector_size)
        ready = kernels.prepare(packed, "xla")
        wt = jnp.array(w.T)
        xla = functools.partial(fh.sparse_dot, backend="xla")
        programs = {
            "dense [out, in]": (jax.jit(lambda x, w: x @ w.T), w),
            "dense [in, out]": (jax.jit(lambda x, w: x @ w), wt),
            "packed": (jax.jit(xla), packed),
            "prepared": (jax.jit(xla), ready),
        }
        for batch in batches:
            x = jax.random.normal(jax.random.key(2), (batch, shape[1]))
            check(programs, x)
            found = times(
                {k: functools.partial(f, x, a) for k, (f, a) in programs.items()},
                seconds,
            )
            rows.append(
                {
                    "shape": shape,
                    "vector_size": vector_size,
                    "batch": batch,
                    "bytes": packed.nbytes / w.nbytes,
                    "prepared_bytes": ready.nbytes / w.nbytes,
                    "forms": {"packed": form(packed, batch), "prepared": "terms"},
                    "times": found,
                    "packed": ratios(found, "packed"),
                    "prepared": ratios(found, "prepared"),
                }
            )
            show_layer(rows[-1])
    return rows


def form(packed: Any, batch: int) -> str:
    """Name of the form of a product that is not prepared."""
    return xla.form_of(batch, jax.eval_shape(xla.slots_of, packed))


def check(programs: dict[str, Any], x: jax.Array) -> None:
    """Every program computes the product in float64 up to float32 rounding."""
    w = np.asarray(programs["dense [out, in]"][1], np.float64)
    want = np.asarray(x, np.float64) @ w.T
    for name, (f, a) in programs.items():
        np.testing.assert_allclose(f(x, a), want, rtol=1e-3, atol=1e-3, err_msg=name)


def minilm_rows(vector_sizes: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """Sentences per second of MiniLM, packed and dense, one batch of equal lengths."""
    from flexhinm_jax.cli import source
    from flexhinm_jax.models import encoder
    from train import minilm

    model = source.load(minilm.model_directory())
    params = jax.tree.map(jnp.asarray, model.params)
    embed = lambda p, tokens, mask: encoder.embed(p, tokens, mask, model.config)  # noqa: E731
    rows = []
    for vector_size in vector_sizes:
        trees = pruned(embed, params, vector_size)
        for sentences, length in ((32, 32), (8, 128)):
            shape = (sentences, length)
            tokens = jax.random.randint(jax.random.key(3), shape, 1000, 30000)
            mask = jnp.ones(shape, jnp.int32)
            dense, sparse = jax.jit(embed), jax.jit(fh.sparsify(embed))
            runs = {
                "dense": functools.partial(dense, trees["dense"], tokens, mask),
                "packed": functools.partial(sparse, trees["packed"], tokens, mask),
                "prepared": functools.partial(sparse, trees["prepared"], tokens, mask),
            }
            np.testing.assert_allclose(
                runs["prepared"](), runs["dense"](), rtol=1e-3, atol=1e-3
            )
            found = times(runs, seconds)
            rows.append(
                {
                    "vector_size": vector_size,
                    "sentences": sentences,
                    "tokens": length,
                    "times": found,
                    "sentences_per_second": {
                        k: 1e3 * sentences / v["median_ms"] for k, v in found.items()
                    },
                    "packed": ratios(found, "packed"),
                    "prepared": ratios(found, "prepared"),
                    "bytes": trees["bytes"],
                }
            )
            show_minilm(rows[-1])
    return rows


def pruned(embed: Any, params: Any, vector_size: int) -> dict[str, Any]:
    """The encoder with all linears at 75 %, in three forms.

    Speed does not depend on which weights stay, so the cheapest method prunes.
    """
    tokens = jnp.ones((2, 8), jnp.int32)
    uses = fh.discover(embed, params, tokens, jnp.ones_like(tokens))
    method = fh.Magnitude(FlexHiNM(vector_size, permute=None))
    states = fh.solve(method, jax.random.key(0), params, uses, None, sparsity=SPARSITY)
    plans = fh.decide(method, states, params, uses)
    packed = fh.pack(plans, params, uses)
    ready = kernels.prepare(packed, "xla")
    dense = sum(p.weight.nbytes for p in plans.values())
    size = lambda tree: sum(  # noqa: E731
        leaf.nbytes
        for leaf in jax.tree.leaves(
            tree, is_leaf=lambda v: isinstance(v, fh.PackedWeight)
        )
        if isinstance(leaf, fh.PackedWeight)
    )
    return {
        "dense": fh.densify(plans, params, uses),
        "packed": packed,
        "prepared": ready,
        "bytes": {"packed": size(packed) / dense, "prepared": size(ready) / dense},
    }


CONSOLE = Console(width=110)


def show_layer(row: dict[str, Any]) -> None:
    parts = [
        f"{k} as {row['forms'][k]} {row[k]['median_ms']:.2f} "
        f"(min {row[k]['min_ms']:.2f}, cpu {row[k]['cpu_ms']:.2f})"
        for k in ("packed", "prepared")
    ]
    best = min(v["min_ms"] for k, v in row["times"].items() if k.startswith("dense"))
    CONSOLE.print(
        f"{row['shape']} V={row['vector_size']} batch {row['batch']}: "
        f"dense {best:.2f} ms | " + " | ".join(parts),
        soft_wrap=True,
    )


def show_minilm(row: dict[str, Any]) -> None:
    table = Table(title=f"MiniLM V={row['vector_size']}, {row['sentences']} sentences")
    for name in ("form", "sentences/s", "ratio", "ratio of minima", "CPU ratio"):
        table.add_column(name)
    for k, rate in row["sentences_per_second"].items():
        r = row.get(k, {"median_ms": 1.0, "min_ms": 1.0, "cpu_ms": 1.0})
        table.add_row(
            k,
            f"{rate:.1f}",
            *(f"{r[m]:.2f}" for m in ("median_ms", "min_ms", "cpu_ms")),
        )
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("layers", "minilm"))
    parser.add_argument("--vector-size", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["machine"] = {
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
    }
    if args.only != "minilm":
        results["layers"] = layers(args.vector_size, args.batches, args.seconds)
        save(args.out, results)
    if args.only != "layers":
        results["minilm"] = minilm_rows((args.vector_size, 384), 2 * args.seconds)
        save(args.out, results)


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
