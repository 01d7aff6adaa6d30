"""What the processes of `bench.gpu` do: python -m bench.gpu_parts NAME SHARD DIR."""

import contextlib
import dataclasses
import faulthandler
import fcntl
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from bench import gpu, gpu_cases
from bench.gpu_cases import Case, watch
from flexhinm_jax.gpu import cost, selfcheck, support, wgmma_sp
from flexhinm_jax.gpu.tilings import MOST_SPLIT, Source, Tiling
from flexhinm_jax.kernels import dense, dispatch
from flexhinm_jax.ops.words import to_words
from flexhinm_jax.types import PackedWeight

HAS_GPU = dispatch.capability() is not None
HAS_MOSAIC = tuple(jax.__version_info__) >= support.SINCE
COPIES = 4 if HAS_GPU else 1
"""Weights in turn: together larger than the L2 cache."""


def answers() -> bool:
    """Whether programs still run: an illegal address ends all later ones."""
    try:
        jax.block_until_ready(jnp.zeros(8, jnp.float32) + jnp.float32(1))
    except Exception:
        return False
    return True


def where() -> dict[str, Any]:
    """What a row depends on."""
    kind = jax.devices()[0].device_kind
    return {"device": kind, "jax": jax.__version__, "interpreted": not HAS_GPU}


# Setup


def setup(shard: int, shards: int, out: Path) -> Iterator[Case]:
    """Versions of what is here; bandwidth and dense rate where there is a GPU."""
    yield Case(gpu.PARTS, "jax", lambda: {"data": tools()})
    yield Case(gpu.PARTS, "bytes per second", bandwidth)
    yield Case(gpu.PARTS, "operations per second", dense_rate)


def tools() -> dict[str, Any]:
    """What NVIDIA's programs say of themselves."""
    root, said = os.environ.get("CUDA_ROOT"), {}
    places = os.pathsep.join(filter(None, [root and f"{root}/bin", os.environ["PATH"]]))
    for name, flag in {
        "nvidia-smi": "-L",
        "ptxas": "--version",
        "nvdisasm": "--version",
    }.items():
        if path := shutil.which(name, path=places):
            done = subprocess.run([path, flag], capture_output=True, text=True)
            said[path] = done.stdout.strip().splitlines()[-1:]
    return {"tools": said, "CUDA_ROOT": root}


def bandwidth() -> dict[str, Any]:
    """Bytes per second of memory."""
    big = jnp.ones((1024 if HAS_GPU else 4) << 19, jnp.bfloat16)
    taken = least(jax.jit(lambda x: x + jnp.bfloat16(1)), big)
    return {"value": 2 * big.nbytes / taken, "anchor": cost.MEMORY}


def dense_rate() -> dict[str, Any]:
    """Operations per second of a dense product."""
    side = 8192 if HAS_GPU else 256
    taken = least(jax.jit(lambda x: x @ x), jnp.ones((side, side), jnp.bfloat16))
    return {"value": 2 * side**3 / taken, "anchor": cost.DENSE_RATE}


def least(function: Callable[..., Any], *arguments: Any) -> float:
    """Least seconds of a call of a compiled function, of 10."""
    jax.block_until_ready(function(*arguments))
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - start)
    return min(taken)


# Numerics


class Form(NamedTuple):
    """One case: a way to cut a product, and what it runs on."""

    source: Source
    cut: Tiling
    dtype: str

    @property
    def name(self) -> str:
        """For rows and folders."""
        c, how = self.cut, self.source.name.lower()
        parts = [how, f"{64 * c.groups}x{c.tokens}", f"splits{c.splits}", f"d{c.depth}"]
        parts += [f"shared{c.sharing}"] if c.sharing > 1 else []
        parts += ["half"] if c.step == 32 else []
        return "-".join([*parts, f"flight{c.in_flight}", self.dtype])


