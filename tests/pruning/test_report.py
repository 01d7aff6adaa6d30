import dataclasses
import html.parser
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.tracing.describe import aligned

KEY = jax.random.key(0)


def apply(params, x):
    return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]


PARAMS = {
    "a": jax.random.normal(KEY, (32, 16)),
    "bias": jnp.zeros(16),
    "b": jax.random.normal(KEY, (16, 8)),
}


def run(pattern, sparsity=None, **options):
    batches = [jnp.ones((2, 32))]
    method = fh.Magnitude(pattern)
    return fh.prune(
        apply, PARAMS, batches, method, sparsity=sparsity, key=KEY, **options
    )


def test_rows_count_zeros_groups_and_bytes_by_hand():
    result = run(fh.NM(2, 4))
    first = result.report.rows[0]
    assert first.path == "a" and first.shape == (16, 32) and first.weights == 512
    assert first.zeros == 0.5 and first.natural_24 == 1
    assert first.groups == first.legal_groups == 16 * 8
    assert (first.dense_columns, first.nm_columns, first.pruned_columns) == (0, 32, 0)
    assert first.dense_bytes == 2048
    assert first.packed_bytes == result.packed["a"].nbytes
    w = np.abs(np.asarray(PARAMS["a"]).T)
    kept = np.sort(w.reshape(16, 8, 4), -1)[..., 2:].sum() / w.sum()
    np.testing.assert_allclose(first.retained, kept, rtol=1e-5)


def test_totals_cover_the_whole_tree():
    report = run(fh.NM(2, 4)).report
    assert report.tree_dense_bytes == 4 * (512 + 16 + 128)
    saved = sum(r.dense_bytes - r.packed_bytes for r in report.rows)
    assert report.tree_packed_bytes == report.tree_dense_bytes - saved
    assert report.total["weights"] == 640
    assert "bias" in report.skipped


def test_an_unstructured_weight_stays_dense_and_says_so():
    report = run(fh.Unstructured(), 0.5).report
    assert all("stays dense" in r.note for r in report.rows)
    assert report.tree_packed_bytes == report.tree_dense_bytes
    assert "stays dense" in str(report)


def test_weights_that_packing_makes_larger_are_named():
    """One row of dense tiles beside one of 2:4 ones: all take places of dense ones."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 32)).astype(np.float32)
    w[:8] *= 100
    method = fh.Magnitude(fh.Tiles(tile=8))
    key, params = jax.random.key(0), {"w": jnp.asarray(w.T)}
    apply_fn, x = lambda p, x: x @ p["w"], jnp.ones((2, 32))
    made = fh.prune(apply_fn, params, [x], method, sparsity=0.25, key=key)
    row = made.report.rows[0]
    assert (made.params["w"].T[:8] != 0).all() and row.packed_bytes > row.dense_bytes
    times = row.packed_bytes / row.dense_bytes
    text = f"packing makes 1 of 1 weights {times:.2f} times as large, such as w:"
    assert text in str(made.report) and text in made.report._repr_html_()
    flat = fh.prune(apply_fn, params, [x], fh.Magnitude(fh.NM(2, 4)), key=key)
    assert "packing makes" not in str(flat.report)


def test_regions_are_reported_per_tile():
    row = run(fh.HiNM(8, permute=None), 0.75).report.rows[0]
    assert (row.dense_columns, row.nm_columns, row.pruned_columns) == (0, 16, 16)
    assert row.legal_groups == row.groups == 16 * 4


def test_json_and_table_hold_the_same_numbers():
    report = run(fh.FlexHiNM(8, permute=None), 0.6).report
    document = json.loads(report.to_json())
    assert [w["path"] for w in document["weights"]] == ["a", "b"]
    assert document["total"]["packed_bytes"] == report.total["packed_bytes"]
    text = str(report)
    assert "total" in text and f"{report.total['zeros']:.4f}" in text
    assert "speed" not in text and "faster" not in text


class Tables(html.parser.HTMLParser):
    """The cells of every row of a page, and the text outside of the table."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.rest, self.open = [], "", []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.rest += data


def test_a_notebook_shows_the_rows_of_the_text_with_names_escaped():
    report = run(fh.NM(2, 4), rules={"b$": "skip"}).report
    name = "<b>&amp;</td>"
    report = dataclasses.replace(
        report,
        rows=(dataclasses.replace(report.rows[0], path=name),),
        skipped={"x<y": "a & b"},
        dense={"x<y": 7},
    )
    page = Tables(report._repr_html_())
    header, weight, total = page.rows
    assert weight[:3] == [name, "16x32", "0.5000"]
    assert total[0] == "total" and total[-1] == f"{report.total['packed_ratio']:.4f}"
    lines = str(report).splitlines()
    for cells, line in zip(page.rows, [lines[0], *lines[2:4]], strict=True):
        assert "".join(cells).replace(" ", "") == line.replace(" ", "")
    assert page.rest.split() == " ".join(lines[4:]).split()
    assert f"{report.coverage:.2%}" in page.rest and "x<y" in page.rest


