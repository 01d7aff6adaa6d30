"""The PTX of small products, executed (`machine`): right, and every spoilt one caught.

Needs jax's CUDA plugin to make PTX, no GPU: part of `make gpu-compile`.
"""

import importlib.util
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import gpu_compile
from flexhinm_jax.gpu import hopper, layouts, selfcheck
from tests.gpu.machine import Fault, Machine, TensorMap

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="making PTX needs jax's CUDA plugin: make gpu-compile",
)

STEPS = 9
SEEDS = 6


class Product(NamedTuple):
    """One kernel: its text, what it reads, what it must write."""

    ptx: str
    cut: hopper.Tiling
    values: np.ndarray
    meta: np.ndarray
    x: np.ndarray
    order: np.ndarray
    index: np.ndarray | None
    want: np.ndarray

    def maps(self) -> list[TensorMap]:
        """What the engine copies, in the order of the kernel's parameters."""
        t, r, c = self.values.shape
        rows = min(r, 64 * self.cut.row_groups)
        tiled = self.values.reshape(t, r // 8, 8, c // 64, 64).transpose(0, 1, 3, 2, 4)
        values = TensorMap(tiled, (1, rows // 8, 1, 8, 64), 128)
        by_step = self.meta.transpose(0, 2, 1, 3)
        meta = TensorMap(by_step, (1, 1, self.cut.row_groups, 256), 0)
        if self.index is not None:
            per = -(-self.index.shape[1] // self.cut.splits)
            return [TensorMap(self.index, (1, per, 128), 0), values, meta]
        n, width = self.x.shape
        x = self.x.reshape(n // 8, 8, width // 64, 64).transpose(0, 2, 1, 3)
        return [values, meta, TensorMap(x, (self.cut.width // 8, 2, 8, 64), 128)]

    def run(self, seed: int, spoil: Any = None) -> int:
        """Wrong elements of the result, all blocks run one after the other."""
        tiles, blocks = self.meta.shape[:2]
        ptx = self.ptx if spoil is None else spoil(self.ptx)
        assert spoil is None or ptx != self.ptx
        y = np.full((self.cut.splits, *self.want.shape), np.nan, np.float32)
        parameters = {0: self.order, 1: y, 3: self.x}
        for row in range(tiles * blocks // self.cut.row_groups):
            for split in range(self.cut.splits):
                at, groups = (split, 0, row), self.cut.groups
                Machine(ptx, parameters, self.maps(), groups, at, seed).run()
        return int((y.sum(0) != self.want).sum())


def compiled(cut: hopper.Tiling, tiles: int, rows: int, dtype: str) -> Product:
    """A product of small integers, ragged in its columns."""
    rng = np.random.default_rng(0)
    packed, w = selfcheck.example(rng, tiles, rows, 6, 32 * STEPS - 3, dtype)
    x = rng.integers(-2, 3, (cut.width, w.shape[1])).astype(np.float32)
    ready, activations = layouts.tiles(packed), jnp.asarray(x, dtype)
    index = ready["index"] if tiles > 1 else None
    activations = (
        activations.T
        if tiles > 1
        else layouts.gather(activations, ready["index"].reshape(-1))
    )
    arrays = [ready["values"], ready["meta"], activations, ready["order"]]

    def run(*arrays: Any) -> Any:
        values, meta, x, order, *index = arrays
        out, f32 = packed.shape[0], jnp.dtype(jnp.float32)
        return hopper.product(values, meta, x, order, out, f32, cut, *index)

    arrays += [] if index is None else [index]
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
    chip = gpu_compile.CHIPS["h200"]
    case = gpu_compile.Case("wgmma_sp", "small", run, shapes, "", "")
    text = gpu_compile.dump(case, chip, gpu_compile.mesh_of(chip))
    raw = [np.array(a) for a in arrays]
    raw = [a.view(np.uint16) if a.itemsize == 2 else a for a in raw]
    listed = None if index is None else raw[4]
    values, meta, taken, order = raw[:4]
    return Product(text[".ptx"], cut, values, meta, taken, order, listed, w @ x.T)


ROWS = hopper.Tiling(1, 1, 16)
GATHERED = hopper.Tiling(1, 2, 32)
FORMS = {
    "rows": (ROWS, 1, 64, "bfloat16"),
    "8 tokens, 2 splits, ragged": (hopper.Tiling(1, 1, 8, 2), 1, 56, "float16"),
    "2 row groups": (hopper.Tiling(2, 1, 16), 1, 128, "bfloat16"),
    "gathered, 2 token groups": (GATHERED, 2, 64, "float16"),
    "gathered, 2 row groups": (hopper.Tiling(2, 1, 16, 1, 5), 2, 128, "bfloat16"),
}


@pytest.fixture(scope="module")
def products():
    kept: dict[str, Product] = {}

    def get(name: str) -> Product:
        if name not in kept:
            kept[name] = compiled(*FORMS[name])
        return kept[name]

    return get


@pytest.mark.parametrize("name", FORMS)
def test_the_ptx_computes_the_product_in_any_order_of_events(products, name):
    assert [products(name).run(seed) for seed in range(SEEDS)] == [0] * SEEDS


def caught(product: Product, spoil: Any = None) -> bool:
    """Whether some seed shows that a program is wrong."""
    for seed in range(SEEDS):
        try:
            if product.run(seed, spoil):
                return True
        except Fault:
            return True
    return False


def wrong_parity(ptx: str) -> str:
    return re.sub(r"(try_wait\.parity\S+ P1, \[%r\d+\]), %r\d+", r"\1, 0", ptx)


def no_fence(ptx: str) -> str:
    return ptx.replace("fence.proxy.async.shared::cta;", "")


def shorter_wait(ptx: str) -> str:
    return re.sub(r"(wgmma\.wait_group\S+\s+)0", r"\g<1>1", ptx, count=1)


def shorter_gather(ptx: str) -> str:
    more = lambda m: f"{m[1]}{int(m[2]) + 1}"  # noqa: E731
    return re.sub(r"(cp\.async\.wait_group\s+)(\d)", more, ptx)


def other_selector(ptx: str) -> str:
    return re.sub(r", ([01]), p, 1, 1", lambda m: f", {1 - int(m[1])}, p, 1, 1", ptx)


def other_stride(ptx: str) -> str:
    """The second product of a step starts 32 bytes late."""
    value = max(map(int, re.findall(r"add\.s64\s+%rd\d+, %rd\d+, (\d{16,});", ptx)))
    return ptx.replace(str(value), str(value + 2))


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("rows", wrong_parity),
        ("rows", shorter_wait),
        ("rows", other_selector),
        ("rows", other_stride),
        ("gathered, 2 token groups", wrong_parity),
        ("gathered, 2 token groups", no_fence),
        ("gathered, 2 token groups", shorter_gather),
        ("gathered, 2 token groups", other_selector),
    ],
)
def test_a_spoilt_program_is_caught(products, name, spoil):
    assert caught(products(name), spoil)


def test_a_product_in_flight_while_metadata_are_loaded_is_caught():
    assert caught(compiled(hopper.Tiling(1, 1, 16, in_flight=1), 1, 64, "bfloat16"))


def test_a_slot_that_is_filled_too_early_is_caught(monkeypatch):
    """One step more ahead: the slot that the other warpgroup still reads."""
    early = property(lambda cut: cut.depth - cut.in_flight)
    monkeypatch.setattr(hopper.Tiling, "ahead", early)
    assert caught(compiled(GATHERED, 2, 64, "float16"))
