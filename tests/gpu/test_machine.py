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

from bench import gpu_compile, gpu_programs
from flexhinm_jax.gpu import hopper, layouts, selfcheck, support
from flexhinm_jax.gpu.tilings import Source, Tiling
from tests.gpu import machine
from tests.gpu.machine import Fault, Machine, TensorMap

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="making PTX needs jax's CUDA plugin: make gpu-compile",
)

STEPS = 9
SEEDS = 6


class Form(NamedTuple):
    """What is multiplied, and how; with 0 tokens as many as a block has."""

    cut: Tiling
    source: Source = Source.STREAM
    tiles: int = 1
    rows: int = 64
    tokens: int = 0
    dtype: str = "bfloat16"
    result: str = "float32"


class Product(NamedTuple):
    """One kernel: its text, what it reads, what it must write."""

    ptx: str
    form: Form
    values: np.ndarray
    meta: np.ndarray
    x: np.ndarray
    order: np.ndarray
    index: np.ndarray
    want: np.ndarray

    def maps(self) -> list[TensorMap]:
        """What the engine copies, in the order of the kernel's parameters."""
        cut, source, index = self.form.cut, self.form.source, self.index
        (t, r, c), step = self.values.shape, cut.step
        peers = cut.sharing if source is Source.LISTED else 1
        rows = min(r, 64 * cut.groups)
        by_rows = self.values.reshape(t, r // 8, 8, c // step, step)
        tiled = by_rows.transpose(0, 1, 3, 2, 4)
        values = TensorMap(tiled, (1, rows // 8 // peers, 1, 8, step), 2 * step)
        by_step = self.meta.reshape(t, -1, c // step, 4 * step).transpose(0, 2, 1, 3)
        words = (
            cut.groups // min(peers, cut.groups),
            4 * step // -(-peers // cut.groups),
        )
        meta = TensorMap(by_step, (1, 1, *words), 0)
        if source is Source.LISTED:
            index = index.reshape(t, c // step, 2 * step)
            per = -(-index.shape[1] // cut.splits)
            return [TensorMap(index, (1, per, 2 * step), 0), values, meta]
        if source is Source.HELD:
            return [values, meta, TensorMap(index, (1, 1, 128), 0)]
        if source is Source.PLAIN:
            return [values, meta]
        n, width = self.x.shape
        x = self.x.reshape(n // 8, 8, width // 64, 64).transpose(0, 2, 1, 3)
        box = (cut.tokens // 8 // cut.sharing, step // 32, 8, 64)
        return [values, meta, TensorMap(x, box, 128)]

    def run(self, seed: int, spoil: Any = None) -> int:
        """Wrong elements of the result, clusters run one after the other."""
        cut, (tiles, blocks) = self.form.cut, self.meta.shape[:2]
        ptx = self.ptx if spoil is None else spoil(self.ptx)
        assert spoil is None or ptx != self.ptx
        kind = {"float32": np.float32, "bfloat16": np.uint16}[self.form.result]
        y = np.zeros(self.want.shape, kind)
        y.view(np.uint8)[...] = 0xFF  # NaN
        parameters = {"loaded": self.order, "copied": self.x, "stored": y}
        line, peers = cut.splits, cut.sharing
        rows = tiles * blocks // cut.groups
        tokens = -(-self.want.shape[0] // cut.tokens)
        if self.form.source is Source.LISTED:  # the peers lie along the tokens
            rows, tokens = rows * peers, -(-tokens // peers)
        for row in range(0, rows, peers):
            for token in range(tokens):
                places = [
                    (token * line + k % line, row + k // line, 0)
                    for k in range(line * peers)
                ]
                if line * peers == 1:
                    places = [(0, token, row)]
                common = ptx, parameters, self.maps(), cut.groups
                cluster = [
                    Machine(*common, at, seed, rank, line)
                    for rank, at in enumerate(places)
                ]
                machine.run(cluster)
        if kind is np.uint16:
            y = machine.decoded(y, self.form.result)
        return int((y != self.want).sum())


def compiled(form: Form) -> Product:
    """A product of small integers, ragged in its columns."""
    rng = np.random.default_rng(0)
    cut, source, dtype = form.cut, form.source, form.dtype
    packed, w = selfcheck.example(rng, form.tiles, form.rows, 8, 32 * STEPS - 7, dtype)
    ready = layouts.tiles(packed)
    index, out = ready["index"], jnp.dtype(form.result)
    x = rng.integers(-1, 2, (form.tokens or cut.tokens, w.shape[1])).astype(np.float32)
    activations = jnp.asarray(x, dtype)
    if source is Source.PLAIN:  # the columns of the stream that exist are the inputs
        stream = layouts.gather(activations, index.reshape(-1))
        activations = stream[:, : 128 * STEPS - 8]
    if source is Source.STREAM:
        activations = layouts.gather(activations, index.reshape(-1))
    indexed = source in (Source.LISTED, Source.HELD)
    arrays = [ready["values"], ready["meta"], activations, ready["order"]]
    arrays += [index] if indexed else []

    def run(*arrays: Any) -> Any:
        values, meta, x, order, *index = arrays
        return hopper.product(
            values, meta, x, order, packed.shape[0], out, cut, source, *index
        )

    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
    chip = gpu_compile.CHIPS["h200"]
    case = gpu_programs.Case("wgmma_sp", "small", run, shapes)
    [text] = gpu_compile.dump(case, chip, gpu_compile.mesh_of(chip)).kernels
    if source is Source.STREAM:
        activations = support.pad_rows(activations, cut.tokens)
    if source is Source.LISTED:
        activations = support.pad_rows(activations, cut.tokens * cut.sharing).T
    raw = [
        np.array(a)
        for a in (ready["values"], ready["meta"], activations, ready["order"], index)
    ]
    values, meta, taken, order, listed = (
        a.view(np.uint16) if a.itemsize == 2 else a for a in raw
    )
    want = x @ w.T
    if form.result == "bfloat16":
        assert np.abs(want).max() <= 256, "exact in bfloat16"
    return Product(text[".ptx"], form, values, meta, taken, order, listed, want)


ROWS = Form(Tiling(1, 16))
TURNED = Form(Tiling(2, 16), Source.LISTED, 2, 128, dtype="float16")
SPLIT = Form(Tiling(2, 8, 2, 5), Source.PLAIN, 1, 128, 5)
TAKEN = Form(Tiling(2, 8, 2, held=True), Source.HELD, 1, 128, 3)
HALF = Form(Tiling(2, 64, step=32), rows=128, dtype="float16")
PAIR = Form(Tiling(2, 64, sharing=2, step=32), Source.LISTED, 1, 128, 72)
FORMS = {
    "rows": ROWS,
    "2 groups": Form(Tiling(2, 16), rows=128, result="bfloat16"),
    "8 tokens, 3 splits": Form(Tiling(1, 8, 3), rows=56, dtype="float16"),
    "2 groups, 2 splits": Form(Tiling(2, 16, 2), rows=128),
    "shared by 2": Form(Tiling(1, 16, sharing=2), rows=128),
    "shared by 2, 2 splits": Form(Tiling(2, 16, 2, sharing=2), rows=256),
    "plain, 2 groups, 2 splits": SPLIT,
    "plain, 2 blocks of tokens": Form(Tiling(1, 8), Source.PLAIN, tokens=11),
    "gathered, 2 groups": TURNED,
    "gathered, 5 slots": Form(Tiling(1, 16, 1, 5), Source.LISTED, 2, dtype="bfloat16"),
    "held, 2 groups, 2 splits": TAKEN,
    "held, 1 token": Form(Tiling(1, 8, held=True), Source.HELD, 2, tokens=1),
    "half steps": HALF,
    "half steps, 256 tokens": Form(Tiling(2, 256, step=32), rows=128, tokens=250),
    "gathered, weights shared by 2": PAIR,
    "selector 0 alone": Form(Tiling(1, 16, selectors=1)),
}


@pytest.fixture(scope="module")
def products():
    kept: dict[str, Product] = {}

    def get(name: str) -> Product:
        if name not in kept:
            kept[name] = compiled(FORMS[name])
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


def no_meeting(number: int) -> Any:
    """Without a meeting of the cluster; number 0 is that of the barriers."""

    def spoil(ptx: str) -> str:
        lines = re.findall(r"barrier\.cluster\.\S+;", ptx)
        assert len(lines) == 6, lines
        pieces = re.split(r"barrier\.cluster\.\S+;", ptx)
        lines[2 * number : 2 * number + 2] = ["", ""]
        return "".join(a + b for a, b in zip(pieces, [*lines, ""], strict=True))

    return spoil


def no_sync_of_groups(ptx: str) -> str:
    """The two warpgroups do not wait for each other before they hand sums over."""
    start = ptx.rindex("mbarrier.try_wait")
    end = ptx.index(";", start)
    wait = re.sub(
        r"mbarrier\.try_wait\S+ P1, .*", "setp.eq.s32 P1, 0, 0", ptx[start:end]
    )
    assert start < ptx.index("st.shared.v2")
    return ptx[:start] + wait + ptx[end:]


def other_order(ptx: str) -> str:
    """Sums of the first block twice instead of those of the second."""
    return re.sub(r"(mapa\.shared::cluster\.u32 \S+ \S+), (%r\d+)", r"\1, 0", ptx)


def not_freed(ptx: str) -> str:
    """A slot is filled before the other warpgroup or block has used it."""
    waits = list(re.finditer(r"mbarrier\.try_wait\S+ P1, \[[^;]*", ptx))
    assert len(waits) in (2, 4), "perhaps a list and a meeting, a full slot, a free one"
    start, end = waits[-1].span()
    return ptx[:start] + "setp.eq.s32 P1, 0, 0" + ptx[end:]


def alone(ptx: str) -> str:
    """The other block gets nothing."""
    return re.sub(r"(complete_tx::bytes)\.multicast::cluster", r"\1", ptx)


def no_meeting_at_the_end(ptx: str) -> str:
    at = ptx.rindex("barrier.cluster.arrive")
    return ptx[:at] + re.sub(r"barrier\.cluster\.\S+;", "", ptx[at:])


def ungrouped_copies(ptx: str) -> str:
    """x is read before all of it is held."""
    return re.sub(r"cp\.async\.wait_group\s+0;", "", ptx, count=1)


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
        ("gathered, 2 groups", wrong_parity),
        ("gathered, 2 groups", no_fence),
        ("gathered, 2 groups", shorter_gather),
        ("gathered, 2 groups", other_selector),
        ("plain, 2 groups, 2 splits", no_fence),
        ("plain, 2 groups, 2 splits", shorter_gather),
        ("8 tokens, 3 splits", no_meeting(1)),
        ("plain, 2 groups, 2 splits", no_meeting(2)),
        ("plain, 2 groups, 2 splits", other_order),
        ("2 groups, 2 splits", no_sync_of_groups),
        ("shared by 2", not_freed),
        ("shared by 2", alone),
        ("shared by 2", no_meeting_at_the_end),
        ("half steps", not_freed),
        ("half steps", wrong_parity),
        ("half steps", shorter_wait),
        ("half steps", other_selector),
        ("half steps", other_stride),
        ("gathered, weights shared by 2", not_freed),
        ("gathered, weights shared by 2", alone),
        ("gathered, weights shared by 2", no_fence),
        ("held, 2 groups, 2 splits", no_fence),
        ("held, 2 groups, 2 splits", ungrouped_copies),
        ("held, 2 groups, 2 splits", wrong_parity),
    ],
)
def test_a_spoilt_program_is_caught(products, name, spoil):
    assert caught(products(name), spoil)


def test_metadata_can_move_to_the_lanes_of_selector_0(products):
    used = re.compile(r", ([01]), p, 1, 1")
    assert set(used.findall(products("rows").ptx)) == {"0", "1"}
    assert set(used.findall(products("selector 0 alone").ptx)) == {"0"}
    assert caught(products("selector 0 alone"), other_selector)


def test_a_product_in_flight_while_metadata_are_loaded_is_caught():
    assert caught(compiled(Form(Tiling(1, 16, in_flight=1))))


def test_a_slot_that_is_filled_too_early_is_caught(monkeypatch):
    """One step more ahead: the slot that the other warpgroup still reads."""
    early = property(lambda cut: cut.depth - cut.in_flight)
    monkeypatch.setattr(Tiling, "ahead", early)
    assert caught(compiled(TURNED))
