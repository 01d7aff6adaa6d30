"""The programs that run on a GPU without a kernel: no loop over row tiles."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.gpu import registry, support
from flexhinm_jax.kernels import dense, dispatch
from flexhinm_jax.types import BlockDiagonal
from tests.kernels.test_dispatch import ALL, FAKE, normal, pack


@pytest.fixture(scope="module")
def weights():
    return {name: pack(pattern) for name, pattern in ALL.items()}


def with_values(packed, values):
    return dataclasses.replace(packed, dense_values=values[0], nm_values=values[1])


def product(x, packed):
    return fh.sparse_dot(x, packed)


def transposed(x, packed):
    return fh.sparse_dot(x, packed, transposed=True)


def gradients(x, packed):
    """With respect to x and to the values, of a function that is not linear."""

    def loss(x, values):
        return jnp.sum(jnp.sin(fh.sparse_dot(x, with_values(packed, values))))

    return jax.grad(loss, (0, 1))(x, (packed.dense_values, packed.nm_values))


expanded = jax.jit(dense.multiply_expanded, static_argnames=("dtype", "transposed"))


def lowered(program, x, packed, platform="cuda"):
    traced = jax.jit(program).trace(x, packed)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, 300])
def test_no_product_on_a_gpu_loops_over_row_tiles(weights, name, rows):
    packed, w = weights[name]
    assert "while" not in lowered(product, normal(rows, w.shape[1]), packed)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("program", [transposed, gradients])
def test_no_other_program_on_a_gpu_loops_over_row_tiles(weights, name, program):
    packed, w = weights[name]
    side = 0 if program is transposed else 1
    assert "while" not in lowered(program, normal(40, w.shape[side]), packed)


@pytest.mark.parametrize("name", ["int8", "factors"])
@pytest.mark.parametrize("program", [product, transposed])
def test_no_scale_and_no_factor_brings_the_loops_back(weights, name, program):
    packed, w = weights["flexhinm"]
    if name == "int8":
        packed = kernels.quantise(packed, "int8")
    else:
        blocks = lambda side: BlockDiagonal(normal(side // 8, 8, 8))  # noqa: E731
        packed = dataclasses.replace(
            packed, left=blocks(w.shape[0]), right=blocks(w.shape[1])
        )
    side = 0 if program is transposed else 1
    assert "while" not in lowered(program, normal(40, w.shape[side]), packed)


@pytest.mark.parametrize("program", [product, transposed])
def test_a_stack_of_weights_loops_over_its_matrices_and_over_nothing_else(
    weights, program
):
    packed, w = weights["flexhinm"]
    assert packed.tiles == 2
    stack = jax.tree.map(lambda a: jnp.stack([a] * 5), packed)
    x = normal(5, 40, w.shape[0 if program is transposed else 1])
    text = lowered(jax.vmap(program), x, stack)
    turns = re.findall(r"cond \{\s+%\w+ = stablehlo.constant dense<(\d+)>", text)
    assert turns == ["5"] and text.count("while") == 1


CHIPS = {"A100": (8, 0), "L40": (8, 9), "H200": (9, 0), "B200": (10, 0)}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_auto_has_two_choices_on_a_gpu_whatever_is_packed(
    weights, monkeypatch, chip, rows, dtype
):
    """The program without a loop, or the kernel where it serves: on Hopper."""
    monkeypatch.setenv(dispatch.OPT_IN, "1")
    served = {
        name: dataclasses.replace(kernel, since=(0,))
        for name, kernel in registry.KERNELS.items()
    }
    monkeypatch.setattr(registry, "KERNELS", served)
    x = jax.ShapeDtypeStruct((rows, 32), dtype)
    for packed, _ in weights.values():
        for layout in ({}, {"xla": {}}, {"dense": {}}):
            held = dataclasses.replace(packed, layouts=layout)
            with kernels.assume(*CHIPS[chip]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                choice = dispatch.choose("auto", x, held, transposed=False)
            assert choice == dispatch.Choice("xla")
    taken = []
    monkeypatch.setattr(dispatch, "_faster", lambda *a: True)
    for packed, _ in weights.values():
        half = dataclasses.replace(
            packed.filled(),
            dense_values=packed.filled().dense_values.astype(jnp.bfloat16),
            nm_values=packed.filled().nm_values.astype(jnp.bfloat16),
            layouts={"wgmma_sp": {}},
        )
        with kernels.assume(*CHIPS[chip]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taken.append(dispatch.choose("auto", x, half, transposed=False).cuda)
    serves = chip == "H200" and dtype == jnp.bfloat16
    assert set(taken) == ({None, "wgmma_sp"} if serves else {None})


@pytest.mark.parametrize("chip", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("layout", ["none", "xla", "dense"])
def test_no_chip_and_no_layout_brings_the_loops_back(weights, chip, layout):
    packed, w = weights["flexhinm"]
    if layout != "none":
        packed = kernels.prepare(packed, layout)
    with kernels.assume(*chip):
        # What was traced for another chip must not be taken.
        text = lowered(lambda x, p: product(x, p), normal(40, w.shape[1]), packed)
    assert "while" not in text


def test_the_loops_are_what_other_platforms_run(weights):
    packed, w = next((p, w) for p, w in weights.values() if p.tiles > 1)
    assert "while" in lowered(product, normal(16, w.shape[1]), packed, "cpu")


@pytest.mark.once
@pytest.mark.parametrize("name", ALL)
def test_expanded_products_are_those_of_the_matrix(weights, name):
    packed, w = weights[name]
    x, g = normal(5, w.shape[1]), normal(5, w.shape[0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    close(expanded(x, packed, dtype="float32", transposed=False), x @ w.T)
    close(expanded(g, packed, dtype="float32", transposed=True), g @ w)


@pytest.mark.parametrize("name", ["2:4", "vector", "flexhinm"])
def test_gradients_of_values_are_those_of_the_reference(weights, name):
    packed, w = weights[name]
    x, g = normal(5, w.shape[1]), normal(5, w.shape[0])
    values = (packed.dense_values, packed.nm_values)

    @jax.jit
    def both(x, g, packed, values):
        product = lambda v: fh.sparse_dot(  # noqa: E731
            x, with_values(packed, v), backend="reference"
        )
        by_reference = jax.vjp(product, values)[1](g)[0]
        return dense.gradient_of_values(x, g, packed), by_reference

    for got, want in zip(*both(x, g, packed, values), strict=True):
        if want is not None:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_padding_columns_before_real_ones_are_not_taken_for_them():
    """A column of zeros may repeat an input anywhere in a tile."""
    packed, _ = pack(fh.FlexHiNM(8))
    filled = packed.filled()
    padded = dataclasses.replace(
        filled,
        dense_index=jnp.pad(filled.dense_index, ((0, 0), (2, 0))),
        dense_values=jnp.pad(filled.dense_values, ((0, 0), (0, 0), (2, 0))),
    )
    assert padded.tiles > 1
    got = jax.jit(dense.expand)(padded)[:, jnp.argsort(padded.out_order)]
    np.testing.assert_array_equal(got.T, kernels.unpack(packed))


def test_a_nan_that_no_tile_reads_reaches_every_output(weights):
    for packed, w in weights.values():
        x = normal(5, w.shape[1]).at[1, 3].set(jnp.nan)
        y = np.isnan(expanded(x, packed, dtype="float32", transposed=False))
        assert y[1].all() and not y[[0, 2, 3, 4]].any()


FEW, MANY = 16, 1024


@pytest.mark.parametrize(
    "opted, held, rows, kernel",
    [
        ("1", False, FEW, "fake"),
        ("1", True, FEW, "fake"),
        ("1", False, MANY, None),
        ("1", True, MANY, None),
        ("0", False, FEW, None),
    ],
)
def test_few_tokens_take_the_kernel_many_the_matrix(
    weights, monkeypatch, opted, held, rows, kernel
):
    """Predicted seconds decide, and nothing without the word of the user."""
    packed, w = weights["flexhinm"]
    seconds = lambda n, _: 0.0 if n < 100 else 1.0  # noqa: E731
    fake = dataclasses.replace(FAKE, seconds=seconds)
    monkeypatch.setattr(registry, "KERNELS", {"fake": fake})
    monkeypatch.setattr(support, "HALF", (jnp.dtype(jnp.float32),))
    monkeypatch.setenv(dispatch.OPT_IN, opted)
    packed = dataclasses.replace(packed, layouts={"fake": {}})
    packed = kernels.prepare(packed, "dense") if held else packed
    x = jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.float32)
    with kernels.assume(9, 0):
        choice = dispatch.choose("auto", x, packed, transposed=False)
        forced = dispatch.choose("fake", x, packed, transposed=False)
    assert choice == dispatch.Choice("xla", kernel)
    assert forced.forced and forced.cuda == "fake"


@pytest.mark.parametrize("chip", CHIPS)
def test_preparing_for_a_gpu_without_kernels_holds_the_matrix(
    weights, monkeypatch, chip
):
    """Written out in every product a packed weight is slower than a dense one."""
    packed, w = weights["flexhinm"]
    monkeypatch.delenv(dispatch.OPT_IN, raising=False)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    with kernels.assume(*CHIPS[chip]):
        ready, both = kernels.prepare((packed, stack))
        text = lowered(lambda x, p: product(x, p), normal(40, w.shape[1]), ready)
    np.testing.assert_array_equal(ready.layouts["dense"], w.T)
    assert list(ready.layouts) == list(both.layouts) == ["dense"]
    assert both.layouts["dense"].shape == (2, *w.T.shape)
    assert text.count("dot_general") == 1
    assert "gather" not in text and "scatter" not in text


@pytest.mark.parametrize(
    "seconds, names",
    [(0.0, ["fake"]), (1.0, ["fake", "dense"])],
    ids=["faster", "slower"],
)
def test_the_matrix_is_held_beside_a_kernel_that_loses_for_many_tokens(
    weights, monkeypatch, seconds, names
):
    packed, w = weights["flexhinm"]
    slow = lambda n, _: seconds if n > 300 else 0.0  # noqa: E731
    monkeypatch.setattr(
        registry, "KERNELS", {"fake": dataclasses.replace(FAKE, seconds=slow)}
    )
    monkeypatch.setattr(support, "HALF", (jnp.dtype(jnp.float32),))
    monkeypatch.setenv(dispatch.OPT_IN, "1")
    with kernels.assume(9, 0):
        ready = kernels.prepare(packed)
        assert list(ready.layouts) == names
        assert list(kernels.prepare(packed, "gpu").layouts) == ["fake"]
        for n in (FEW, 4096):
            x = jax.ShapeDtypeStruct((n, w.shape[1]), jnp.float32)
            choice = dispatch.choose("auto", x, ready, transposed=False)
            kernel = None if seconds and n > 300 else "fake"
            assert choice == dispatch.Choice("xla", kernel)
