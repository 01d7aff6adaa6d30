"""Speed of packed products on the CPU, beside the fastest of three dense forms.

    make bench-kernels                        # layers, a decoder, then MiniLM
    make bench-kernels ARGS="--only layers"   # or --only decoder, minilm
    make bench-kernels ARGS="--threads 2"     # rows of their own

A layer is timed as x @ W.T with W [out, in], as x @ Wt with Wt [in, out], as
(W @ x.T).T, packed as files hold it, and packed and prepared (`kernels.prepare`):
several products in one program, as in a model, with as many weights, or with one that
stays in the cache. A repetition runs every program for some milliseconds, one after the
other, so other work on the machine meets all alike; its ratio is dense time over packed
time, by the wall clock where there are two threads, and by the time of the process with
one thread: there both are the same on an idle machine. Shown are the median of nine
ratios and their range; both clocks lie in the data. Every row keeps the form that the
product takes (`kernels.cost`, `kernels.xla`).
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from bench import inputs
from bench.study import Row, Study, use_cores
from flexhinm_jax import kernels
from flexhinm_jax.kernels import xla
from flexhinm_jax.models import decoder, generation
from flexhinm_jax.patterns import NM, FlexHiNM, HiNM
from train.lab import models

SHAPES = {
    (1536, 384): ("75 %",),
    (1536, 576): ("2:4", "HiNM 50 %"),
    (4096, 4096): ("75 %",),
}
BATCHES = (1, 4, 8, 64, 512)
SPARSITY = {"75 %": 0.75, "37.5 %": 0.375, "2:4": None, "HiNM 50 %": 0.5}
LAYERS = "Packed products on a CPU"
DECODER = "Tokens of a packed decoder on a CPU"
MODEL = "MiniLM packed on a CPU, 75 %"
GOAL, NOT_SLOWER = 1.3, 0.95  # times as fast as dense
REPETITIONS = 9
COPIES = 8  # of a weight in one program

Times = dict[str, dict[str, list[float]]]
"""Name of a program -> "wall" and "cpu" -> milliseconds in every repetition."""


def times(programs: dict[str, Callable[[], Any]], least: float = 0.03) -> Times:
    """Milliseconds of every program in nine repetitions that take turns.

    Args:
      programs: name -> what to run, compiled by a run before.
      least: seconds for which a program runs in every repetition.
    """
    calls = {}
    for name, run in programs.items():
        jax.block_until_ready(run())
        began = time.perf_counter()
        jax.block_until_ready(run())
        calls[name] = max(1, int(least / (time.perf_counter() - began)))
    taken: Times = {name: {"wall": [], "cpu": []} for name in programs}
    for _ in range(REPETITIONS):
        for name, run in programs.items():
            c, w = time.process_time(), time.perf_counter()
            for _ in range(calls[name]):
                y = run()
            jax.block_until_ready(y)
            each = 1e3 / calls[name]
            taken[name]["wall"].append(each * (time.perf_counter() - w))
            taken[name]["cpu"].append(each * (time.process_time() - c))
    return taken


def ratios(taken: Times, name: str, clock: str) -> np.ndarray:
    """How many times faster than the fastest dense form, in every repetition."""
    layouts = [k for k in taken if k.startswith("dense")]
    dense = min(layouts, key=lambda k: np.median(taken[k][clock]))
    return np.asarray(taken[dense][clock]) / np.asarray(taken[name][clock])


def row(table: str, what: str, taken: Times, anchor: float, **data: Any) -> Row:
    """The median ratio of the prepared form, and what stands beside it."""
    cores = len(os.sched_getaffinity(0))
    clock = "cpu" if cores == 1 else "wall"
    more: dict[str, Any] = {}
    for name in [name for name in ("prepared", "packed") if name in taken]:
        each = ratios(taken, name, clock)
        more[name] = float(np.median(each))
        more[f"{name}, range"] = f"{each.min():.2f} to {each.max():.2f}"
    value = more.pop("prepared")
    medians = {
        name: {clock: float(np.median(each)) for clock, each in both.items()}
        for name, both in taken.items()
    }
    data = data | {"milliseconds": medians, "cores": cores, "clock": clock}
    what += ", 1 thread" if cores == 1 else f", {cores} threads"
    return Row(table, what, value, anchor, None, more, data)


def pack(shape: tuple[int, int], kind: str, vector_size: int) -> tuple[Any, Any]:
    """(packed weight, dense weight) of a Gaussian matrix pruned by magnitude."""
    w = jax.random.normal(jax.random.key(0), shape)
    others = {"2:4": NM(2, 4), "HiNM 50 %": HiNM(128)}
    pattern = others.get(kind, FlexHiNM(vector_size, permute=None))
    method = fh.Magnitude(pattern)
    state = method.solve(jax.random.key(1), w, None, sparsity=SPARSITY[kind])
    plan = method.decide(state, w)
    return kernels.pack(plan), plan.weight


def layers(flags: argparse.Namespace) -> Iterator[Row]:
    """Products of single matrices."""
    cases = [(shape, kind) for shape, kinds in SHAPES.items() for kind in kinds]
    for shape, kind in cases:
        packed, w = pack(shape, kind, flags.vector_size)
        count = COPIES if w.nbytes < 1 << 24 else 2
        for copies in (count, 1) if count == COPIES else (count,):
            ready = kernels.prepare(copied(packed, copies))
            programs: dict[str, tuple[Any, list]] = {
                "dense [out, in]": (lambda x, w: x @ w.T, copied(w, copies)),
                "dense [in, out]": (lambda x, w: x @ w, copied(w.T, copies)),
                "dense, x second": (lambda x, w: (w @ x.T).T, copied(w, copies)),
                "prepared": (fh.sparse_dot, ready),
            }
            if copies > 1:  # one expansion would serve all products with a weight
                programs["packed"] = fh.sparse_dot, copied(packed, copies)
            for batch in flags.batches:
                x = jax.random.normal(jax.random.key(2), (batch, shape[1]))
                check(programs, x)
                runs = {
                    name: functools.partial(chained(f, count), x, weights)
                    for name, (f, weights) in programs.items()
                }
                data = {
                    "vector_size": flags.vector_size,
                    "bytes": [a.nbytes / w.nbytes for a in (packed, ready[0])],
                    "holds": list(ready[0].layouts),
                    "form": xla.form_of(batch, packed),
                }
                goal = 1.5 if batch >= 64 and kind == "75 %" else NOT_SLOWER
                where = "in the cache" if copies == 1 else f"{copies} weights"
                what = f"{kind}, {shape[0]} x {shape[1]}, {where}, batch {batch}"
                yield row(LAYERS, what, times(runs), goal, **data)


def copied(tree: Any, count: int) -> list[Any]:
    """The same tree so many times, each in memory of its own."""
    copy = functools.partial(jnp.array, copy=True)
    return [jax.tree.map(copy, tree) for _ in range(count)]


def chained(product: Callable, count: int) -> Callable:
    """So many products in one program, every input depending on the result before."""

    @jax.jit
    def run(x: jax.Array, weights: list[Any]) -> jax.Array:
        y = x
        for k in range(count):
            y = product(x, weights[k % len(weights)])
            x = x + 1e-9 * y[:, :1]
        return y

    return run


def decode(flags: argparse.Namespace) -> Iterator[Row]:
    """Layers of the shape of SmolLM2-135M, one token after another.

    Random weights: speed depends on shapes alone.
    """
    config = inputs.smollm2(flags.depth)
    start = decoder.init(jax.random.key(0), config)
    go = functools.partial(generation.generate, config=config, steps=16)
    dense, sparse = jax.jit(go), jax.jit(fh.sparsify(go))
    prompt = jnp.arange(8, dtype=jnp.int32)[None]
    for kind in flags.kinds:
        shapes = {a.shape for k, a in start.items() if ".layers." in k and a.ndim == 2}
        pairs: dict[tuple[int, ...], Any] = {
            (o, i): pack((o, i), kind, flags.vector_size) for o, i in shapes
        }
        both = {
            k: copied(pairs[a.shape], 1)[0]
            if ".layers." in k and a.ndim == 2
            else (a, a)
            for k, a in start.items()
        }
        packed = {k: pair[0] for k, pair in both.items()}
        zeros = {k: pair[1] for k, pair in both.items()}
        ready = kernels.prepare(packed)
        runs = {
            "dense": functools.partial(dense, zeros, prompt),
            "packed": functools.partial(sparse, packed, prompt),
            "prepared": functools.partial(sparse, ready, prompt),
        }
        tokens = {name: np.asarray(run().tokens) for name, run in runs.items()}
        same = float((tokens["prepared"] == tokens["dense"]).mean())
        size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))  # noqa: E731
        stored = {"packed": size(packed), "prepared": size(ready), "dense": size(zeros)}
        goal = GOAL if kind == "75 %" else 1.0
        yield row(
            DECODER,
            f"{kind}, {flags.depth} layers of 576",
            times(runs),
            goal,
            same_tokens=same,
            bytes=stored,
        )


def check(programs: dict[str, Any], x: jax.Array) -> None:
    """Every program computes the product in float64 up to float32 rounding."""
    w = np.asarray(programs["dense [out, in]"][1][0], np.float64)
    want = np.asarray(x, np.float64) @ w.T
    for name, (f, weights) in programs.items():
        y = jax.jit(f)(x, weights[0])
        np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3, err_msg=name)


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
            what = f"V={vector_size}, {sentences} x {length} tokens"
            yield row(MODEL, what, times(runs), GOAL, bytes=trees["bytes"])


def pruned(embed: Any, params: Any, vector_size: int) -> dict[str, Any]:
    """The encoder with all linears at 75 %, in three forms.

    Speed does not depend on which weights stay, so the cheapest method prunes.
    """
    tokens = jnp.ones((2, 8), jnp.int32)
    batch, key = (tokens, jnp.ones_like(tokens)), jax.random.key(0)
    method = fh.Magnitude(FlexHiNM(vector_size, permute=None))
    result = fh.prune(
        embed, params, [batch], method, sparsity=SPARSITY["75 %"], key=key
    )
    packed = {"packed": result.packed, "prepared": kernels.prepare(result.packed)}
    dense = sum(p.weight.nbytes for p in result.plans.values())
    size = lambda tree: sum(  # noqa: E731
        leaf.nbytes
        for leaf in jax.tree.leaves(
            tree, is_leaf=lambda v: isinstance(v, fh.PackedWeight)
        )
        if isinstance(leaf, fh.PackedWeight)
    )
    stored = {name: size(tree) / dense for name, tree in packed.items()}
    return {"dense": result.params, **packed, "bytes": stored}


STUDY = Study(
    "kernels",
    "Packed products, CPU",
    {"layers": layers, "decoder": decode, "minilm": minilm},
    {
        LAYERS: "Time of the fastest dense form over that of a prepared packed "
        "product, and of one that is not prepared (packed): median and range of nine "
        "repetitions, float32, V = 64. Larger is better; the anchor is the "
        "goal of the prepared form.",
        DECODER: "Time of 16 tokens with the dense weights over that with the "
        "packed ones: median and range of nine repetitions. Larger is better; the "
        "anchor is the goal.",
        MODEL: "Time of the dense model over that of the prepared one: median and "
        "range of nine repetitions. Larger is better; the anchor is the goal.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--vector-size", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--depth", type=int, default=30, help="layers of the decoder")
    parser.add_argument("--kinds", nargs="+", default=list(SPARSITY))
    parser.add_argument("--threads", type=int, default=1, help="and cores")
    use_cores(parser.parse_args().threads)  # before XLA counts them
    STUDY.main(parser)
