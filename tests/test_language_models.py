"""The study of language models: its rows are commands, its figures are right."""

import functools
import json
import re
import shlex
from pathlib import Path

import pytest

from bench import figures, language_models
from flexhinm_jax.cli import choices, learn
from flexhinm_jax.cli.main import main, parser
from flexhinm_jax.models import load
from flexhinm_jax.models.evaluation import perplexity
from flexhinm_jax.models.load import DECODER
from tests.models import directories

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
"""Of the matrices of SmolLM2-135M."""


RECIPES = language_models.recipes()


@functools.cache
def command_line():
    """Its 300 options take longer to add than a line to parse."""
    return parser()


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_a_command_that_is_accepted(name, tmp_path):
    recipe, out = RECIPES[name], str(tmp_path / "out")
    line = [recipe.verb, "model", "--out", out, *shlex.split(recipe.options)]
    assert "," not in name  # which parts the names that --rows is given
    args = command_line().parse_args(line)
    args.model = tmp_path / "model"
    args.model.mkdir()
    check = {"prune": choices.check, "learn": learn.check}[recipe.verb]
    checked = check(args, DECODER)
    assert checked.method.needs != "gradients"
    low, high = checked.method.pattern.sparsity_range()
    for shape in SHAPES:
        checked.method.pattern.check(shape, args.sparsity, name)
    assert low == high if args.sparsity is None else low <= args.sparsity <= high
    for verb in recipe.before:
        first = [verb, "model", "--out", str(tmp_path / language_models.WRITTEN[verb])]
        assert command_line().parse_args(first).pattern == "2:4" in recipe.options


CONFIG = directories.LLAMA2 | {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "max_position_embeddings": 1024,
}
SLOW = (
    "2:4 armor",
    "2:4 nowag",
    "2:4 on MLP only 37.5% sparsegpt",
    "2:4 sparsegpt rotated",
    "2:4 sparsegpt reconstructed",
    "2:4 sparsegpt reordered and tuned on 128 samples",
    *(name for name in language_models.learned() if name != "2:4 proxsparse"),
)
KINDS = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
KINDS += ["2:4 ria on block statistics", "2:4 proxsparse"]


def in_this_process(told):
    """Runs a command with two steps instead of many."""
    pairs = zip(["", *told], told, strict=False)
    told = ["2" if before.endswith("steps") else word for before, word in pairs]
    assert main([*told, "--json"]) == 0
    report = Path(told[told.index("--out") + 1], "report.json")
    document = json.loads(report.read_text()) if report.exists() else {}
    return {"seconds": 1.0, "peak GB": 1.0}, document


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_row_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_models, "run", in_this_process)
    monkeypatch.setattr(language_models, "alone", lambda call, *args, **_: call(*args))
    directories.make_decoder_directory(tmp_path / "model", CONFIG)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is not. " * 40)
    line = ["--model", str(tmp_path / "model"), "--rows", name, "--tokens", "40"]
    line += ["--samples", "4", "--length", "16", "--text", str(text), str(text)]
    flags = language_models.arguments().parse_args(line)
    (row,) = language_models.rows(flags)
    assert row.what == name and row.value and row.value != row.anchor
    sparsity = re.search(r"([\d.]+)%", name)
    gone = 0.5 if sparsity is None else float(sparsity[1]) / 100
    assert row.more["zeros"] == pytest.approx(gone, abs=0.01)
    recipe = language_models.recipes()[name]
    assert row.data["samples"] == (recipe.samples or 4)
    assert row.seconds == 1 + len(recipe.before) + bool(recipe.tuned)
    assert f"flexhinm {recipe.verb} " in row.command
    capsys.readouterr()


def test_a_row_of_another_seed_stands_apart(tmp_path, monkeypatch):
    figures_of = {"perplexity": 30.0, "dense": 29.0, "kl": 0.1, "same": 0.9}
    monkeypatch.setattr(language_models, "written", lambda *_: (tmp_path, {}))
    monkeypatch.setattr(language_models, "alone", lambda *_, **__: figures_of)
    line = ["--rows", "2:4 wanda", "--text", "a.txt", "b.txt"]
    made = {}
    for seed in "01":
        flags = language_models.arguments().parse_args([*line, "--seed", seed])
        (made[seed],) = language_models.rows(flags)
    assert made["1"][:2] == (language_models.SEEDS, "2:4 wanda, seed 1")
    usual = made["0"].command
    assert made["1"].command == usual.replace(" --out", " --seed 1 --out")
    held = [x.document() for x in made.values()]
    assert figures.language_models({"language_models": {"rows": held}}) == held[:1]


def test_a_model_beside_itself_and_beside_another(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    config = directories.LLAMA2 | {"max_position_embeddings": 1024}
    directories.make_decoder_directory(one, config)
    directories.make_decoder_directory(other, config, seed=1)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is not.")
    same = language_models.judge(str(one), str(one), str(text), 40)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["same"] == 1
    want = [perplexity(load(x), text.read_text(), limit=41) for x in (one, other)]
    assert same["perplexity"] == same["dense"] == pytest.approx(want[0].perplexity)
    apart = language_models.judge(str(one), str(other), str(text), 40)
    assert apart["dense"] == pytest.approx(want[0].perplexity)
    assert apart["perplexity"] == pytest.approx(want[1].perplexity)
    assert apart["kl"] > 0.001 and apart["same"] < 1


def row(table, what, value, zeros=0.5, seconds=100.0):
    held = {"table": table, "what": what, "value": value, "anchor": 29.0}
    return held | {"seconds": seconds, "more": {"zeros": zeros}}


ROWS = [
    {"table": "t", "what": "dense", "value": 29.0, "anchor": 29.0},
    row("t", "2:4 wanda", 174.0),
    row("t", "2:4 sparsegpt reordered and reconstructed", 61.0, seconds=900.0),
    row("t", "FlexHiNM v=64 37.5% wanda", 63.0, 0.3749),
    row("t", "FlexHiNM 37.5% wanda", 62.0, 0.3749),
    row("t", "FlexHiNM 37.5% sparsegpt", 41.0, 0.375),
    row("t", "FlexHiNM 50.0% sparsegpt", 57.0),
    row("t", "2:4 on MLP only 37.5% sparsegpt", 44.0, 0.375),
    row(language_models.TRANSPOSABLE, "nm 4:8 wanda", 100.0),
    row(language_models.LEARNED, "2:4 maskllm", 90.0, seconds=50.0),
]


def test_the_best_row_of_every_pattern_is_drawn(tmp_path):
    lines = figures.best_of_patterns(ROWS)
    shown = {
        name: {zeros: best["value"] for zeros, best in line.items()}
        for name, line in lines.items()
    }
    assert shown == {
        "2:4": {0.5: 61.0},
        "FlexHiNM v=64": {0.375: 63.0},
        "FlexHiNM": {0.375: 41.0, 0.5: 57.0},
        "2:4 on MLP only": {0.375: 44.0},
    }
    assert [figures.trained(x) for x in ROWS].count(True) == 2
    pytest.importorskip("matplotlib")
    figures.draw({"language_models": {"rows": ROWS}}, tmp_path)
    assert set(figures.captions(tmp_path)) == {"sparsity.png", "nm_time.png"}
    figures.draw({}, tmp_path / "nothing is drawn without rows")
