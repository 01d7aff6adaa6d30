"""Speed of packed products on the CPU, beside the faster of two dense layouts.

    make bench-kernels                        # layers, then MiniLM
    make bench-kernels ARGS="--only layers"   # or --only minilm

A layer is timed as x @ W.T with W [out, in], as x @ Wt with Wt [in, out], packed as
files hold it, and packed and prepared (`kernels.prepare`). Repetitions are interleaved,
so other work on the machine meets all programs alike; a ratio is that of the faster
dense median to the packed median, and of the minima. CPU ratios compare process time,
which other processes disturb least but which does not see idle cores. Every row keeps
the form that the product takes (`kernels.xla`).
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from bench.study import Row, Study
from flexhinm_jax import kernels
from flexhinm_jax.kernels import xla
from flexhinm_jax.patterns import FlexHiNM
from train.lab import models

SHAPES = ((1536, 384), (4096, 4096))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SPARSITY = 0.75
LAYERS = "Packed products on a CPU, FlexHiNM at 75 %"
MODEL = "MiniLM packed on a CPU, 75 %"
GOAL = 1.15  # times as fast as dense


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


def ratio(found: dict[str, Any], name: str, figure: str = "cpu_ms") -> float:
    """How many times faster than the faster dense layout."""
    dense = min(found[k][figure] for k in found if k.startswith("dense"))
    return dense / found[name][figure]


def pack(shape: tuple[int, int], vector_size: int) -> tuple[Any, Any]:
    """(packed weight, dense weight) of a Gaussian matrix pruned by magnitude."""
    w = jax.random.normal(jax.random.key(0), shape)
    method = fh.Magnitude(FlexHiNM(vector_size, permute=None))
    state = method.solve(jax.random.key(1), w, None, sparsity=SPARSITY)
    plan = method.decide(state, w)
    return kernels.pack(plan), plan.weight


def layers(flags: argparse.Namespace) -> Iterator[Row]:
    """Products of single matrices."""
    product = jax.jit(functools.partial(fh.sparse_dot, backend="xla"))
    for shape in SHAPES:
        packed, w = pack(shape, flags.vector_size)
        ready = kernels.prepare(packed, "xla")
        programs = {
            "dense [out, in]": (jax.jit(lambda x, w: x @ w.T), w),
            "dense [in, out]": (jax.jit(lambda x, w: x @ w), jnp.array(w.T)),
            "packed": (product, packed),
            "prepared": (product, ready),
        }
        for batch in flags.batches:
            x = jax.random.normal(jax.random.key(2), (batch, shape[1]))
            check(programs, x)
            runs = {k: functools.partial(f, x, a) for k, (f, a) in programs.items()}
            found = times(runs, flags.seconds)
            prepared = found["prepared"]["cpu_ms"]
            dense = ratio(found, "prepared") * prepared
            more = {
                "dense / prepared": ratio(found, "prepared"),
                "dense / packed": ratio(found, "packed"),
                "packed bytes": packed.nbytes / w.nbytes,
            }
            data = {
                "vector_size": flags.vector_size,
                "prepared bytes": ready.nbytes / w.nbytes,
                "form": xla.form_of(batch, packed),
                "times": found,
            }
            what = f"{shape[0]} x {shape[1]}, batch {batch}"
            yield Row(LAYERS, what, prepared, dense, None, more, data)


def check(programs: dict[str, Any], x: jax.Array) -> None:
    """Every program computes the product in float64 up to float32 rounding."""
    w = np.asarray(programs["dense [out, in]"][1], np.float64)
    want = np.asarray(x, np.float64) @ w.T
    for name, (f, a) in programs.items():
        np.testing.assert_allclose(f(x, a), want, rtol=1e-3, atol=1e-3, err_msg=name)


def minilm(flags: argparse.Namespace) -> Iterator[Row]:
    """MiniLM, packed and dense, one batch of equal lengths."""
    model = models.load(evaluation=1)
    dense, sparse = jax.jit(model.embed), jax.jit(fh.sparsify(model.embed))
    for vector_size in (flags.vector_size, 384):
        trees = pruned(model.embed, model.params, vector_size)
        for sentences, length in ((32, 32), (8, 128)):
            shape = (sentences, length)
            tokens = jax.random.randint(jax.random.key(3), shape, 1000, 30000)
            args = tokens, jnp.ones(shape, jnp.int32)
            runs = {
                name: functools.partial(
                    dense if name == "dense" else sparse, trees[name], *args
                )
                for name in ("dense", "packed", "prepared")
            }
            np.testing.assert_allclose(
                runs["prepared"](), runs["dense"](), rtol=1e-3, atol=1e-3
            )
            found = times(runs, 2 * flags.seconds)
            value = ratio(found, "prepared")
            more = {
                "wall ratio": ratio(found, "prepared", "median_ms"),
                "ratio of minima": ratio(found, "prepared", "min_ms"),
                "not prepared": ratio(found, "packed"),
            }
            what = f"V={vector_size}, {sentences} x {length} tokens"
            data = {"times": found, "bytes": trees["bytes"]}
            yield Row(MODEL, what, value, GOAL, None, more, data)


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


STUDY = Study(
    "kernels",
    "Packed products, CPU",
    {"layers": layers, "minilm": minilm},
    {
        LAYERS: "CPU milliseconds of a prepared packed product; the anchor is the "
        "faster dense layout in the same run; a ratio below 1 is faster than dense.",
        MODEL: "CPU time of the dense model over that of the prepared one, larger is "
        "better; the anchor is the goal.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--vector-size", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    STUDY.main(parser)