def forms() -> list[Form]:
    """What `numerics` runs: every form on a GPU, three tiny ones interpreted."""
    if HAS_GPU:
        return every_form()
    return [
        Form(Source.PLAIN, Tiling(tokens=8), "bfloat16"),
        Form(Source.LISTED, Tiling(1, 16), "float16"),
        Form(Source.HELD, Tiling(tokens=8, held=True), "bfloat16"),
    ]


def every_form() -> list[Form]:
    """Every form of the kernel, each with nothing and with one product in flight."""
    plain, listed, stream = Source.PLAIN, Source.LISTED, Source.STREAM
    pairs = [(groups, t, 64) for t in (8, 16, 32, 64, 128) for groups in (1, 2)]
    pairs += [(1, 128, 32), (2, 256, 32)]
    made = []
    for number, (groups, tokens, step) in enumerate(pairs):
        sources = [stream] + [listed] * (tokens > 8)
        sources += [plain] * (tokens <= 32)
        sources += [Source.HELD] * (tokens <= 16)
        for source in sources:
            threads = source in (plain, Source.HELD)
            several = tokens <= MOST_SPLIT and (number + threads) % 2
            cut = Tiling(groups, tokens, 3 if several else 1, step=step)
            made.append((source, dataclasses.replace(cut, held=source is Source.HELD)))
    for source, tokens, splits, sharing, step in (
        (stream, 64, 2, 2, 64),
        (stream, 64, 1, 4, 64),
        (stream, 128, 1, 2, 64),
        (stream, 128, 2, 4, 64),
        (stream, 256, 1, 2, 32),
        (stream, 256, 1, 4, 32),
        (listed, 64, 1, 2, 64),
        (listed, 128, 2, 2, 64),
        (listed, 256, 1, 2, 32),
    ):
        made.append((source, Tiling(2, tokens, splits, sharing=sharing, step=step)))
    every, half = [], ("bfloat16", "float16")
    for number, (source, cut) in enumerate(made):
        # Of a slot of which five fit beside x, if x is held.
        small = cut.slot_bytes < (20_000 if source is Source.HELD else 40_000)
        for flight, depth in ((0, 5 if small else 4), (1, 4)):
            each = dataclasses.replace(cut, depth=depth, in_flight=flight)
            every.append(Form(source, each, half[number % 2]))
    return every


def case_of(form: Form, steps: int, tokens: int) -> selfcheck.Case:
    """The product that shows a form: ragged rows, columns and tokens.

    Args:
      form: to show.
      steps: of 64 stored columns, of a tile.
      tokens: more or fewer than a block has; x is held for those of one block.
    """
    tiles = 3 if form.source in (Source.LISTED, Source.HELD) else 1
    plain = form.source is Source.PLAIN
    along_rows = form.cut.sharing if form.source is Source.STREAM else 1
    rows = 64 * form.cut.groups * along_rows
    rows -= 8 if form.cut.groups == 1 else 0
    sizes = (0, 32 * steps - 2) if plain else (8, 32 * steps - 7)
    tokens = form.cut.tokens + (-3 if form.source is Source.HELD else tokens)
    return selfcheck.Case(tiles, rows, *sizes, tokens, form.dtype, form.cut, plain)


ON_GPU = (41, 3)
"""Steps and more tokens of a form: whole rings, and two blocks of tokens."""


def numerics(shard: int, shards: int, out: Path) -> Iterator[Case]:
    """Exact products in every form, each twice; the last shard runs the self-check."""
    if not HAS_MOSAIC:
        why = f"the kernel needs jax {support.SINCE}, this is {jax.__version__}"
        what = f"none, shard {shard}"
        yield Case(gpu.NUMERICS, what, lambda: {"data": {"why": why}})
        return
    others = max(1, shards - 1)
    if shard == shards - 1 and HAS_GPU:
        yield Case(gpu.NUMERICS, f"self-check of {wgmma_sp.NAME}", self_check)
    if shard < others:
        for form in forms()[shard::others]:
            measure = functools.partial(one_form, form, out)
            data = {"tried": form.cut.in_flight}
            yield Case(gpu.NUMERICS, form.name, measure, data)


