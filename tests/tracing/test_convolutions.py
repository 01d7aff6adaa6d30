"""Convolutions: one order of inputs for every layout, patches in bounded chunks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.io.packed import read_packed, write_packed
from flexhinm_jax.pruning import statistics
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.sequential import targets
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from flexhinm_jax.types import AxisFactor, Layout
from tests.tracing.cases import assert_close, dense_tree, normal, packed_leaf

KEY = jax.random.key(0)


def conv(kernel_spec, image_spec="NHWC", **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options

    def apply_fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["k"],
            dimension_numbers=(image_spec, kernel_spec, image_spec),
            **options,
        )

    return apply_fn


def placed(kernel, spec):
    """A kernel HWIO stored as `spec`."""
    return kernel.transpose(["HWIO".index(letter) for letter in spec])


def tokens(
    x, kernel, strides=(1, 1), pads=((1, 1), (1, 1)), dilation=(1, 1), holes=(1, 1)
):
    """Patches [t, kh, kw, c] of images NHWC, written out."""
    n, h, w, c = x.shape
    wide = np.zeros((n, (h - 1) * holes[0] + 1, (w - 1) * holes[1] + 1, c), x.dtype)
    wide[:, :: holes[0], :: holes[1]] = x
    wide = np.pad(wide, ((0, 0), *pads, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [
        (m - r) // s + 1
        for m, r, s in zip(wide.shape[1:3], reach, strides, strict=True)
    ]
    out = []
    for b, i, j in itertools.product(range(n), range(size[0]), range(size[1])):
        top, left = i * strides[0], j * strides[1]
        patch = wide[
            b, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]
        ]
        out.append(patch)
    return np.stack(out)


def gram(patches):
    rows = patches.reshape(len(patches), -1)
    return rows.T @ rows


KERNEL, IMAGE = normal(3, 3, 8, 4), normal(2, 5, 6, 8)


@pytest.mark.parametrize("spec", ["HWIO", "OIHW", "IOHW", "OHWI", "IHOW"])
def test_every_layout_of_a_kernel_gives_one_mask_and_one_gram(spec):
    f, params = conv(spec), {"k": placed(KERNEL, spec)}
    (use,) = discover(f, params, IMAGE)
    assert [f.axis for f in use.layout.inputs] == [spec.index(x) for x in "HWI"]
    for method in (fh.Wanda(fh.NM(2, 4)), fh.Magnitude(fh.FlexHiNM(4))):
        sparsity = {} if isinstance(method, fh.Wanda) else {"sparsity": 0.5}
        result = fh.prune(f, params, [IMAGE], method, key=KEY, **sparsity)
        back = np.asarray(result.params["k"]).transpose([spec.index(x) for x in "HWIO"])
        want = fh.prune(
            conv("HWIO"), {"k": KERNEL}, [IMAGE], method, key=KEY, **sparsity
        )
        np.testing.assert_array_equal(back, want.params["k"])
        assert_close(sparsify(f)(result.packed, IMAGE), f(result.params, IMAGE))
    stats = calibrate(f, params, discover(f, params, IMAGE), [IMAGE])["k"]
    assert_close(stats.gram, gram(tokens(IMAGE, (3, 3))))


def test_groups_of_m_inputs_are_channels_of_one_position():
    kernel, x = normal(5, 8, 4), normal(2, 7, 8)  # one axis: OIW and WIO
    kept = {}
    for spec, axes in (("WIO", (0, 1, 2)), ("OIW", (2, 1, 0))):
        f = conv(spec, "NWC", window_strides=(1,))
        params = {"k": kernel.transpose(axes)}
        result = fh.prune(f, params, [x], fh.Magnitude(fh.NM(1, 4)), key=KEY)
        kept[spec] = np.asarray(result.params["k"]).transpose(axes) != 0
    np.testing.assert_array_equal(kept["WIO"], kept["OIW"])
    assert (kept["WIO"].reshape(5, 2, 4, 4).sum(2) == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((2, 1), (0, 3))},
        {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))},
        {"rhs_dilation": (2, 2), "padding": ((2, 2), (2, 2)), "window_strides": (1, 2)},
        {"padding": ((-1, 0), (0, -1))},
    ],
)
@pytest.mark.parametrize("limit", [None, 6000, 1])
def test_patches_in_chunks_are_the_patches(monkeypatch, options, limit):
    f, params = conv("OIHW", **options), {"k": placed(KERNEL, "OIHW")}
    if limit is not None:
        monkeypatch.setattr(statistics, "CHUNK_BYTES", max(limit, 4 * 8 * 9 * 8))
    uses = discover(f, params, IMAGE)
    pads = options["padding"]
    image = IMAGE[:, max(0, -pads[0][0]) :, : 6 + min(0, pads[1][1])]
    pads = [tuple(max(0, n) for n in pair) for pair in pads]
    strides = options.get("window_strides", (1, 1))
    dilation = options.get("rhs_dilation", (1, 1))
    holes = options.get("lhs_dilation", (1, 1))
    truth = tokens(image, (3, 3), strides, pads, dilation, holes)
    for whole in (True, False):
        stats = calibrate(f, params, uses, [IMAGE], gram=whole)["k"]
        assert float(stats.count) == len(truth)
        rows = truth.reshape(len(truth), -1)
        assert_close(stats.sq_norm, np.square(rows).sum(0))
        assert_close(stats.mean, rows.mean(0))
        if whole:
            assert_close(stats.gram, rows.T @ rows)


def test_a_grouped_convolution_in_chunks(monkeypatch):
    x, params = normal(3, 4, 5, 8), {"k": normal(3, 2, 4, 6)}
    f = conv("HWIO", feature_group_count=2, padding="VALID")
    uses = discover(f, params, x)
    whole = calibrate(f, params, uses, [x])["k"]
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 1000)
    jax.tree.map(assert_close, calibrate(f, params, uses, [x])["k"], whole)
    truth = tokens(x, (3, 2), pads=((0, 0), (0, 0)))
    for k in range(2):
        assert_close(whole.gram[k], gram(truth[..., 4 * k : 4 * k + 4]))


def test_masked_images_are_left_out_of_every_chunk(monkeypatch):
    f, params = conv("HWIO"), {"k": KERNEL}
    keep = np.array([True, False])
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * 6 * 8 * 9 * 2)
    stats = calibrate(
        f, params, discover(f, params, IMAGE), [IMAGE], token_mask=lambda x: keep
    )["k"]
    assert_close(stats.gram, gram(tokens(IMAGE[:1], (3, 3))))
    assert float(stats.count) == 30


def test_a_row_of_patches_must_fit_into_the_memory_limit():
    f, params = conv("HWIO"), {"k": KERNEL}
    uses = discover(f, params, IMAGE)
    need, row = statistics.statistics_bytes(uses, gram=False), 4 * 6 * 8 * 9
    calibrate(f, params, uses, [IMAGE], gram=False, memory_limit=need + row)
    with pytest.raises(
        ValueError, match="k: one row of the patches .* takes 1728 bytes"
    ):
        calibrate(f, params, uses, [IMAGE], gram=False, memory_limit=need + row - 1)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_one_input_channel_per_group_stays_dense(multiplier, size):
    x = normal(2, 5, 5, 8)
    params = {
        "k": normal(size, size, 1, 8 * multiplier),
        "p": normal(8 * multiplier, 4),
    }

    def apply_fn(p, x):
        return conv("HWIO", feature_group_count=8)(p, x) @ p["p"]

    uses = discover(apply_fn, params, x)
    assert uses.skipped["k"] == "a depthwise convolution: one input channel per group"
    assert set(uses.leaves) == {"p"}


def test_one_output_per_group_is_no_matrix():
    f, params = conv("HWIO", feature_group_count=2), {"k": normal(3, 3, 4, 2)}
    text = discover(f, params, normal(1, 5, 5, 8)).skipped["k"]
    assert text == "a grouped convolution with one output per group"


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_convolutions_with_either_kernel(transpose_kernel):
    shape = (3, 2, 4, 8) if transpose_kernel else (3, 2, 8, 4)
    x, params = normal(2, 4, 5, 8), {"k": normal(*shape)}

    def apply_fn(p, x):
        return lax.conv_transpose(
            x,
            p["k"],
            (2, 1),
            "VALID",
            transpose_kernel=transpose_kernel,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    uses = discover(apply_fn, params, x)
    (use,) = uses
    (o, i) = (2, 3) if transpose_kernel else (3, 2)
    assert [f.axis for f in use.layout.inputs] == [0, 1, i]
    assert [f.axis for f in use.layout.out] == [o]
    patches = tokens(x, (3, 2), pads=((2, 2), (1, 1)), holes=(2, 1))
    if transpose_kernel:  # the kernel is flipped, so that columns run the other way
        patches = patches[:, ::-1, ::-1]
    stats = calibrate(apply_fn, params, uses, [x])["k"]
    assert_close(stats.gram, gram(np.ascontiguousarray(patches)))
    packed = {"k": packed_leaf(params["k"], use.layout)}
    dense = dense_tree(packed)
    program = str(jax.make_jaxpr(sparsify(apply_fn))(packed, x))
    assert program.count("name=sparse_product") == 1
    assert_close(sparsify(apply_fn)(packed, x), apply_fn(dense, x))


def test_a_file_with_inputs_in_leaf_order_still_opens_and_runs(tmp_path):
    """As written before inputs of every layout were positions, then channels."""
    params = {"k": placed(KERNEL, "OIHW")}
    factors = [AxisFactor(d, 1, n) for d, n in enumerate(params["k"].shape)]
    old = Layout(params["k"].shape, (), (factors[0],), tuple(factors[1:]))
    write_packed(tmp_path / "old", {"k": packed_leaf(params["k"], old)})
    packed, f = read_packed(tmp_path / "old"), conv("OIHW")
    assert packed["k"].layout == old
    program = str(jax.make_jaxpr(sparsify(f))(packed, IMAGE))
    assert program.count("name=sparse_product") == 1
    assert_close(sparsify(f)(packed, IMAGE), f(dense_tree(packed), IMAGE))


def test_going_in_order_takes_patches_in_chunks_too(monkeypatch):
    params = {"k": KERNEL, "c": normal(2, 2, 4, 8)}

    def apply_fn(p, x):
        x = jnp.tanh(conv("HWIO")(p, x))
        return conv("HWIO", padding="VALID")({"k": p["c"]}, x)

    method = fh.SparseGPT(fh.NM(2, 4))
    results = []
    for limit in (1 << 26, 2000):
        monkeypatch.setattr(targets, "CHUNK_BYTES", limit)
        results.append(
            fh.prune_sequential(
                apply_fn, params, [IMAGE], method, key=KEY, target="asym"
            )
        )
    for name in params:
        assert_close(results[0].params[name], results[1].params[name], 1e-4)


def test_a_weight_that_is_read_backwards():
    params, x = {"w": normal(8, 6)}, normal(5, 8)
    f = lambda p, x: x @ jnp.flip(p["w"], (0, 1))[2:, :4] + 0  # noqa: E731
    g = lambda p, x: f(p, x[:, :6])  # noqa: E731
    uses = discover(g, params, x)
    stats = calibrate(g, params, uses, [x])["w"]
    columns = np.concatenate([x[:, :6][:, ::-1], np.zeros((5, 2), np.float32)], 1)
    assert_close(stats.gram, columns.T @ columns)
    packed = {"w": packed_leaf(params["w"], uses.leaves["w"].layout)}
    assert_close(sparsify(g)(packed, x), g(dense_tree(packed), x))
