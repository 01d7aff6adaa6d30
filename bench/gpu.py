"""GPU kernels: first whether they are right, then how fast they are.

    make bench-gpu                    # on a GPU: numerics, times, roofline figure
    make bench-gpu ARGS=--numerics    # numerics alone

1. Numerics. Every kernel for the chip at hand, many shapes, bfloat16 and float16, fresh
   random inputs, against float64 on the host. Memory that results are written to is
   filled with NaN before. Nothing is timed if one case fails.
2. Times. One program runs products with enough copies of the weight to exceed the L2
   cache several times, over and over; the median of many runs, per product. Beside it
   the dense product of the same size (cuBLAS through `jnp.dot`) and, where torch is
   installed, `torch.sparse.to_sparse_semi_structured`.
3. Floors. The bytes a product must move over the measured copy bandwidth of the chip,
   and its operations over the measured dense rate (twice that for 2:4), the larger.

Without a GPU the same script checks tiny shapes in the Mosaic interpreter (jax >=
0.11.2) and reports every time as not measured.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from bench import study
from flexhinm_jax.gpu import registry, selfcheck, support
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.kernels import dispatch
from flexhinm_jax.kernels.packing import unpack
from flexhinm_jax.ops.words import to_words
from flexhinm_jax.types import PackedWeight

RESULTS = Path(__file__).parent / "results"

H200 = {"bandwidth": 4.3e12, "dense_rate": 790e12}
"""Measured on an H200, for floors where no GPU is at hand."""


class Size(NamedTuple):
    """Sizes of a packed weight: tiles, rows of one, inputs, dense and 2:4 columns."""

    name: str
    tiles: int
    rows: int
    inputs: int
    dense: int
    kept: int


def two_of_four(o: int, i: int) -> Size:
    """Plain 2:4."""
    return Size("2:4", 1, o, i, 0, i)


def flexhinm(o: int, i: int, v: int) -> Size:
    """FlexHiNM at 75 %: an eighth of the columns dense, a quarter 2:4."""
    return Size(f"FlexHiNM v={v}", o // v, v, i, i // 8, i // 4)


TINY = [
    Size("2:4", 1, 40, 260, 0, 260),
    Size("FlexHiNM v=16", 2, 16, 100, 11, 52),
]
CHECKED = [
    two_of_four(64, 64),
    two_of_four(1000, 388),
    two_of_four(1536, 384),
    two_of_four(4096, 4096),
    Size("odd", 3, 20, 150, 13, 116),
    Size("odd", 5, 96, 1000, 129, 404),
    Size("dense columns", 4, 64, 512, 100, 0),
    Size("HiNM v=64", 64, 64, 4096, 0, 2048),
    flexhinm(1536, 384, 32),
    flexhinm(4096, 4096, 64),
    flexhinm(4096, 4096, 128),
]
TIMED = [
    two_of_four(4096, 4096),
    two_of_four(8192, 8192),
    two_of_four(14336, 4096),
    flexhinm(4096, 4096, 64),
    flexhinm(8192, 8192, 64),
    flexhinm(8192, 8192, 128),
]
TOKENS_CHECKED = (1, 7, 16, 33, 64, 65, 130, 512)
TOKENS_TIMED = (1, 16, 64, 256, 1024, 4096)


def random_weight(key: jax.Array, size: Size, dtype: Any) -> PackedWeight:
    """A packed weight with random values, positions, columns and row order."""
    values, positions, columns, order = jax.random.split(key, 4)
    t, v, i = size.tiles, size.rows, size.inputs
    groups = size.kept // 4
    pairs = [a | b << 2 for a in range(4) for b in range(a + 1, 4)]
    padded = (t, v, -(-groups // 8) * 8)
    nibbles = jnp.asarray(pairs, jnp.uint32)[
        jax.random.randint(positions, padded, 0, len(pairs))
    ]
    nibbles = jnp.where(jnp.arange(padded[-1]) < groups, nibbles, jnp.uint32(0))
    pick = jax.vmap(functools.partial(jax.random.permutation, x=i))
    index = pick(jax.random.split(columns, t)).astype(jnp.int32)
    dense, kept = jnp.split(
        jax.random.normal(values, (t, v, size.dense + 2 * groups)).astype(dtype),
        [size.dense],
        axis=-1,
    )
    return PackedWeight(
        dense_index=index[:, : size.dense],
        dense_values=dense,
        nm_index=index[:, size.dense : size.dense + 4 * groups],
        nm_values=kept,
        nm_positions=to_words(nibbles, 4),
        out_order=jax.random.permutation(order, t * v).astype(jnp.int32),
        left=None,
        right=None,
        shape=(t * v, i),
        n=2,
        m=4,
    )


def serving(capability: tuple[int, int]) -> dict[str, Kernel]:
    """Kernels for a chip by name."""
    kernels = registry.KERNELS
    return {n: k for n, k in kernels.items() if capability[0] in k.majors}


def with_layout(kernel: Kernel, packed: PackedWeight) -> PackedWeight:
    """The packed weight with the layout of a kernel."""
    ready = jax.jit(kernel.prepare)(packed)
    return dataclasses.replace(packed, layouts={kernel.name: ready})


def poison(count: int) -> None:
    """Fills freed memory with NaN, so that a result never written shows."""
    fill = [jnp.full((count,), jnp.nan, jnp.float32) for _ in range(4)]
    jax.block_until_ready(fill)


def worst_error(y: jax.Array, x: jax.Array, packed: PackedWeight) -> float:
    """Largest error over its bound; above 1 a product is wrong.

    The bound is one rounding to the dtype of the result, and 2^-14 of the sum of the
    absolute products for sums in float32 that may be truncated.
    """
    up = lambda a: np.asarray(a.astype(jnp.float32), np.float64)  # noqa: E731
    dense, got, given = up(unpack(packed)), up(y), up(x)
    if not np.isfinite(got).all():
        return float("inf")
    rows = np.random.default_rng(0).permutation(len(dense))[:512]
    want = given @ dense[rows].T
    bound = np.abs(given) @ np.abs(dense[rows]).T * 2.0**-14
    bound += np.abs(want) * float(jnp.finfo(y.dtype).eps) + 1e-30
    return float((np.abs(got[:, rows] - want) / bound).max())


def check(
    kernel: Kernel,
    size: Size,
    n: int,
    dtype: Any,
    key: jax.Array,
    interpret: bool,
) -> dict[str, Any] | None:
    """One numerical check, or None where the kernel does not serve the size."""
    weights, inputs = jax.random.split(key)
    packed = with_layout(kernel, random_weight(weights, size, dtype))
    x = jax.random.normal(inputs, (n, size.inputs)).astype(dtype)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if kernel.refuse(shape, packed, (9, 0)) is not None:
        return None
    poison(2 * n * packed.shape[0])
    if interpret and kernel.name not in dispatch.PLAIN:
        with support.interpreted():
            y = kernel.run(x, packed, dtype)
    else:
        y = jax.jit(kernel.run, static_argnums=2)(x, packed, dtype)
    o, i = packed.shape
    return {
        "kernel": kernel.name,
        "size": f"{size.name} {o}x{i} n={n} {jnp.dtype(dtype).name}",
        "worst": worst_error(y, x, packed),
    }


def numerics(kernels: dict[str, Kernel], interpret: bool) -> list[dict[str, Any]]:
    """All checks."""
    sizes = TINY if interpret else CHECKED
    tokens = (3,) if interpret else TOKENS_CHECKED
    key, rows = jax.random.key(time.time_ns() % 2**32), []
    for name, kernel in kernels.items():
        refused = selfcheck.failure(kernel.module) if kernel.module else None
        if refused is not None:
            print(f"WRONG {name}: {refused}")
            rows.append({"kernel": name, "size": refused, "worst": float("inf")})
            continue
        for size in sizes:
            for dtype in (jnp.bfloat16, jnp.float16):
                for n in tokens:
                    key, this = jax.random.split(key)
                    row = check(kernel, size, n, dtype, this, interpret)
                    if row is not None:
                        rows.append(row)
                        if row["worst"] > 1:
                            print(f"WRONG {row}")
    return rows


def per_product(
    product: Callable[..., jax.Array], x: jax.Array, weights: list[Any]
) -> float:
    """Median seconds of one product, every weight in turn, inside one program."""
    rounds = 8

    @jax.jit
    def run(x: jax.Array, weights: list[Any]) -> jax.Array:
        def one_round(_: Any, x: jax.Array) -> jax.Array:
            for weight in weights:
                y = product(x, weight)
                # Each product waits for the one before it, at the cost of a scalar.
                x = x.at[0, 0].add(jnp.zeros((), x.dtype) * y[0, 0].astype(x.dtype))
            return x

        return jax.lax.fori_loop(0, rounds, one_round, x)

    run(x, weights).block_until_ready()
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        run(x, weights).block_until_ready()
        taken.append((time.perf_counter() - start) / (rounds * len(weights)))
    return statistics.median(taken)


def copies(nbytes: int) -> int:
    """Copies of a weight that exceed the L2 cache several times."""
    return max(2, -(-400 * 2**20 // nbytes))


def torch_time(o: int, i: int, n: int) -> float | None:
    """Seconds of a 2:4 product of torch, or None where there is no torch or no GPU."""
    try:
        import torch
        from torch.sparse import to_sparse_semi_structured
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    pattern = torch.tensor([1.0, 1, 0, 0], device="cuda", dtype=torch.bfloat16)
    make = lambda: to_sparse_semi_structured(  # noqa: E731
        torch.randn(o, i, device="cuda", dtype=torch.bfloat16) * pattern.tile(o, i // 4)
    )
    weights = [make() for _ in range(copies(o * i * 9 // 8))]
    x = torch.randn(max(n, 8), i, device="cuda", dtype=torch.bfloat16)
    for weight in weights:
        torch.nn.functional.linear(x, weight)
    taken = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(8):
            for weight in weights:
                torch.nn.functional.linear(x, weight)
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / (8 * len(weights)))
    return statistics.median(taken)


def chip_limits() -> dict[str, float]:
    """Copy bandwidth [byte/s] and dense bfloat16 rate [operations/s], measured."""
    big = jnp.ones(2**29, jnp.bfloat16)
    bump = jax.jit(lambda x: x + jnp.bfloat16(1))
    square = jnp.ones((8192, 8192), jnp.bfloat16)
    dot = jax.jit(lambda x: x @ x)

    def best(function: Any, argument: jax.Array) -> float:
        function(argument).block_until_ready()
        taken = []
        for _ in range(20):
            start = time.perf_counter()
            function(argument).block_until_ready()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return {
        "bandwidth": 2 * big.nbytes / best(bump, big),
        "dense_rate": 2 * 8192**3 / best(dot, square),
    }


def floor(size: Size, n: int, limits: dict[str, float]) -> float:
    """Least seconds of a packed product: bytes or operations, the larger."""
    o = size.tiles * size.rows
    stored = size.dense + size.kept // 2
    index = 0 if size.tiles == 1 else 2 * size.tiles * (size.dense + size.kept)
    moved = o * (2 * stored + size.kept // 8) + index + 2 * n * (size.inputs + o)
    work = 2 * n * o * (size.dense + size.kept / 2)
    return max(moved / limits["bandwidth"], work / limits["dense_rate"])


def dense_floor(size: Size, n: int, limits: dict[str, float]) -> float:
    """Least seconds of the dense product."""
    o, i = size.tiles * size.rows, size.inputs
    moved = 2 * (o * i + n * i + n * o)
    return max(moved / limits["bandwidth"], 2 * n * o * i / limits["dense_rate"])


def timings(kernels: dict[str, Any], limits: dict[str, float]) -> list[dict[str, Any]]:
    """Times of every kernel beside the dense product."""
    dtype, rows = jnp.bfloat16, []
    for size in TIMED:
        o, i = size.tiles * size.rows, size.inputs
        keys = iter(jax.random.split(jax.random.key(0), 64))
        dense = [
            jax.random.normal(next(keys), (o, i), jnp.bfloat16)
            for _ in range(copies(2 * o * i))
        ]
        one = random_weight(next(keys), size, dtype)
        packed = [
            random_weight(next(keys), size, dtype) for _ in range(copies(one.nbytes))
        ]
        for n in TOKENS_TIMED:
            x = jax.random.normal(next(keys), (n, i), jnp.bfloat16)
            base = per_product(lambda x, w: x @ w.T, x, dense)
            row: dict[str, Any] = {"size": f"{size.name} {o}x{i}", "n": n}
            row |= {"dense": base, "floor": floor(size, n, limits)}
            if size.tiles == 1:
                row["torch"] = torch_time(o, i, n)
            for name, kernel in kernels.items():
                ready = [with_layout(kernel, w) for w in packed]
                shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
                if kernel.refuse(shape, ready[0], (9, 0)) is not None:
                    continue
                run = lambda x, w, k=kernel: k.run(x, w, dtype)  # noqa: E731
                row[name] = per_product(run, x, ready)
                print(
                    f"{row['size']:24} n={n:5} {name:9} {row[name] * 1e6:9.1f} us  "
                    f"{base / row[name]:5.2f}x dense  "
                    f"{row['floor'] / row[name]:5.1%} of the floor"
                )
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], limits: dict[str, float], note: str) -> None:
    """Speed over the dense product against tokens: limits, and what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True, sharey=True)
    for axis, size in zip(axes.flat, TIMED, strict=True):
        name = f"{size.name} {size.tiles * size.rows}x{size.inputs}"
        bound = [
            dense_floor(size, n, limits) / floor(size, n, limits) for n in TOKENS_TIMED
        ]
        axis.plot(TOKENS_TIMED, bound, "k--", lw=1, label="limit (floor / floor)")
        mine = [row for row in rows if row["size"] == name]
        for kernel in (*dispatch.known(), "torch"):
            points = [(r["n"], r["dense"] / r[kernel]) for r in mine if r.get(kernel)]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, label=kernel)
        axis.axhline(1, color="0.7", lw=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xscale("log", base=2)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("tokens")
    figure.supylabel("times faster than dense")
    figure.suptitle(note, fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "gpu.png", dpi=120)


NUMERICS, TIMES = "GPU kernels, numerics", "GPU kernels, times"
STUDY = study.Study(
    "gpu",
    "Packed products, GPU",
    {},
    {
        NUMERICS: "Largest error in units of the tolerance; the anchor is the limit.",
        TIMES: "Microseconds of one product; the anchor is the dense product (cuBLAS), "
        "a ratio below 1 is faster.",
    },
)


def results(report: dict[str, Any]) -> Iterator[study.Row]:
    """The rows of bench/results/gpu.json."""
    where = report["device"] + (", interpreted" if report["interpreted"] else "")
    cases: dict[str, dict[str, float]] = {}
    for case in report["numerics"]:
        cases.setdefault(case["kernel"], {})[case["size"]] = case["worst"]
    for kernel, each in cases.items():
        what = f"{kernel} on {where}, {len(each)} cases"
        data, command = {"cases": each}, "make bench-gpu"
        yield study.Row(
            NUMERICS, what, max(each.values()), 1.0, None, {}, data, command
        )
    if not isinstance(report["times"], list):
        return
    for row in report["times"]:
        for kernel in row.keys() - {"size", "n", "dense", "floor"}:
            if row[kernel] is None:
                continue
            more = {
                "times faster than dense": row["dense"] / row[kernel],
                "share of the roofline": row["floor"] / row[kernel],
            }
            what = f"{row['size']}, {row['n']} tokens, {kernel} on {where}"
            micro, dense = row[kernel] * 1e6, row["dense"] * 1e6
            yield study.Row(TIMES, what, micro, dense, None, more, {}, "make bench-gpu")


def main() -> int:
    """Numerics, then times where there is a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--numerics", action="store_true", help="no times")
    parser.add_argument("--only", help="one backend, such as wgmma_sp")
    options = parser.parse_args()
    chip = dispatch.capability()
    interpret = chip is None
    kernels = dict(dispatch.PLAIN)
    if tuple(jax.__version_info__) < support.SINCE:
        print(f"the GPU kernels are left out: this is jax {jax.__version__}")
    else:
        kernels |= serving(chip or (9, 0))
    if options.only:
        kernels = {k: m for k, m in kernels.items() if k == options.only}
    checked = numerics(kernels, interpret)
    wrong = [row for row in checked if row["worst"] > 1]
    where = "in the interpreter, on the CPU" if interpret else f"on {chip}"
    print(f"numerics: {len(checked)} cases {where}, {len(wrong)} wrong")
    report: dict[str, Any] = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "interpreted": interpret,
        "numerics": checked,
        "times": "not measured",
    }
    limits, note = H200, "Not measured: limits only, from the rates of an H200"
    if not interpret and not options.numerics and not wrong and kernels:
        limits = chip_limits()
        report |= {"limits": limits, "times": timings(kernels, limits)}
        note = f"{report['device']}, jax {jax.__version__}, bfloat16"
    rows = report["times"] if isinstance(report["times"], list) else []
    if not rows:
        print("times: not measured")
    for row in results(report):
        study.merge(RESULTS / "gpu.json", STUDY, row.document())
    draw(rows, limits, note)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
