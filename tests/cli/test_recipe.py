"""Recipes: strict, readable, and enough to repeat a run."""

import json

import numpy as np
import pytest

from flexhinm_jax import patterns
from flexhinm_jax.cli import flags, recipe
from flexhinm_jax.cli.main import main, parser
from flexhinm_jax.io import huggingface

TEXT = """\
method: magnitude
pattern: 1:4           # sixty-four for YAML alone
rules:
  'layer\\.0\\.': skip
  output.dense: 2:4
seed: 7
sequential: false
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_values_are_read_as_the_command_line_reads_them(file):
    given, rules = recipe.options(file)
    assert given == ["--method=magnitude", "--pattern=1:4", "--seed=7"]
    assert rules == [r"layer\.0\.=skip", "output.dense=2:4"]


def test_the_command_line_comes_first(file):
    argv = ["prune", "m", "--out", "o", "--seed", "9", "--rule", "x=skip"]
    args = recipe.merged(parser(), argv, file)
    assert (args.method, args.pattern, args.seed) == ("magnitude", "1:4", 9)
    assert args.rule[0] == "x=skip" and len(args.rule) == 3
    args = recipe.merged(parser(), [*argv, "--rule", "output.dense=1:4"], file)
    others, _ = flags.rules([*args.rule, "a=0.2", "a=0.3", "a=skip"])
    assert str(others["output.dense"]) == str(patterns.parse("1:4"))
    assert flags.rules(["a=0.2", "a=0.3", "a=skip"]) == ({"a": "skip"}, {"a": 0.2})


def test_a_run_is_repeated_from_the_recipe_that_it_wrote(
    file, model_dir, tmp_path, capsys
):
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["prune", str(model_dir), "-q", "--recipe", str(file), "--out"]
    assert main([*command, str(first)]) == 0
    written = first / "recipe.yaml"
    command[4] = str(written)
    assert main([*command, str(second)]) == 0
    assert written.read_text() == (second / "recipe.yaml").read_text()
    a, b = (huggingface.read(path).params for path in (first, second))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    report = json.loads((second / "report.json").read_text())
    zeros = {row["path"]: row["zeros"] for row in report["weights"]}
    assert not any("layer.0." in path for path in zeros)
    assert zeros["encoder.layer.1.intermediate.dense.weight"] == 0.75
    assert report["seed"] == 7


def test_every_option_is_read_as_it_was_written(file):
    words = "--sparsity 0.1 --allocate owl:multiple=3,spread=0.05 --memory 1.5GiB"
    words += " --seed 3 --reconstruct part --reconstruct-rate 1e-5 --pack"
    argv = ["prune", "m", "--out", "o", "--rule", "a=b=0.5", *words.split()]
    args = parser().parse_args(argv)
    file.write_text(recipe.text(args))
    again = recipe.merged(parser(), argv[:4], file)
    assert vars(again) == vars(args) and again.allocate.spread == 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methd: wanda", "unknown key 'methd'; the nearest is 'method'"),
        ("out: x", "unknown key 'out'"),
        ("seed: 1\nseed: 2", "'seed' is there twice"),
        ("rules:\n  a: skip\n  a: 2:4", "'a' is there twice"),
        ("method: [wanda]", "method needs one value"),
        ("method:", "method needs one value, got ''"),
        ("sequential: perhaps", "sequential: write true or false"),
        ("rules: skip", "rules: write REGEX: WHAT"),
        ("rules: [a: skip]", "rules: write REGEX: WHAT"),
        ("- method", "need KEY: VALUE lines"),
        ("", "need KEY: VALUE lines"),
        ("a: {b", "is not a valid recipe"),
        (r'a: "\UFFFFFFFF"', "is not a valid recipe"),
        ("[" * 5000, "is not a valid recipe"),
        ("? [a]\n: b", "is not a valid recipe"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(
    file, model_dir, tmp_path, capsys, text, message
):
    file.write_text(text)
    command = ["prune", str(model_dir), "--out", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_a_run_ends_with_a_comparison(model_dir, text_file, tmp_path, capsys):
    command = ["prune", str(model_dir), "--out", str(tmp_path / "out"), "--json"]
    assert main([*command, "--method", "magnitude", "--eval", str(text_file)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert 0 < document["evaluation"]["mean_cosine"] < 1
    assert document["evaluation"]["lines"] == 3