def self_check() -> dict[str, Any]:
    """What "auto" asks for, in a process that has a limit of its own."""
    faulthandler.cancel_dump_traceback_later()
    began = time.perf_counter()
    why = selfcheck.failure(wgmma_sp.__name__)
    data = {"why": why, "seconds": time.perf_counter() - began}
    return {"value": int(why is not None), "anchor": 0.0, "data": data}


def one_form(
    form: Form, out: Path, run: Callable[..., Any] = wgmma_sp.matmul
) -> dict[str, Any]:
    """One case; its folder stays unless it came out right."""
    case = case_of(form, *(ON_GPU if HAS_GPU else (3, -3)))
    data: dict[str, Any] = {"seed": sum(form.name.encode())}
    rng = np.random.default_rng(data["seed"])
    packed, w = selfcheck.example(rng, *case[:4], dtype=case.dtype, plain=case.plain)
    x = rng.integers(-2, 3, (case.tokens, w.shape[1])).astype(np.float32)
    want, folder = x @ w.T, out / "failed" / form.name
    with dumped(folder, data | {"case": str(case)}):
        product = exact_product(packed, case, run)
        got, again = product(x), product(x)
        wrong = int((got != want).sum())
        data["differs when repeated"] = int((got != again).sum())
        if wrong or data["differs when repeated"]:
            probe = identity_probe(product, w, case.tokens)
            save(folder, {"x": x, "w": w, "want": want, "got": got}, probe)
            lone = case._replace(cut=dataclasses.replace(form.cut, selectors=1))
            with contextlib.suppress(Exception):  # the row is about the form itself
                y = exact_product(packed, lone, run)(x)
                data["wrong with selector 0 alone"] = int((y != want).sum())
            wrong = max(wrong, 1)
        else:
            shutil.rmtree(folder)
    return {"value": wrong, "anchor": 0.0, "data": data}


def exact_product(
    packed: PackedWeight, case: selfcheck.Case, run: Callable[..., Any]
) -> Callable[[np.ndarray], np.ndarray]:
    """x [n, i] of integers -> f32[n, o], by the kernel; compiled once."""
    packed = laid_out(packed)
    call = lambda x, packed: run(x, packed, jnp.float32, cut=case.cut)  # noqa: E731
    if HAS_GPU:
        call = jax.jit(call)

    def product(x: np.ndarray) -> np.ndarray:
        poison(x.shape[0] * packed.shape[0])
        with quietly():
            return np.asarray(call(jnp.asarray(x, case.dtype), packed))

    return product


def laid_out(packed: PackedWeight) -> PackedWeight:
    """With the layout of the kernel."""
    kernel = wgmma_sp.KERNEL
    return dataclasses.replace(packed, layouts={kernel.name: kernel.layout(packed)})


def quietly() -> Any:
    """Where kernels run: on the GPU, or interpreted without a look for races."""
    if HAS_GPU:
        return contextlib.nullcontext()
    return support.interpreted(detect_races=False)


def poison(count: int) -> None:
    """Fills freed memory with NaN, so that a result never written shows."""
    jax.block_until_ready([jnp.full((count,), jnp.nan, jnp.float32) for _ in range(4)])


def identity_probe(
    product: Callable[[np.ndarray], np.ndarray], w: np.ndarray, tokens: int
) -> np.ndarray:
    """The matrix that the kernel believes in: its products with unit vectors."""
    inputs = w.shape[1]
    believed = np.zeros_like(w)
    for first in range(0, inputs, tokens):
        unit = np.zeros((tokens, inputs), np.float32)
        count = min(tokens, inputs - first)
        unit[np.arange(count), first + np.arange(count)] = 1
        believed[:, first : first + count] = product(unit)[:count].T
    return believed


