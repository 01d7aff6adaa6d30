"""The study of language models: its rows are commands, its figures are right."""

import shlex

import numpy as np
import pytest

from bench import language_models
from flexhinm_jax.cli import choices
from flexhinm_jax.cli.main import parser
from flexhinm_jax.models import load
from flexhinm_jax.models.evaluation import perplexity
from tests.models import directories


@pytest.mark.parametrize("name", language_models.recipes())
def test_every_row_is_a_command_that_is_accepted(name, tmp_path):
    recipe, out = language_models.recipes()[name], str(tmp_path / "out")
    line = ["prune", "model", "--out", out, *shlex.split(recipe.options)]
    assert "," not in name  # which parts the names that --rows is given
    args = parser().parse_args(line)
    args.model = tmp_path / "model"
    args.model.mkdir()
    checked = choices.check(args, is_decoder=True)
    assert checked.method.needs != "gradients"
    sparsity = checked.sparsity
    low, high = checked.method.pattern.sparsity_range()
    assert low == high if sparsity is None else low <= sparsity <= high
    if recipe.reorder is not None:
        first = ["reorder", "model", "--out", out, *shlex.split(recipe.reorder)]
        assert parser().parse_args(first).pattern == "2:4"


def test_a_model_beside_itself_and_beside_another(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    directories.make_decoder_directory(one, directories.LLAMA2)
    directories.make_decoder_directory(other, directories.LLAMA2, seed=1)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is not.")
    same = language_models.judge(str(one), str(one), str(text), 40)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["same"] == 1
    want = perplexity(load(one), text.read_text(), length=64, limit=41)
    assert same["perplexity"] == same["dense"] == pytest.approx(want.perplexity)
    apart = language_models.judge(str(one), str(other), str(text), 40)
    first, second = (
        load(folder).apply(load(folder).params, np.asarray([ids[:-1]]))[0]
        for folder in (one, other)
        for ids in [load(folder).encode(text.read_text())[0][:41]]
    )

    def logs(x):
        x = np.asarray(x, np.float64)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = logs(first), logs(second)
    assert apart["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert apart["same"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
