"""The GPU kernels in the Mosaic interpreter, which also looks for data races.

Interpreted are pipelines, barriers, copies, index arithmetic and splits. The inline PTX
is replaced by its meaning (`ptx`); `test_layouts.py` holds the metadata against
the text of the PTX ISA, `bench/gpu_compile.py` the assembled code. Only a GPU can show
that the instructions themselves are right: `bench/gpu.py`.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.gpu import (
    hopper,
    layouts,
    registry,
    selfcheck,
    support,
    wgmma_sp,
)
from flexhinm_jax.gpu.kernel import Cause
from flexhinm_jax.gpu.tilings import Source, Tiling
from flexhinm_jax.kernels.packing import unpack
from flexhinm_jax.ops.words import to_words
from flexhinm_jax.types import PackedWeight

WGMMA = wgmma_sp.KERNEL

mosaic = pytest.mark.skipif(
    tuple(jax.__version_info__) < support.SINCE,
    reason=f"the GPU kernels need jax {support.SINCE}, this is {jax.__version__}",
)


def weight(t, v, dense, groups, i, dtype=jnp.bfloat16, seed=0, plain=False):
    """A packed weight of random everything; with `plain` the first columns of x."""
    rng = np.random.default_rng(seed)
    pairs = np.array([a | b << 2 for a in range(4) for b in range(a + 1, 4)], np.uint32)
    nibbles = pairs[rng.integers(0, 6, (t, v, -(-groups // 8) * 8))]
    nibbles[..., groups:] = 0
    order = np.arange if plain else rng.permutation
    columns = np.stack([order(i)[: dense + 4 * groups] for _ in range(t)])
    value = lambda c: jnp.asarray(rng.standard_normal((t, v, c)), dtype)  # noqa: E731
    return PackedWeight(
        dense_index=jnp.asarray(columns[:, :dense], jnp.int32),
        dense_values=value(dense),
        nm_index=jnp.asarray(columns[:, dense:], jnp.int32),
        nm_values=value(2 * groups),
        nm_positions=to_words(jnp.asarray(nibbles), 4),
        out_order=jnp.asarray(rng.permutation(t * v), jnp.int32),
        left=None,
        right=None,
        shape=(t * v, i),
        n=2,
        m=4,
    )


def prepared(kernel, packed):
    return dataclasses.replace(packed, layouts={kernel.name: kernel.layout(packed)})


def inputs(n, i, dtype, seed=1):
    return jax.random.normal(jax.random.key(seed), (n, i)).astype(dtype)


def exact(x, packed):
    dense = np.asarray(unpack(packed).astype(jnp.float32), np.float64)
    return np.asarray(x.astype(jnp.float32), np.float64) @ dense.T


def assert_serves(kernel, packed, n, dtype=jnp.float32):
    packed = prepared(kernel, packed)
    x = inputs(n, packed.shape[1], packed.dtype)
    with support.interpreted(detect_races=True):
        y = kernel.run(x, packed, dtype)
    assert y.shape == (n, packed.shape[0]) and y.dtype == dtype
    want = exact(x, packed)
    # float32 sums of exact products; a 16-bit result is rounded once more.
    unit = {4: 2.0**-19, 2: 2.0**-8}[jnp.dtype(dtype).itemsize]
    np.testing.assert_allclose(
        np.asarray(y.astype(jnp.float32)), want, rtol=unit, atol=unit * 16
    )


@mosaic
def test_sparse_tensor_cores_serve_sizes_that_fill_no_tile():
    assert_serves(WGMMA, weight(1, 40, 0, 65, 260), n=3)


@mosaic
def test_fused_kernel_serves_dense_and_two_of_four_columns_of_ragged_sizes():
    """x is held in shared memory: its rows have whole chunks."""
    packed = weight(2, 20, dense=13, groups=29, i=152, dtype=jnp.float16)
    assert_serves(WGMMA, packed, n=5, dtype=jnp.float16)


@mosaic
def test_columns_in_their_own_order_need_no_index():
    packed = weight(1, 40, 0, 38, 152, plain=True)
    assert "index" not in prepared(WGMMA, packed).layouts["wgmma_sp"]
    assert_serves(WGMMA, packed, n=3)


@pytest.mark.parametrize(
    "change, settled",
    [
        (lambda i: i, True),
        (lambda i: i.at[0, [3, 9]].set(i[0, jnp.array([9, 3])]), False),
        (lambda i: i.at[0, -1].set(-1), False),
    ],
)
def test_an_index_leaves_where_all_matrices_of_a_stack_have_their_own_order(
    change, settled
):
    """The second matrix of two decides."""
    packed = weight(1, 8, 0, 32, 128, plain=True)
    other = dataclasses.replace(packed, nm_index=change(packed.nm_index))
    stack = jax.tree.map(lambda *a: jnp.stack(a), packed, other)
    ready = jax.jit(jax.vmap(WGMMA.prepare))(stack)
    assert ("index" not in WGMMA.settle(ready, stack)) == settled


SLOW = [
    ((1, 200, 3, 300, 1300), 2, jnp.bfloat16),  # column splits
    (
        (1, 128, 0, 170, 680),
        130,
        jnp.float32,
    ),  # two groups along the rows
    ((1, 64, 0, 170, 680), 70, jnp.float32),  # half steps
    ((2, 64, 70, 130, 700), 66, jnp.float32),  # the same, gathered
    ((1, 128, 0, 170, 680), 260, jnp.float32),  # 256 tokens
    ((3, 64, 70, 130, 700), 66, jnp.bfloat16),
    ((2, 96, 0, 40, 200), 17, jnp.float16),  # rows padded to blocks
    ((2, 8, 5, 0, 40), 1, jnp.float32),  # dense columns alone
]


@mosaic
@pytest.mark.slow
@pytest.mark.parametrize("sizes, n, dtype", SLOW)
def test_every_cut_serves(sizes, n, dtype):
    half = jnp.float16 if dtype == jnp.float16 else jnp.bfloat16
    assert_serves(WGMMA, weight(*sizes, dtype=half), n, dtype)


@mosaic
@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize(
    "source, step",
    [*((source, 64) for source in Source), (Source.STREAM, 32)],
)
def test_a_full_pipeline_has_no_race(groups, source, step, in_flight):
    """More steps than slots, so every slot is filled again while others are read."""
    plain = source is Source.PLAIN
    packed = weight(1, 64 * groups, 0, 224, 896, plain=plain)
    ready = jax.jit(layouts.tiles)(packed)
    tokens = 16 if step == 64 else 64
    cut = Tiling(groups, tokens, in_flight=in_flight, step=step)
    x = inputs(tokens, 896, packed.dtype)
    stream, index = x, ready["index"]
    if source is Source.STREAM:
        stream = layouts.gather(x, index.reshape(-1))
    with support.interpreted(detect_races=True):
        y = hopper.product(
            ready["values"],
            ready["meta"],
            stream,
            ready["order"],
            packed.shape[0],
            jnp.float32,
            cut,
            source,
            None if source in (Source.STREAM, Source.PLAIN) else index,
        )
    np.testing.assert_allclose(y, exact(x, packed), rtol=1e-5, atol=1e-4)


@mosaic
@pytest.mark.slow
def test_a_long_product_of_the_self_check_is_right_when_interpreted():
    """The others gather in the kernel, which takes minutes in the interpreter."""
    case = wgmma_sp.CASES[2]
    with support.interpreted(detect_races=False):
        rng = np.random.default_rng(0)
        assert selfcheck.right("wgmma_sp", WGMMA.layout, WGMMA.run, rng, case)


@pytest.mark.parametrize(
    "fault",
    [
        *("rings", "splits", "half", "ragged", "plain", "held", "wide"),
        *("x shared", "weights shared", "half steps"),
    ],
)
def test_some_product_of_the_self_check_shows(fault):
    steps = lambda c: (c.dense / 2 + c.groups) / 32  # noqa: E731
    cut = lambda c: c.cut or Tiling()  # noqa: E731
    shows = {
        "rings": lambda c: steps(c) / cut(c).splits >= 10 * cut(c).depth,
        "splits": lambda c: cut(c).splits == 3,
        "half": lambda c: c.dtype == "float16",
        "half steps": lambda c: cut(c).step == 32 and cut(c).groups == 1,
        "wide": lambda c: cut(c).tokens == 256 and c.tokens % 256 > 8,
        "weights shared": lambda c: cut(c).sharing == 2 and c.tiles > 1,
        "plain": lambda c: c.plain and c.tokens % 8,
        "x shared": lambda c: cut(c).sharing == 2 and cut(c).splits == 2 and c.plain,
        "held": lambda c: cut(c).held and cut(c).splits > 2 and c.tiles > 1,
        "ragged": lambda c: c.rows % 64 and c.tokens % 8,
    }[fault]
    assert any(map(shows, wgmma_sp.CASES))


@mosaic
def test_sparse_dot_runs_the_kernel_that_is_asked_for():
    packed = prepared(WGMMA, weight(2, 8, 6, 4, 32))
    x = inputs(4, 32, jnp.bfloat16).reshape(2, 2, 32)
    with kernels.assume(9, 0), support.interpreted():
        y = fh.sparse_dot(x, packed, backend="wgmma_sp")
    want = exact(x.reshape(4, 32), packed).reshape(2, 2, 16)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-7, atol=2**-4)


@mosaic
def test_a_nan_reaches_the_outputs_that_store_its_column():
    packed = prepared(WGMMA, weight(2, 8, 4, 4, 32))
    x = inputs(2, 32, jnp.bfloat16).at[1, packed.dense_index[0, 0]].set(jnp.nan)
    with support.interpreted():
        y = wgmma_sp.matmul(x, packed, jnp.float32)
    assert not jnp.isnan(y[0]).any()
    assert jnp.isnan(y[1, packed.out_order[:8]]).all()


@mosaic
@pytest.mark.parametrize("name", registry.KERNELS)
def test_kernels_lower_for_cuda_without_a_gpu(name):
    kernel = registry.KERNELS[name]
    packed = prepared(kernel, weight(1, 16, 0, 16, 64))
    x = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
    traced = jax.jit(lambda x: kernel.run(x, packed, jnp.bfloat16)).trace(x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=24), "tokens=24"),
        (dict(groups=3), "groups=3"),
        (dict(step=16), "step=16"),
        (dict(depth=3), "depth=3"),
        (dict(in_flight=2), "in_flight=2"),
        (dict(splits=9), "splits=9"),
        (dict(sharing=3), "sharing=3"),
        (dict(sharing=4, splits=4), "splits=4 x sharing=4"),
        (dict(sharing=4, tokens=16), "8 for each"),
        (dict(step=32, tokens=16), "64 for step=32"),
        (dict(step=32, tokens=256, splits=2), "splits=2 must be 1 for tokens=256"),
    ],
)
def test_a_wrong_cut_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**change)


def refusal(kernel, packed, dtype=jnp.bfloat16) -> Any:
    return kernel.refuse(jax.ShapeDtypeStruct((4, 64), dtype), packed, (9, 0))


@mosaic
def test_kernels_say_why_they_cannot_serve():
    packed, kernel = weight(2, 8, 4, 4, 64), WGMMA
    missing = refusal(kernel, packed)
    assert missing.cause is Cause.LAYOUT
    assert "prepare(packed, 'wgmma_sp')" in missing.why
    packed = prepared(kernel, packed)
    assert refusal(kernel, packed) is None
    wide = refusal(kernel, packed, jnp.float32)
    assert wide.cause is Cause.PRODUCT and "float32" in wide.why
    assert "1:4" in refusal(kernel, dataclasses.replace(packed, n=1)).why


def test_an_older_jax_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    old = refusal(WGMMA, weight(2, 8, 4, 4, 64))
    assert old.cause is Cause.MACHINE and "0.11.2" in old.why


PRIVATE = ["jax.experimental.pallas.mosaic_gpu", "jax.experimental.mosaic.gpu"]


def test_importing_every_kernel_module_leaves_mosaic_alone():
    """Nor does the package need a dialect of kernels: another jax may lack it."""
    modules = (p.stem for p in Path(registry.__file__).parent.glob("*.py"))
    code = "; ".join(
        ["import sys", "import flexhinm_jax"]
        + ["assert 'jaxlib.mlir.dialects.llvm' not in sys.modules"]
        + [f"import flexhinm_jax.gpu.{name}" for name in modules]
        + [f"print(sorted(set(sys.modules) & set({PRIVATE})))"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