@contextlib.contextmanager
def dumped(folder: Path, data: dict[str, Any]) -> Iterator[None]:
    """A folder of a case: what it is, and while open Mosaic's PTX and machine code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(data, indent=1))
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]
        for path in folder.glob("*.mlir-passes.log"):  # megabytes
            path.unlink()


def save(folder: Path, arrays: dict[str, Any], probe: np.ndarray) -> None:
    """What is needed to understand a wrong case elsewhere."""
    differs = np.packbits(probe != arrays["w"], axis=1)
    arrays |= {"believed": probe, "mismatch": differs}
    np.savez_compressed(folder / "arrays.npz", **arrays)


# Times


class Size(NamedTuple):
    """Sizes of a packed weight: tiles, rows of one, inputs, dense and 2:4 columns.

    With `plain` rows and columns are in their own order.
    """

    name: str
    tiles: int
    rows: int
    inputs: int
    dense: int
    kept: int
    plain: bool = False

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return self.tiles * self.rows

    def product(self, n: int) -> cost.Sizes:
        """With n tokens."""
        stored, kept = self.dense + self.kept // 2, self.dense + self.kept
        return cost.Sizes(n, self.outputs, self.inputs, self.tiles, stored, kept)


def two_of_four(o: int, i: int) -> Size:
    """Plain 2:4."""
    return Size(f"2:4 {o}x{i}", 1, o, i, 0, i, plain=True)


def hinm(o: int, i: int, v: int) -> Size:
    """2:4 in an order per tile."""
    return Size(f"HiNM 50 % v={v} {o}x{i}", o // v, v, i, 0, i)


def flexhinm(o: int, i: int, v: int) -> Size:
    """FlexHiNM at 75 %: an eighth of the columns dense, a quarter 2:4."""
    return Size(f"FlexHiNM 75 % v={v} {o}x{i}", o // v, v, i, i // 8, i // 4)


def timed_sizes() -> list[tuple[Size, tuple[int, ...]]]:
    """Weights, and tokens of each."""
    if HAS_GPU:
        return every_size()
    sizes = [two_of_four(64, 128), hinm(64, 128, 32), flexhinm(64, 128, 32)]
    return [(size, (1, 8)) for size in sizes]


def every_size() -> list[tuple[Size, tuple[int, ...]]]:
    """What is timed on a GPU."""
    side, tokens = 8192, (1, 16, 64, 1024, 4096)
    sizes = [
        two_of_four(side, side),
        flexhinm(side, side, 64),
        hinm(side, side, 128),
        flexhinm(side, side, 128),
        two_of_four(4096, 4096),
        hinm(side, side, 64),
        hinm(side, side, 256),
    ]
    return [(size, tokens) for size in sizes]


IN_FLIGHT = {
    ("2:4 8192x8192", 16),
    ("2:4 8192x8192", 1024),
    ("FlexHiNM 75 % v=128 8192x8192", 1024),
}
"""Sizes and tokens that are timed with one product in flight, too."""


def cut_in_flight(n: int, packed: PackedWeight) -> Tiling:
    """The cut of a prepared weight with one product in flight."""
    cut = wgmma_sp.tiling(n, wgmma_sp.shape(packed))
    return dataclasses.replace(cut, in_flight=1)


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
    rows = jax.random.permutation(order, t * v).astype(jnp.int32)
    if size.plain:
        index, rows = (jnp.sort(a, axis=-1) for a in (index, rows))
    drawn = jax.random.normal(values, (t, v, size.dense + 2 * groups)) / i**0.5
    apart, kept = jnp.split(drawn.astype(dtype), [size.dense], axis=-1)
    return PackedWeight(
        dense_index=index[:, : size.dense] if size.dense else None,
        dense_values=apart if size.dense else None,
        nm_index=index[:, size.dense : size.dense + 4 * groups],
        nm_values=kept,
        nm_positions=to_words(nibbles, 4),
        out_order=rows,
        left=None,
        right=None,
        shape=(t * v, i),
        n=2,
        m=4,
    )


make_weight = jax.jit(random_weight, static_argnums=(1, 2))


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """While it is open no other process of the run measures or tunes."""
    with (out / "gpu.lock").open("w") as lock:
        faulthandler.cancel_dump_traceback_later()  # the others' time is not its own
        fcntl.flock(lock, fcntl.LOCK_EX)
        watch()
        yield


def per_product(
    product: Any,
    x: jax.Array,
    weights: list[Any],
    out: Path,
    *,
    tunes: bool = False,
    kernels: bool = True,
) -> dict[str, Any]:
    """Microseconds of one product, weights in turn: wall time, and kernels alone.

    Args:
      product: of x and one weight.
      x: activations.
      weights: in turn.
      out: folder of the run.
      tunes: compiling it measures on the GPU, as XLA does for dense products.
      kernels: time the kernels of the first weight, too; it is compiled once more.
    """
    call = jax.jit(product)

    @jax.jit
    def chain(x: jax.Array, weights: list[Any]) -> jax.Array:
        for weight in weights:
            y = call(x, weight)
            # Each product waits for the one before it, at the cost of a scalar.
            x = x.at[0, 0].add(jnp.zeros((), x.dtype) * y[0, 0].astype(x.dtype))
        return x

    with alone(out) if tunes else contextlib.nullcontext():
        chained = chain.lower(x, weights).compile()
        single = call.lower(x, weights[0]).compile() if kernels and HAS_GPU else None
    with alone(out):
        jax.block_until_ready(chained(x, weights))
        taken = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(chained(x, weights))
            taken.append((time.perf_counter() - start) / len(weights))
        return {
            "wall": 1e6 * statistics.median(taken),
            "kernels": single and kernel_time(single, x, weights[0]),
        }


def kernel_time(call: Any, x: jax.Array, weight: Any) -> float | None:
    """Microseconds of the kernels of one product by CUPTI, or None without it."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(call, iterations=5)(x, weight)
        if isinstance(milliseconds, (list, tuple)):
            milliseconds = statistics.median(milliseconds)
        return 1e3 * milliseconds
    except Exception:
        return None


