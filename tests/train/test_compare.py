"""Tables, figures and verdicts of the comparison, from rows made up by hand."""

import json

import pytest

from train import compare

ROWS = [
    {"recipe": "dense", "title": "dense", "target": 0.0, "nll": [0.1, 0.2, 0.3]},
    *(
        {"recipe": name, "title": name.upper(), "target": t, "nll": [x, x + 1, x + 2]}
        for name, t, x in [("a", 0.5, 1.0), ("a", 0.75, 2.0), ("b", 0.75, 1.5)]
    ),
]


def test_a_verdict_is_a_tie_unless_the_seeds_agree():
    assert compare.verdict([1.0, 2.0, 3.0], [1.1, 2.11, 3.09]) == "lower"
    assert compare.verdict([1.1, 2.11, 3.09], [1.0, 2.0, 3.0]) == "higher"
    assert compare.verdict([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]) == "tie"
    assert compare.verdict([1.0, 2.0], [1.0, 2.0]) == "tie"
    assert compare.verdict([1.0, 2.0], [2.0, 3.0]) == "lower"
    assert compare.verdict([1.0], [2.0]) == "tie", "one seed tells nothing"


def test_the_table_has_the_dense_model_in_every_column_and_gaps_where_nothing_ran():
    columns, lines = compare.table(ROWS, "nll")
    assert columns == ["nll", "50 %", "75 %"]
    assert lines == [
        ["dense", "0.2000 ± 0.1000", "0.2000 ± 0.1000"],
        ["A", "2.0000 ± 1.0000", "3.0000 ± 1.0000"],
        ["B", "", "2.5000 ± 1.0000"],
    ]


def test_everything_is_written_and_verdicts_compare_equal_sparsities(tmp_path, capsys):
    document = compare.write(tmp_path, ROWS, ["nll"], base="a")
    assert document["verdicts"] == {"b": {"0.75": "lower"}}
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == ROWS
    assert "| A | 2.0000 ± 1.0000 |" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "dense" in capsys.readouterr().out


def test_unknown_recipes_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare", "--only", "dense,magic"])
    with pytest.raises(SystemExit, match="--only magic: choose from dense, unstruc"):
        compare.main()
