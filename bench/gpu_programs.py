"""The programs that `bench.gpu_compile` compiles: what runs on a GPU, as shapes.

`cases` are for every run of continuous integration; `every_case` are those that
`bench.gpu` and the self-check of the kernel run besides.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import gpu_parts
from flexhinm_jax import kernels
from flexhinm_jax.gpu import selfcheck, wgmma_sp
from flexhinm_jax.gpu.tilings import Tiling
from flexhinm_jax.kernels import dense, dispatch
from flexhinm_jax.types import PackedWeight

HOPPER = (9, 0)
"""Compute capability that a block chooses its programs for."""


class Case(NamedTuple):
    """One program that is compiled.

    Attributes:
      group: what it belongs to, a row of the results.
      size: what it multiplies.
      function: of the arguments.
      arguments: shapes.
      cuts: of the sparse kernels in it, none if it has none.
    """

    group: str
    size: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cuts: tuple[Tiling, ...] = ()


def cases() -> list[Case]:
    """What continuous integration compiles: every way to read x, cut and gather."""
    bf16, f16 = jnp.bfloat16, jnp.float16
    flat, half, mixed = gpu_parts.two_of_four, gpu_parts.hinm, gpu_parts.flexhinm

    def sparse(
        name: str, size: gpu_parts.Size, n: int, dtype: Any, plain: bool = False
    ) -> Case:
        o, i, kind = size.outputs, size.inputs, {bf16: "bf16", f16: "f16"}[dtype]
        what = f"{name} {o}x{i} n={n} {kind}"
        return product(wgmma_sp.NAME, what, abstract(size, dtype, plain), n, dtype)

    return [
        sparse("2:4", flat(4096, 4096), 1, bf16, plain=True),
        sparse("2:4", flat(8192, 8192), 64, bf16, plain=True),
        sparse("2:4", flat(8192, 8192), 1024, f16),
        sparse("2:4 in an order", flat(8192, 8192), 16, bf16),
        sparse("2:4", flat(1000, 388), 65, bf16),
        sparse("FlexHiNM v=64", mixed(8192, 8192, 64), 1, bf16),
        sparse("FlexHiNM v=64", mixed(1536, 384, 64), 65, f16),
        sparse("2:4", flat(8192, 8192), 256, bf16, plain=True),
        sparse("HiNM v=128", half(8192, 8192, 128), 256, bf16),
        sparse("FlexHiNM v=64", mixed(8192, 8192, 64), 128, bf16),
        sparse("2:4", flat(8192, 8192), 128, bf16),
        sparse("FlexHiNM v=128", mixed(8192, 8192, 128), 256, bf16),
        sparse("FlexHiNM v=128", mixed(8192, 8192, 128), 1024, bf16),
        sparse("HiNM v=128", half(8192, 8192, 128), 8, f16),
        sparse("FlexHiNM v=32", mixed(4096, 4096, 32), 16, f16),
        sparse("HiNM v=64", half(14336, 4096, 64), 32, bf16),
        sparse("HiNM v=256", half(8192, 8192, 256), 64, bf16),
    ]


def every_case() -> list[Case]:
    """What `bench.gpu` runs on a GPU beside that, and the self-check."""
    made = []
    for form in gpu_parts.every_form():
        case = gpu_parts.case_of(form, *gpu_parts.ON_GPU)
        made.append(exact(f"{wgmma_sp.NAME}, numerics", form.name, case))
        if not form.cut.in_flight:  # what a wrong one is tried with
            lone = case._replace(cut=dataclasses.replace(form.cut, selectors=1))
            made.append(exact(f"{wgmma_sp.NAME}, selector 0", form.name, lone))
    for number, case in enumerate(wgmma_sp.CASES):
        made.append(exact(f"{wgmma_sp.NAME}, self-check", f"case {number}", case))
    times, half = f"{wgmma_sp.NAME}, times", jnp.bfloat16
    for size, tokens in gpu_parts.every_size():
        packed = abstract(size, half)
        for n in tokens:
            name = f"{size.name} n={n}"
            made.append(product(times, name, packed, n, half))
            if (size.name, n) in gpu_parts.IN_FLIGHT:
                cut = gpu_parts.cut_in_flight(n, packed)
                made.append(product(times, f"{name} in flight", packed, n, half, cut))
        x = struct(1024, size.inputs)
        run = functools.partial(dense.multiply_expanded, dtype=half, transposed=False)
        bare = kernels.strip(packed)
        made.append(Case("written out", f"{size.name} n=1024", run, (x, bare)))
    return made + blocks()


def exact(group: str, name: str, case: selfcheck.Case) -> Case:
    """A product of integers, as it is checked on a GPU."""
    rng = np.random.default_rng(0)
    packed, _ = selfcheck.example(rng, *case[:4], dtype=case.dtype, plain=case.plain)
    packed, dtype = laid_out(packed, case.plain), jnp.dtype(case.dtype)
    return product(group, name, packed, case.tokens, dtype, case.cut, jnp.float32)


def blocks() -> list[Case]:
    """Decoder blocks, every product by the program that is predicted to be fastest."""
    os.environ[dispatch.OPT_IN] = "1"
    run = functools.partial(gpu_parts.decoder_block, multiply=kernels.sparse_dot)
    made = []
    for name, sized in gpu_parts.block_sizes(128).items():
        packed = [
            held(abstract(sized(*shape), jnp.bfloat16))
            for shape in gpu_parts.BLOCK_SHAPES
        ]
        for n in gpu_parts.BLOCK_TOKENS:
            x = struct(n, gpu_parts.BLOCK_SHAPES[0][1])
            with kernels.assume(*HOPPER):
                cuts = {
                    wgmma_sp.tiling(n, wgmma_sp.shape(w))
                    for w in packed
                    if dispatch.choose(
                        "auto", struct(n, w.shape[1]), w, transposed=False
                    ).cuda
                }
            made.append(Case("block", f"{name} n={n}", run, (x, packed), tuple(cuts)))
    return made


def product(
    group: str,
    name: str,
    packed: PackedWeight,
    n: int,
    dtype: Any,
    cut: Tiling | None = None,
    result: Any = None,
) -> Case:
    """A product of n tokens with a laid out weight, cut as predicted or as told."""

    def run(x: jax.Array, packed: PackedWeight) -> jax.Array:
        return wgmma_sp.matmul(x, packed, result or dtype, cut)

    cuts = (cut or wgmma_sp.tiling(n, wgmma_sp.shape(packed)),)
    x = struct(n, packed.shape[1], dtype=dtype)
    return Case(group, name, run, (x, packed), cuts)


@functools.cache
def abstract(size: gpu_parts.Size, dtype: Any, plain: bool | None = None) -> Any:
    """Shapes of a packed weight as it is laid out for the kernel.

    Args:
      size: of the weight.
      dtype: of its values.
      plain: its columns are in their own order; None as the size says.
    """
    make = functools.partial(gpu_parts.random_weight, size=size, dtype=dtype)
    packed = jax.eval_shape(make, jax.random.key(0))
    return laid_out(packed, size.plain if plain is None else plain)


def laid_out(packed: PackedWeight, plain: bool) -> PackedWeight:
    """With the shapes of the layout; without the index where columns are in order."""
    ready = jax.eval_shape(wgmma_sp.prepare, packed)
    ready = {k: a for k, a in ready.items() if not (plain and k == "index")}
    return dataclasses.replace(packed, layouts={wgmma_sp.NAME: ready})


def held(packed: PackedWeight) -> PackedWeight:
    """With the matrix as well."""
    matrix = {dense.NAME: jax.eval_shape(dense.prepare, kernels.strip(packed))}
    return dataclasses.replace(packed, layouts=packed.layouts | matrix)


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """A shape to trace with."""
    return jax.ShapeDtypeStruct(shape, dtype)