def programs(size: Size, n: int) -> dict[str, Any]:
    """Name -> (prepares one weight, runs a product).

    What writes the matrix out takes as long for any number of tokens, so one is enough.
    """
    half = jnp.bfloat16
    expanded = functools.partial(dense.multiply_expanded, dtype=half, transposed=False)
    made: dict[str, Any] = {}
    if HAS_MOSAIC:
        made[wgmma_sp.NAME] = (laid_out, by_kernel)
    if HAS_GPU and HAS_MOSAIC and (size.name, n) in IN_FLIGHT:
        made[f"{wgmma_sp.NAME}, in flight 1"] = (laid_out, run_in_flight)
    if n == 1024 or not HAS_GPU:
        made["expanded"] = (lambda w: w, expanded)
    return made


def by_kernel(x: jax.Array, packed: PackedWeight) -> jax.Array:
    """A product in bfloat16."""
    with quietly():
        return wgmma_sp.KERNEL.run(x, packed, jnp.bfloat16)


def run_in_flight(x: jax.Array, packed: PackedWeight) -> jax.Array:
    """A product whose kernel has one in flight."""
    cut = cut_in_flight(x.shape[0], packed)
    with quietly():
        return wgmma_sp.matmul(x, packed, jnp.bfloat16, cut)


def times(shard: int, shards: int, out: Path) -> Iterator[Case]:
    """Every size and number of tokens."""
    for size, tokens in timed_sizes()[shard::shards]:
        for n in tokens:
            for name in programs(size, n):
                what = f"{size.name}, {n} tokens, {name}"
                measure = functools.partial(one_time, size, n, name, out)
                yield Case(gpu.TIMES, what, measure)


