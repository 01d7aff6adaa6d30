"""Verdicts and rows of the comparison, from figures made up by hand."""

import pytest

from bench import comparison

ROWS = [
    {"recipe": name, "title": name.upper(), "target": t, "nll": [x, x + 1, x + 2]}
    | {"zeros": [t] * 3, "cpu_seconds": 1.0}
    for name, t, x in [
        ("dense", 0.0, 0.1),
        ("a", 0.5, 1.0),
        ("a", 0.75, 2.0),
        ("b", 0.75, 1.5),
    ]
]


def test_a_verdict_is_a_tie_unless_the_seeds_agree():
    verdict = comparison.verdict
    assert verdict([1.0, 2.0, 3.0], [1.1, 2.11, 3.09]) == "lower"
    assert verdict([1.1, 2.11, 3.09], [1.0, 2.0, 3.0]) == "higher"
    assert verdict([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]) == "tie"
    assert verdict([1.0, 2.0], [1.0, 2.0]) == "tie"
    assert verdict([1.0, 2.0], [2.0, 3.0]) == "lower"
    assert verdict([1.0], [2.0]) == "one seed"


def test_rows_are_means_held_against_the_recipe_of_the_same_sparsity():
    rows = list(comparison.lines("t", ROWS, "nll", "a", "a", "zeros"))
    assert [r.what for r in rows] == ["DENSE, 0", "A, 0.5", "A, 0.75", "B, 0.75"]
    assert [r.value for r in rows] == pytest.approx([1.1, 2.0, 3.0, 2.5])
    assert [r.anchor for r in rows] == [None, 2.0, 3.0, 3.0]
    assert [r.more.get("verdict") for r in rows] == [None, None, None, "lower"]
    assert rows[3].more["zeros"] == 0.75 and rows[3].more["seeds"] == 3
    dense = list(comparison.lines("t", ROWS, "nll", "dense"))
    assert [r.anchor for r in dense] == pytest.approx([1.1] * 4)


def test_unknown_recipes_are_refused(monkeypatch, tmp_path):
    flags = ["--only", "recipes", "--recipes", "dense,magic"]
    monkeypatch.setattr("sys.argv", ["comparison", *flags])
    with pytest.raises(SystemExit, match="--recipes magic: choose from dense, unstruc"):
        comparison.main()
