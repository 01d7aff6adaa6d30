"""`flexhinm tune`: the same zeros and packed positions, new values, a better model."""

import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax import kernels
from flexhinm_jax.cli import console, recipe, tune
from flexhinm_jax.cli.main import main
from flexhinm_jax.io import huggingface, packed
from flexhinm_jax.models.load import load
from tests.models.directories import QWEN3, make_decoder_directory

TEXT = "the cat sat on the mat, a dog ran under a tree. " * 8
SMALL = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8}


def run(*args):
    return main([str(arg) for arg in args])


def dense_of(leaf):
    return kernels.unpack(leaf) if hasattr(leaf, "nm_values") else leaf


def test_a_decoder_predicts_more_like_the_dense_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "SHORT_SECONDS", 0)
    dense, pruned, out = (tmp_path / name for name in ("dense", "pruned", "tuned"))
    untied = {"num_key_value_heads": 4, "tie_word_embeddings": False}
    make_decoder_directory(dense, QWEN3 | SMALL | untied, 0, 1)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    shared = ["--calibration", text, "--length", 16, "--samples", 8]
    pattern = ["--pattern", "flexhinm:v=8,permute=none", "--sparsity", 0.5]
    prune = ["prune", dense, "--out", pruned, "--method", "magnitude", "--pack"]
    assert run(*prune, *pattern, *shared) == 0
    tune = ["tune", dense, pruned, "--out", out, "--steps", 12, "--rate", 3e-3]
    assert run(*tune, *shared, "--resume", tmp_path / "saves") == 0
    told, err = capsys.readouterr()
    assert "loss on held-back data" in told and "training for 12 steps" in err

    before, after = huggingface.read(pruned).params, huggingface.read(out).params
    moved = [k for k in before if not np.array_equal(before[k], after[k])]
    assert "model.norm.weight" in moved and "model.embed_tokens.weight" not in moved
    assert "lm_head.weight" in before and "lm_head.weight" not in moved
    for key in before:
        if before[key].ndim > 1:
            np.testing.assert_array_equal(before[key] == 0, after[key] == 0)
    for file in sorted((out / "packed").glob("*")):
        for path, leaf in packed.read_packed(file).items():
            assert (dense_of(leaf) == after[path]).all()
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    sparse, zeros = load(out, packed=True), load(out)
    np.testing.assert_allclose(
        sparse.apply(sparse.params, tokens),
        zeros.apply(zeros.params, tokens),
        atol=1e-5,
    )
    report = json.loads((out / "report.json").read_text())
    assert report["tuned"]["after"] < report["tuned"]["before"]
    commands, card = report["commands"], (out / "README.md").read_text()
    assert [c.split()[1] for c in commands] == ["prune", "tune"]
    assert report["weights"] and "\n".join(["```", *commands, "```"]) in card
    assert "biases and norms among them were trained" in card
    text = (out / "recipe.yaml").read_text()
    assert text.startswith("# Of the model before it was tuned;")
    assert text.endswith((pruned / "recipe.yaml").read_text())
    assert recipe.options(out / "recipe.yaml") == recipe.options(pruned / "recipe.yaml")


def test_an_encoder_is_tuned_by_the_angle_of_its_outputs(
    model_dir, text_file, tmp_path, capsys
):
    pruned, out = tmp_path / "pruned", tmp_path / "tuned"
    shared = ["--calibration", text_file]
    assert run("prune", model_dir, "--out", pruned, "--method", "magnitude") == 0
    options = ["--steps", 4, "--rate", 1e-3, "--json", *shared]
    capsys.readouterr()
    assert run("tune", model_dir, pruned, "--out", out, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["after"] <= told["before"] < 1
    assert (told["note"] is None) == (told["after"] < told["before"])
    leaves = packed.read_packed(out / "packed.safetensors")
    stored = huggingface.read(out).params
    assert all((dense_of(leaf) == stored[k]).all() for k, leaf in leaves.items())


def test_values_of_eight_bits_are_refused_before_the_training(
    model_dir, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tune, "tune", None)
    pruned, out = tmp_path / "pruned", tmp_path / "tuned"
    prune = ["prune", model_dir, "--out", pruned, "--method", "magnitude"]
    assert run(*prune, "--pack-values", "int8") == 0
    assert run("tune", model_dir, pruned, "--out", out, "--calibration", text_file) == 2
    told = capsys.readouterr().err
    assert f"{pruned}, encoder.layer.0" in told and "pack the trained weights" in told
    assert not out.exists()


def test_what_cannot_be_written_is_refused_before_the_training(
    model_dir, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tune, "tune", None)
    command = ["tune", model_dir, model_dir, "--out", tmp_path / "out"]
    (model_dir / "report.json").write_text("[]")
    assert run(*command, "--calibration", text_file) == 2
    assert "report.json holds a list, not a JSON object" in capsys.readouterr().err
    (model_dir / "report.json").unlink()
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(*command, "--calibration", text_file) == 2
    assert "are free on its disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0"], "--rate 0.0: need a positive number"),
        (["--length", "8"], "--length is for decoders"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    model_dir, tmp_path, capsys, options, message
):
    out = tmp_path / "out"
    assert run("tune", model_dir, model_dir, "--out", out, *options) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_what_rules_left_alone_stays(tmp_path, capsys):
    dense, pruned, out = (tmp_path / name for name in ("dense", "pruned", "tuned"))
    make_decoder_directory(dense, QWEN3 | SMALL, 0, 1)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    shared = ["--calibration", text, "--length", 16, "--samples", 8]
    prune = ["prune", dense, "--out", pruned, "--method", "magnitude", *shared]
    assert run(*prune, "--rule", "mlp=skip") == 0
    swapped = ["tune", pruned, dense, "--out", out, "--steps", 4, *shared]
    assert run(*swapped) == 2
    assert "give the pruned parameters, then the dense" in capsys.readouterr().err
    inside = ["--resume", pruned / "saves"]
    assert run("tune", dense, pruned, "--out", out, *shared, *inside) == 2
    assert f"lies in {pruned}" in capsys.readouterr().err
    steps = ["--steps", 4, "--rate", 1e-2]
    assert run("tune", dense, pruned, "--out", out, *shared, *steps) == 0
    before, after = huggingface.read(pruned).params, huggingface.read(out).params
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert any("self_attn.q_proj" in k for k in moved)
    assert any("norm" in k for k in moved)
    assert not any("mlp" in k or "embed" in k for k in moved)


def test_a_model_pruned_from_another_is_refused_by_name(
    made, model_dir, tmp_path, capsys
):
    assert run("tune", model_dir, made / "64", "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"{made / '64'} is not a pruned form of {model_dir}" in told