def one_time(size: Size, n: int, name: str, out: Path) -> dict[str, Any]:
    """A packed product beside the dense one."""
    base, x = dense_time(size.outputs, size.inputs, n, out), activations(n, size.inputs)
    ready, product = programs(size, n)[name]
    weights = [ready(w) for w in packed_copies(size)]
    taken = per_product(product, x, weights, out, tunes=name == "expanded")
    seconds = cost.expanded(size.product(n))
    if name.startswith(wgmma_sp.NAME):
        seconds = wgmma_sp.seconds(n, weights[0])
    more = {
        "share of the limit": 1e6 * cost.floor(size.product(n)) / taken["wall"],
        "predicted": 1e6 * seconds,
        "dense, predicted": 1e6 * cost.dense(n, size.outputs, size.inputs),
    }
    if taken["kernels"]:
        more["kernels alone"] = taken["kernels"]
    figures = {"value": taken["wall"], "anchor": base["wall"]}
    return figures | {"more": more, "data": {"dense": base}}


def activations(n: int, inputs: int) -> jax.Array:
    """x [n, inputs]."""
    return jax.random.normal(jax.random.key(n), (n, inputs), jnp.bfloat16)


@functools.lru_cache(maxsize=1)
def packed_copies(size: Size) -> list[PackedWeight]:
    """Weights in turn."""
    keys = jax.random.split(jax.random.key(0), COPIES)
    return [make_weight(key, size, jnp.bfloat16) for key in keys]


@functools.lru_cache(maxsize=1)
def dense_time(o: int, i: int, n: int, out: Path) -> dict[str, Any]:
    """`per_product` of matrices [o, i] and n tokens."""
    keys = jax.random.split(jax.random.key(0), COPIES)
    matrices = [jax.random.normal(key, (o, i), jnp.bfloat16) for key in keys]
    product = lambda x, w: x @ w.T  # noqa: E731
    return per_product(product, activations(n, i), matrices, out, tunes=True)


# cuSPARSELt


def cusparselt(shard: int, shards: int, out: Path) -> Iterator[Case]:
    """2:4 by torch in CUDA graphs, beside its own dense product."""
    try:
        import torch

        missing = None if torch.cuda.is_available() else "torch sees no GPU"
    except ImportError as error:
        missing = str(error)
    if missing:
        yield Case(gpu.TIMES, "cuSPARSELt", lambda: {"data": {"why": missing}})
        return
    for o in (8192, 4096):
        for n in (16, 64, 1024, 4096):
            measure = functools.partial(one_by_torch, o, n)
            yield Case(gpu.TIMES, f"2:4 {o}x{o}, {n} tokens, cuSPARSELt", measure)


