"""lm-evaluation-harness itself on a local task, with a tiny model."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax.models import harness  # noqa: E402
from flexhinm_jax.models.load import ENCODER  # noqa: E402
from tests.models import directories  # noqa: E402

CONFIG = directories.QWEN2 | {"num_hidden_layers": 1, "max_position_embeddings": 40}
ROWS = [
    {"question": "the cat sat on the", "choices": [" mat", " tree"], "answer": 0},
    {"question": "a dog", "choices": [" ran", " slept well"], "answer": 1},
    {"question": "under", "choices": [" a tree", " it"], "answer": 0},
]
TASK = """\
task: toy
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "model"
    directories.make_decoder_directory(folder, CONFIG)
    return fh.models.load(folder)


apply = functools.partial(jax.jit, static_argnums=0)(lambda f, params, x: f(params, x))


def last_logits(model, tokens):
    """Of a forward pass over the tokens and, one program for all, zeros behind them."""
    padded = jnp.asarray([tokens + [0] * (40 - len(tokens))], jnp.int32)
    return np.asarray(
        apply(model.apply, model.params, padded)[0, len(tokens) - 1], float
    )


def by_hand(model, context, text):
    """(nats, greedy) of the last tokens, each from a forward pass of its own."""
    tokens, total, greedy = [*context], 0.0, True
    for token in text:
        logits = last_logits(model, tokens)
        total += logits[token] - np.log(np.exp(logits).sum())
        greedy &= int(logits.argmax()) == token
        tokens.append(token)
    return total, greedy


def test_likelihoods_are_those_of_one_token_after_the_other(model):
    best = by_hand_best(model, [1, 2, 3])
    pairs = [([1, 2, 3], [4, 5]), ([7], [8]), ([1, 2, 3], [best]), ([9] * 5, [1] * 9)]
    for (context, text), (nats, greedy) in zip(
        pairs, harness.likelihoods(model, pairs, batch=3), strict=True
    ):
        want = by_hand(model, context, text)
        assert nats == pytest.approx(want[0], rel=1e-4) and greedy == want[1]
    assert harness.likelihoods(model, pairs)[2][1]


def by_hand_best(model, tokens):
    return int(last_logits(model, tokens).argmax())


def test_a_context_that_does_not_fit_is_cut_at_its_beginning(model):
    (got,) = harness.likelihoods(model, [(list(range(60)), [1, 2])])
    assert got[0] == pytest.approx(by_hand(model, range(21, 60), [1, 2])[0], rel=1e-4)


def test_continuations_are_greedy_up_to_a_stop(model):
    tokens = model.tokenizer.encode("the cat").ids
    options = {"until": [], "max_gen_toks": 5}
    text = harness.continuations(model, tokens, options)
    new, context = [], list(tokens)
    while len(new) < 5 and (not new or new[-1] not in model.ends):
        new.append(by_hand_best(model, [*context, *new]))
    new = [x for x in new if x not in model.ends]
    whole = model.tokenizer.decode([*tokens, *new])
    assert text == whole.removeprefix(model.tokenizer.decode(tokens))
    if len(text) > 1:
        options["until"] = [text[1]]
        assert text.startswith(harness.continuations(model, tokens, options))
    with pytest.raises(ValueError, match="do_sample: false"):
        harness.continuations(model, tokens, {"do_sample": True})


def test_an_encoder_and_a_missing_package_are_named(model, monkeypatch):
    other = dataclasses.replace(model, kind=ENCODER)
    with pytest.raises(ValueError, match="is an encoder"):
        harness.adapter(other)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"flexhinm_jax\[eval\]"):
        harness.adapter(model)


@pytest.mark.slow
def test_the_harness_scores_a_local_task(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "toy.yaml").write_text(TASK.format(rows=rows))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=harness.adapter(model, batch=2),
        tasks=["toy"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    right = 0
    for row in ROWS:
        context = model.tokenizer.encode(row["question"]).ids
        scores = []
        for choice in row["choices"]:
            whole = model.tokenizer.encode(row["question"] + choice).ids
            scores.append(by_hand(model, context, whole[len(context) :])[0])
        right += int(np.argmax(scores)) == row["answer"]
    assert found["results"]["toy"]["acc,none"] == pytest.approx(right / len(ROWS))
