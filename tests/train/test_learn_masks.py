"""Learned masks on a tiny encoder: rows, budgets, resumption, and the table."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models.decoder import DecoderConfig
from train import language
from train.lab.masks import comparison, problems
from train.lab.masks import rows as known
from train.lab.masks.learner import Learner, learning, started_at
from train.lab.teacher import Recipe

RECIPE = Recipe(rows=2, length=16, precision="float32")
NM = fh.NM(2, 4)
LEARNERS = {
    "maskllm": Learner(fh.MaskLLM(NM, relaxation="expected"), 0.02, looks=3),
    "maskpro": Learner(fh.MaskPro(NM, start=2.0), 50.0, "sgd", looks=3),
    "patch": Learner(fh.Patch(), 0.01, "relative", looks=3),
}


@pytest.fixture(scope="module")
def problem(few_documents, model_dir, sentences):
    sizes = {"sentences": 40, "calibration": 16, "evaluation": 8}
    found = problems.minilm(model_dir, **sizes, given=sentences, recipe=RECIPE)
    assert found.tile == 16
    return dataclasses.replace(found, side=8)


def compared(problem, out, steps=4.0, **options):
    budget = fh.Duration(steps)
    return comparison.Comparison(problem, budget, out, learners=LEARNERS, **options)


def test_rows_say_what_they_start_from_and_how_much_is_removed():
    row = known.parse("refine_mask>patch@0.25")
    assert (row.start, row.name, row.sparsity) == ("refine_mask", "patch", 0.25)
    for text, told in (
        ("magic", "unknown 'magic'; magnitude, wanda"),
        ("patch", "needs a sparsity"),
        ("wanda@0.5", "has only one sparsity"),
        ("patch@x", "'x' is no number"),
        ("patch@0.7", "not between 0 and 0.5"),
        ("alps>maskllm", "not a 2:4 mask of the dense weights"),
        ("wanda>proxsparse", "does not start from masks"),
    ):
        with pytest.raises(ValueError, match=told):
            known.parse(text)
    for text in known.DEFAULT:
        assert known.parse(text).text == text


def test_mlp_only_comes_as_near_to_the_target_as_whole_matrices_do(problem):
    total = sum(np.prod(use.layout.shape) for use in problem.uses.prunable)
    smallest = min(np.prod(use.layout.shape) for use in problem.uses.prunable)
    for target in (0.1, 0.25, 0.4):
        uses = problem.discover(known.mlp_only_24(problem.uses, target))
        removed = sum(np.prod(use.layout.shape) for use in uses.prunable) / 2
        assert abs(removed / total - target) <= smallest / 2 / total
    chosen = problem.discover(known.mlp_only_24(problem.uses, 0.25)).leaves
    assert not any(known.is_attention(path) for path in chosen)


@pytest.mark.slow
def test_every_kind_of_row_keeps_the_weights_and_the_sparsity(problem, tmp_path):
    rows = (
        "wanda",
        "wanda>maskllm",
        "wanda>mlp_only_24@0.25",
        "wanda>patch@0.25",
        "wanda>maskpro",
        "unstructured@0.25",
    )
    made = compared(problem, tmp_path)
    found = {r["row"]: r for r in made.rows(rows)}
    for text in rows:
        want = known.parse(text).sparsity or 0.5
        assert found[text]["sparsity"] == pytest.approx(want, abs=1e-3)
    for text in ("wanda>maskllm", "wanda>maskpro"):
        assert found[text]["first"] == pytest.approx(found["wanda"]["validation"])
        assert found[text]["validation"] <= found["wanda"]["validation"] + 1e-6
        assert found[text]["steps"] == 4
        assert found[text]["cpu_seconds"] > found["wanda"]["cpu_seconds"]
    weights = found["wanda"]["weights"]
    assert found["wanda>maskllm"]["bytes"]["learned"] == 6 * weights
    assert found["wanda>maskpro"]["bytes"]["learned"] == 4 * weights
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [r["row"] for r in summary["rows"]] == list(rows)
    assert summary["dense"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert "wanda>patch@0.25" in (tmp_path / "table.md").read_text()
    again = compared(problem, tmp_path, resume=True)
    assert again.row("wanda>maskllm") == found["wanda>maskllm"]
    keeps = again._row(known.parse("wanda>maskllm"))[1]
    params = comparison.masked(problem.params, problem.uses, keeps)
    assert problem.validate(params) == found["wanda>maskllm"]["validation"]


def run_of(problem, folder=None, resume=False, told=1):
    learner = LEARNERS["maskllm"]
    key = jax.random.key(0)
    parts = problem.params, problem.uses
    states = fh.solve(learner.method, key, *parts, problem.stats)
    task = problem.loss_fn, problem.batch_at, problem.validate
    saves = {"checkpoints": folder, "save_every": 1, "resume": resume, "config": told}
    return learning(learner, states, *parts, task, fh.Duration(6), key=key, **saves)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(problem, tmp_path):
    whole = run_of(problem)
    list(whole)
    stopped = run_of(problem, tmp_path)
    list(itertools.islice(stopped, 4))
    other = run_of(problem, tmp_path, True)
    rest = list(other)
    assert other.step == whole.step == 6 and len(rest) == 6 - stopped.step
    for a, b in zip(
        jax.tree.leaves(whole.states), jax.tree.leaves(other.states), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="run"):
        list(run_of(problem, tmp_path, True, told=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        ("magnitude", "alps_mask", "alps", "hyperprune"),
        ("refine_mask>maskllm_scores", "proxsparse", "wanda>patch_tile@0.25"),
    ],
    ids=["solved", "learned"],
)
def test_every_other_row_runs_too(rows, problem, tmp_path):
    made = comparison.Comparison(problem, fh.Duration(2), tmp_path)
    for row in made.rows(rows):
        want = 0.25 if "@" in row["row"] else 0.5
        assert row["sparsity"] == pytest.approx(want, abs=1e-3)
        assert row.get("note") == ("weights moved" if row["row"] == "alps" else None)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_the_byte_decoder_learns_masks_too(tmp_path, loss):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran under the tree. " * 40)
    sizes: dict = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = language.Config(
        name="tiny",
        model=DecoderConfig(**sizes),
        rules=(("lm_head", "skip"),),
        dense_steps=3,
        batch_size=2,
        length=16,
        windows=4,
    )
    made = problems.bytes_decoder(
        tmp_path, path=text, loss=loss, config=config, calibration=4
    )
    budget = fh.Duration(3)
    table = comparison.Comparison(made, budget, tmp_path, learners=LEARNERS)
    row = table.row("wanda>maskllm")
    assert row["sparsity"] == 0.5
    assert row["validation"] <= table.row("wanda")["validation"] + 1e-6
    assert made.evaluate(made.params)["bits_per_byte"] > 0


def test_the_relative_optimiser_moves_every_array_by_its_rate():
    tx = fh.relative(0.5)
    params = {"a": np.zeros(8, np.float32), "b": np.zeros((2, 3), np.float32)}
    grads = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) * 1e-4, params)
    updates, _ = tx.update(grads, tx.init(params))
    for x in jax.tree.leaves(updates):
        assert float(np.sqrt(np.mean(np.square(x)))) == pytest.approx(1, rel=1e-5)


def test_proxsparse_and_bad_learners_are_refused(problem):
    with pytest.raises(ValueError, match="does not start from masks"):
        started_at(fh.ProxSparse(), {}, {})
    with pytest.raises(ValueError, match="need a positive rate"):
        Learner(fh.MaskLLM(), 0.0)
    with pytest.raises(ValueError, match="known: adam, relative, sgd"):
        Learner(fh.MaskLLM(), 1.0, "lion")  # type: ignore[arg-type]
