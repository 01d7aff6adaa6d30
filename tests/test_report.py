"""The page of measurements shows what the files hold, and a new file needs no edit."""

import json

import pytest

from bench import figures, report, run, study

ROW = {"table": "t", "what": "speed", "value": 2.0, "command": "make it"}


def page(rows):
    return report.render({"novel": {"title": "Novel", "rows": rows}}, {})


def test_the_page_is_what_the_files_of_the_repository_give():
    want = report.render(report.load(), figures.captions(report.RESULTS))
    assert want == report.PAGE.read_text(), "run: make bench-report"


@pytest.mark.parametrize("name", sorted(report.load()))
def test_every_row_has_the_schema_and_a_name_of_its_own(name):
    document = report.load()[name]
    for row in document["rows"]:
        assert set(row) <= set(study.Row._fields), row["what"]
        assert {"table", "what", "value", "command"} <= set(row), row["what"]
        assert row["table"] in document["notes"]
    names = [(row["table"], row["what"]) for row in document["rows"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", sorted(report.load()))
def test_anchors_of_the_file_are_those_that_rows_were_held_against(name):
    for row in report.load()[name]["rows"]:
        known = study.anchors(row["table"]).get(row["what"])
        assert known in (None, row["anchor"]), row["what"]


def test_a_new_file_is_shown_without_an_edit():
    shown = page([ROW | {"anchor": 4.0, "seconds": 0.5, "more": {"kept": True}}])
    assert "| speed | 2 | 4 | 0.5 | yes | 0.5 |\n" in shown
    assert "Made by `make it`." in shown
    assert "## Novel" in shown and "### t" in shown


def test_a_figure_that_is_not_there_was_not_measured():
    assert "| speed | not measured |\n" in page([ROW | {"value": None}])


def test_a_command_that_names_its_row_is_shown_once_another_in_a_column():
    pair = [ROW | {"what": x, "command": f"make x --rows {x}"} for x in ("a", "b")]
    shown = page(pair)
    assert "Made by `make x --rows ROW`." in shown and "| a | 2 |\n" in shown
    shown = page([pair[0], ROW])
    assert "| a | 2 | `make x --rows a` |" in shown and "Made by `make x" not in shown


def test_what_is_kept_in_data_is_not_a_column():
    assert "curve" not in page([ROW | {"data": {"curve": [1, 2]}}])


def test_a_row_takes_the_place_of_the_former_one_of_its_name(tmp_path):
    path, known = (
        tmp_path / "x.json",
        study.Study("x", "X", {}, {"t": "less is better"}),
    )
    for what, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        study.merge(path, known, study.Row("t", what, value).document())
    document = json.loads(path.read_text())
    assert [(r["what"], r["value"]) for r in document["rows"]] == [
        ("a", 3.0),
        ("b", 2.0),
    ]
    assert document["notes"] == {"t": "less is better"}


def test_a_command_chooses_the_row_and_repeats_the_other_flags(monkeypatch):
    one = study.Study("x", "X", dict.fromkeys("pq", lambda flags: []), {}, by_row=True)
    monkeypatch.setattr("sys.argv", ["x", "--only", "p", "--seconds", "3", "--rows=a"])
    command = one._command("p", study.Row("t", "a, 8 minutes", 1.0))
    assert command == 'make bench-x ARGS="--only p --rows a --seconds 3"'


def test_a_study_runs_its_parts_and_prints_their_tables(tmp_path, monkeypatch, capsys):
    parts = {"p": lambda flags: [study.Row("t", "a", 1.0)], "q": list}
    one, out = study.Study("x", "X", parts, {"t": "note"}), tmp_path / "x.json"
    monkeypatch.setattr("sys.argv", ["x", "--only", "p", "--out", str(out)])
    one.main(one.parser("About"))
    assert "### t\n\nnote\n" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"][0]["command"].startswith("make bench-x")
    monkeypatch.setattr("sys.argv", ["x", "--only", "r"])
    with pytest.raises(SystemExit, match="--only r: choose from p, q"):
        one.main(one.parser("About"))


def test_all_benchmarks_are_found_and_those_without_a_device_skipped(monkeypatch):
    names = run.benchmarks()
    assert {"minilm", "gpu", "training"} <= set(names) and "report" not in names
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    assert run.reason_to_skip("gpu", False) == "needs an NVIDIA GPU"
    assert run.reason_to_skip("minilm", False) is None
    assert run.reason_to_skip("minilm", True) == "has no short form"


def shows(cell, value):
    """Whether a cell is the value, rounded to the digits that the cell has."""
    text = cell.replace(",", "").strip("* ")
    places = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.501 * 10**-places


def cells(*heading):
    """Rows of the tables of docs/language-models.md that have this heading."""
    page = (report.BENCH.parent / "docs" / "language-models.md").read_text()
    for block in page.split("\n\n"):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in block.splitlines()
            if line.startswith("|")
        ]
        if lines and tuple(lines[0][1:]) == heading:
            yield from lines[2:]


def test_rows_of_the_page_on_language_models_are_rows_of_the_file():
    known = report.load()["language_models"]["rows"][1:]
    heading = ("perplexity", "/ dense", "same top token", "CPU s", "bytes, whole model")
    shown = list(cells(*heading))
    assert len(shown) > 80
    for what, *figures_of in shown:
        if "one run" in figures_of[3]:
            continue
        found = [
            row["what"]
            for row in known
            if all(
                map(
                    shows,
                    figures_of,
                    (
                        row["value"],
                        row["value"] / row["anchor"],
                        row["more"]["same top token"],
                        row["seconds"],
                        row["more"].get("packed / dense bytes", 1),
                    ),
                )
            )
        ]
        assert found, f"{what}: no row has {figures_of}"


KINDS = {
    "unstructured": "unstructured",
    "FlexHiNM, V = 32, Gyro": "FlexHiNM",
    "V = 64": "FlexHiNM v=64",
    "V = 32, random rows": "FlexHiNM random rows",
    "V = 32, no order": "FlexHiNM without order",
    "HiNM, V = 32, Gyro": "HiNM",
    "dense + 2:4, one boundary a matrix, Gyro": "dense + 2:4 with one boundary",
    "tiles of 64": "tiles",
}


def test_the_table_by_sparsity_is_that_of_the_file():
    known = {row["what"]: row for row in report.load()["language_models"]["rows"]}
    sparsities = ("25 %", "37.5 %", "50 %", "62.5 %", "75 %")
    shown = {what: row for what, *row in cells(*sparsities)}
    assert set(KINDS) <= set(shown)
    for label, kind in KINDS.items():
        for sparsity, cell in zip(sparsities, shown[label], strict=True):
            figures_of = [x for x in cell.split(" / ") if x]
            methods = ("wanda", "sparsegpt", "alps")
            for method, figure in zip(methods, figures_of, strict=False):
                name = f"{kind} {float(sparsity[:-2])}% {method}"
                row = known.get(name)
                if figure == "-":
                    assert row is None, f"{name} is measured"
                else:
                    assert shows(figure, row["value"] / row["anchor"]), name
