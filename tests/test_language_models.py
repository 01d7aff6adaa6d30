"""The study of language models: its rows are commands, its figures are right."""

import shlex

import pytest

from bench import language_models
from flexhinm_jax.cli import choices
from flexhinm_jax.cli.main import parser
from flexhinm_jax.models import load
from flexhinm_jax.models.evaluation import perplexity
from flexhinm_jax.models.load import DECODER
from tests.models import directories


@pytest.mark.parametrize("name", language_models.recipes())
def test_every_row_is_a_command_that_is_accepted(name, tmp_path):
    recipe, out = language_models.recipes()[name], str(tmp_path / "out")
    line = ["prune", "model", "--out", out, *shlex.split(recipe.options)]
    assert "," not in name  # which parts the names that --rows is given
    args = parser().parse_args(line)
    args.model = tmp_path / "model"
    args.model.mkdir()
    checked = choices.check(args, DECODER)
    assert checked.method.needs != "gradients"
    sparsity = checked.sparsity
    low, high = checked.method.pattern.sparsity_range()
    assert low == high if sparsity is None else low <= sparsity <= high
    for verb in recipe.before:
        first = [verb, "model", "--out", str(tmp_path / language_models.WRITTEN[verb])]
        assert parser().parse_args(first).pattern == "2:4" in recipe.options


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