def one_by_torch(o: int, n: int) -> dict[str, Any]:
    """A product of [n, o] and [o, o], by functions that only cuSPARSELt has."""
    import torch

    half = {"device": "cuda", "dtype": torch.bfloat16}
    pattern = torch.tensor([1.0, 1, 0, 0], **half).tile(o // 4)
    plain = [torch.randn(o, o, **half) * pattern for _ in range(COPIES)]
    packed = [torch._cslt_compress(w) for w in plain]
    x = torch.randn(n, o, **half)
    data = {
        "cusparselt": str(torch.backends.cusparselt.version()),
        "torch": torch.__version__,
    }
    how: dict[str, int] = {}

    def sparse(w: Any) -> Any:
        return torch._cslt_sparse_mm(w, x.t(), transpose_result=True, **how)

    def dense(w: Any) -> Any:
        return torch.nn.functional.linear(x, w)

    try:
        how.update(searched(torch, packed[0], x.t()))
        sparse(packed[0])
    except Exception as error:  # then its default algorithm
        how.clear()
        data["search"] = f"{type(error).__name__}: {error}"[:500]
    data["algorithm"] = dict(how)
    data["largest difference"] = (
        (sparse(packed[0]) - dense(plain[0])).abs().max().item()
    )
    base = graph_time(torch, dense, plain)
    taken = graph_time(torch, sparse, packed)
    more = {
        "predicted": 1e6 * cost.tuned(n, o, o),
        "dense, predicted": 1e6 * cost.dense(n, o, o),
    }
    return {"value": taken, "anchor": base, "more": more, "data": data}


def searched(torch: Any, packed: Any, x: Any) -> dict[str, int]:
    """The fastest algorithm for a product, as the product takes it."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:  # torch < 2.7
        number = torch._cslt_sparse_mm_search(packed, x, transpose_result=True)
        return {"alg_id": number}
    number, split_k, mode, _ = search(packed, x, None, None, None, True)
    return {"alg_id": number, "split_k": split_k, "split_k_mode": mode}


def graph_time(torch: Any, product: Callable[[Any], Any], weights: list[Any]) -> float:
    """Median microseconds of a product, weights in turn, as a CUDA graph."""
    for weight in weights:
        product(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(weight)
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - start) / len(weights))
    return statistics.median(taken)


# A block


def block_shapes(d: int, kv: int, up: int) -> list[tuple[int, int]]:
    """Outputs and inputs of q, k, v, o, gate, up and down."""
    return [(d, d), (kv, d), (kv, d), (d, d), (up, d), (up, d), (d, up)]


BLOCK_SHAPES, BLOCK_TOKENS = block_shapes(4096, 1024, 14336), (1, 16, 1024)


def block_sizes(v: int) -> dict[str, Callable[[int, int], Size]]:
    """Patterns of a block -> the size of a weight [o, i]; tiles of v rows."""
    return {
        "2:4": two_of_four,
        "HiNM 50 %": functools.partial(hinm, v=v),
        "FlexHiNM 75 %": functools.partial(flexhinm, v=v),
    }


def block(shard: int, shards: int, out: Path) -> Iterator[Case]:
    """The products of a decoder block of 8B parameters, decode and prefill."""
    os.environ[dispatch.OPT_IN] = "1"
    for n in BLOCK_TOKENS if HAS_GPU else (4,):
        for name in list(block_sizes(TILE))[shard::shards]:
            measure = functools.partial(one_block, name, n, out)
            yield Case(gpu.BLOCK, f"{name}, {n} tokens", measure)


TILE = 128 if HAS_GPU else 16
"""Rows of a tile of a block."""


def timed_shapes() -> list[tuple[int, int]]:
    """Outputs and inputs of the weights of a block here."""
    return BLOCK_SHAPES if HAS_GPU else block_shapes(64, 64, 64)


def one_block(name: str, n: int, out: Path) -> dict[str, Any]:
    """The products of a block as `sparse_dot` runs them, beside dense ones."""
    verdict = checked()
    x, packed = activations(n, timed_shapes()[0][1]), packed_blocks(name)
    run = functools.partial(decoder_block, multiply=fh.sparse_dot)
    taken = per_product(run, x, packed, out, tunes=n > 16, kernels=False)["wall"]
    each = [cost.dense(n, *weight.shape) for weight in packed[0]]
    least = [
        min(d, wgmma_sp.seconds(n, w) if wgmma_sp.NAME in w.layouts else d)
        for d, w in zip(each, packed[0], strict=True)
    ]
    figures = {"value": taken, "anchor": dense_block_time(n, out)}
    more = {"predicted": 1e6 * sum(least), "dense, predicted": 1e6 * sum(each)}
    return figures | {"more": more, "data": {"self-check": verdict}}


def checked() -> str | None:
    """Why `sparse_dot` refuses the kernel, or None. No process checks it here."""
    if (device := selfcheck.first_gpu()) is None:
        return "no GPU"
    path = selfcheck.place(wgmma_sp.__name__, device)
    if not path.exists():
        selfcheck.keep(path, "the self-check of numerics did not end in this run")
    return selfcheck.failure(wgmma_sp.__name__)


@functools.lru_cache(maxsize=1)
def dense_block_time(n: int, out: Path) -> float:
    """Microseconds of the products of a dense block."""

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jax.random.normal(key, shape[::-1], jnp.bfloat16) / shape[1] ** 0.5

    shapes, keys = timed_shapes(), jax.random.split(jax.random.key(1), COPIES)
    matrices = [[draw(key, shape) for shape in shapes] for key in keys]
    run = functools.partial(decoder_block, multiply=jnp.matmul)
    x = activations(n, shapes[0][1])
    return per_product(run, x, matrices, out, tunes=True, kernels=False)["wall"]


@functools.lru_cache(maxsize=3)
def packed_blocks(name: str) -> list[list[PackedWeight]]:
    """Random weights in turn, with their matrix, and the layout of a kernel, if any."""
    keys = jax.random.split(jax.random.key(1), COPIES)
    held = jax.jit(functools.partial(fh.kernels.prepare, backend=dense.NAME))
    sized = block_sizes(TILE)[name]
    sizes = [sized(*shape) for shape in timed_shapes()]

    def weights(key: jax.Array) -> list[PackedWeight]:
        each = jax.random.split(key, len(sizes))
        made = [
            make_weight(k, s, jnp.bfloat16) for k, s in zip(each, sizes, strict=True)
        ]
        return [held(laid_out(w) if HAS_GPU and HAS_MOSAIC else w) for w in made]

    return [weights(key) for key in keys]


def decoder_block(x: jax.Array, weights: Any, multiply: Any) -> jax.Array:
    """The seven products of a block in their order, what lies between left out."""
    q, k, v, o, gate, up, down = weights
    mixed = multiply(x, q)
    mixed = mixed.at[:, 0].add(multiply(x, k)[:, 0] + multiply(x, v)[:, 0])
    h = x + multiply(mixed, o)
    return h + multiply(jax.nn.silu(multiply(h, gate)) * multiply(h, up), down)


# Solvers


def solvers(shard: int, shards: int, out: Path) -> Iterator[Case]:
    """Seconds of one matrix."""
    side = 4096 if HAS_GPU else 64
    tiled = fh.HiNM(min(64, side // 4), permute=fh.Gyro())
    for name, method, sparsity in (
        ("SparseGPT 2:4", fh.SparseGPT(fh.NM(2, 4)), None),
        ("TSENOR 2:4", fh.Magnitude(fh.Transposable(2, 4)), None),
        ("ALPS 2:4", fh.ALPS(fh.NM(2, 4)), None),
        ("Gyro, HiNM 75 %", fh.Magnitude(tiled), 0.75),
    ):
        measure = functools.partial(one_solve, method, sparsity, side)
        yield Case(gpu.SOLVERS, f"{name}, {side}x{side}", measure)


def one_solve(method: Any, sparsity: float | None, side: int) -> dict[str, Any]:
    """The second call of a solver."""
    key = jax.random.key(2)
    w = jax.random.normal(key, (side, side))
    x = jax.random.normal(jax.random.fold_in(key, 1), (2 * side, side))
    gram = x.T @ x
    stats = fh.Stats(
        sq_norm=jnp.diag(gram),
        mean=jnp.mean(x, axis=0, dtype=jnp.float32),
        count=jnp.float32(2 * side),
        gram=gram,
    )
    for _ in range(2):
        start = time.perf_counter()
        plan = method.solve(key, w, stats, sparsity=sparsity)
        jax.block_until_ready(jax.tree.leaves(plan))
        taken = time.perf_counter() - start
    return {"value": taken}


PARTS = {
    "setup": setup,
    "numerics": numerics,
    "times": times,
    "cusparselt": cusparselt,
    "block": block,
    "solvers": solvers,
}


def main() -> None:
    """The cases of a shard."""
    name, shard, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    os.environ.setdefault(selfcheck.FOLDER, str(out / "checks"))
    cases = PARTS[name](shard, gpu.PARTS_OF_RUN[name].shards, out)
    again = f"python3 -m bench.gpu --only {name}"
    gpu_cases.run(cases, shard, out, where(), answers, again)


if __name__ == "__main__":
    main()