def test_a_report_without_rows_is_a_page_too():
    page = Tables(fh.Report((), {}, 0, 0)._repr_html_())
    assert [row[0] for row in page.rows] == ["weight", "total"]


def test_a_result_shows_counts_and_no_array():
    result = run(fh.NM(2, 4), rules={"b$": "skip"})
    size = result.report.tree_packed_bytes
    totals = f"leaves=1, zeros=50.00%, coverage=80.00%, bytes=2,624 -> {size:,}"
    assert repr(result.report) == f"Report({totals})"
    assert repr(result.uses) == "Uses(leaves=1, uses=1, skipped=2, coverage=80.00%)"
    assert repr(result) == f"Pruned(uses={result.uses!r}, report={result.report!r})"


def test_the_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    run(fh.FlexHiNM(8, permute=None), 0.6).report.figure(tmp_path / "regions.png")
    assert (tmp_path / "regions.png").read_bytes().startswith(b"\x89PNG")


def test_columns_are_aligned():
    text = aligned(["name", "n"], [["a", 1], ["long", 20]])
    assert text == "name   n\n----  --\na      1\nlong  20"


def test_matrices_without_inputs_have_a_column():
    result = run(fh.NM(2, 4))
    plain = fh.report(result.plans, result.packed)
    assert plain.total["unseen"] == 0 and "unseen" not in str(plain)
    told = fh.report(result.plans, result.packed, unseen={"b": 1})
    assert [row.unseen for row in told.rows] == [0, 1] and told.total["unseen"] == 1
    assert "unseen" in str(told).splitlines()[0]


def test_the_share_of_all_weights_is_told_and_a_small_one_warned_of(caplog):
    def apply_fn(params, tokens):
        return params["table"][tokens] @ params["w"] + params["bias"]

    params = {
        "table": jnp.ones((64, 8)),
        "w": jax.random.normal(KEY, (8, 8)),
        "bias": jnp.zeros(8),
        "steps": jnp.zeros((4, 4), jnp.int32),
    }
    batch, method = [jnp.arange(5)], fh.Magnitude(fh.NM(2, 4))
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        result = fh.prune(apply_fn, params, batch, method, key=KEY)
    report = result.report
    assert report.dense == {"table": 512} and report.coverage == 64 / (64 + 512)
    assert report.total["coverage"] == report.coverage
    want = "table: 512 weights skipped, read by gather (embedding)"
    (said,) = [r.getMessage() for r in caplog.records]
    for text in (str(report), fh.describe(result.uses), said):
        assert "pruned 11.11% of the 576 floating weights" in text and want in text
    caplog.clear()
    assert run(fh.NM(2, 4)).report.coverage == 1 and not caplog.records


def test_zeros_of_a_weight_with_factors_are_in_its_core():
    method = fh.ARMOR(fh.NM(2, 4), block=4, steps=1, start=fh.Magnitude(fh.NM(2, 4)))
    batches = [jax.random.normal(KEY, (8, 32))]
    result = fh.prune(apply, PARAMS, batches, method, key=KEY)
    report = result.report
    assert all(r.zeros == 0.5 and r.product_zeros == 0 for r in report.rows)
    assert (result.params["a"] != 0).all()
    assert (report.total["zeros"], report.total["dense_zeros"]) == (0.5, 0)
    cores, larger = str(report).splitlines()[-2:]
    assert "the zeros of 2 of 2 weights, such as a, are in their packed" in cores
    assert cores.endswith("are multiplied out, and 0.0% is zero")
    # Blocks of 4 have 4 (o + i) weights, around o * i = 8 * 16.
    assert "packing makes 1 of 2 weights" in larger
    assert "times as large, such as b: factors take 0.75 weights for each" in larger
    assert "dense columns" not in larger
    flat = run(fh.NM(2, 4)).report
    assert flat.total["dense_zeros"] == 0.5 and flat.rows[0].product_zeros is None
    assert "packed core" not in str(flat)


def test_leaves_that_moved_are_found_to_the_bit():
    before = {"a": jnp.ones(3), "b": np.float32(0), "c": np.full(2, np.nan)}
    after = before | {"a": jnp.ones(3), "b": np.float32(-0.0), "c": before["c"] + 1}
    assert fh.pruning.report.moved(before, before, after) == ("b",)
    assert fh.pruning.report.moved(["a"], before, after) == ()
