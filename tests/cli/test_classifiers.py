"""`flexhinm prune`, `learn`, `eval` and `inspect` of classifiers of images."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")
from flexhinm_jax import models  # noqa: E402
from flexhinm_jax.cli.main import main  # noqa: E402
from flexhinm_jax.io import huggingface  # noqa: E402
from tests.models import encoder_cases  # noqa: E402

#: Few shapes, so that little is compiled.
DEIT = encoder_cases.CASES["deit, distilled"] | {"intermediate_size": 16}
VIT = encoder_cases.CASES["vit"] | {"intermediate_size": 16}
RESNET = encoder_cases.CASES["resnet"] | {"hidden_sizes": [16, 16], "depths": [1, 1]}

IN_ORDER = ("--sequential", "--method", "sparsegpt")


@pytest.fixture
def folder(tmp_path, case):
    """A model directory beside six images."""
    encoder_cases.write(tmp_path / "model", case)
    side = case.get("image_size", 16)
    pixels = np.random.RandomState(0).normal(size=(6, 3, side, side))
    np.save(tmp_path / "pixels.npy", pixels.astype(np.float32))
    return tmp_path


def run(folder, command, *options):
    paths = [folder / "model"] + ([folder / "out"] if command == "eval" else [])
    return main([str(x) for x in (command, *paths, *options)])


@pytest.mark.parametrize(
    ("case", "order"),
    [
        (DEIT, ()),
        (DEIT, IN_ORDER),
        (RESNET, ()),
    ],
)
def test_a_classifier_is_pruned_and_compared(folder, case, order, capsys):
    pixels = folder / "pixels.npy"
    options = ["--method", "wanda", *order, "--calibration", pixels, "--eval", pixels]
    options += ["--batch-size", 4, "--out", folder / "out", "--json"]
    assert run(folder, "prune", *options) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == 6 and document["evaluation"]["count"] == 6
    before = huggingface.read(folder / "model").params
    after = huggingface.read(folder / "out").params
    pruned = {row["path"] for row in document["weights"]}
    rest = {k for k, x in before.items() if x.ndim > 1} - pruned
    kept = ("embedd", "classifier")  # what reads the pixels and what gives the classes
    assert pruned and all(any(word in k for word in kept) for k in rest)
    for name in pruned:
        # Groups of 4 input channels: the second axis, in torch's layout.
        groups = np.moveaxis(after[name], 1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all(), name
    for name in before.keys() - pruned:
        if not (order and name.endswith("bias")):  # in order, biases make up for shifts
            np.testing.assert_array_equal(after[name], before[name])

    model = models.load(folder / "out")
    packed = models.load(folder / "out", packed=True)
    images = np.load(pixels)
    want = np.asarray(jax.jit(model.apply)(model.params, images))
    got = np.asarray(jax.jit(packed.apply)(packed.params, images))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    dense = models.load(folder / "model")
    first = np.asarray(jax.jit(dense.apply)(dense.params, images))
    same = np.mean(first.argmax(-1) == want.argmax(-1))
    assert document["evaluation"]["same_class"] == pytest.approx(same)
    assert "the same class in" in (folder / "out" / "README.md").read_text()
    assert model.zeros == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("case", [VIT])
def test_a_rule_takes_the_classifier_back(folder, case, capsys):
    options = ["--method", "magnitude", "--rule", "classifier=prune", "--json"]
    assert run(folder, "prune", *options, "--out", folder / "out") == 0
    rows = json.loads(capsys.readouterr().out)["weights"]
    assert "classifier.weight" in {row["path"] for row in rows}


@pytest.mark.parametrize("case", [VIT])
def test_inspect_says_what_stays(folder, case, capsys):
    assert run(folder, "inspect", "--json") == 0
    leaves = {x["path"]: x for x in json.loads(capsys.readouterr().out)["leaves"]}
    assert "skipped by rule" in leaves["classifier.weight"]["reason"]
    at = "vit.embeddings.patch_embeddings.projection.weight"
    assert "skipped by rule" in leaves[at]["reason"]
    assert leaves["vit.encoder.layer.0.output.dense.weight"]["prunable"]


@pytest.mark.parametrize("case", [VIT])
def test_masks_of_a_classifier_are_learned(folder, case, capsys):
    options = ["--calibration", folder / "pixels.npy", "--steps", 2, "--batch-size", 2]
    assert run(folder, "learn", *options, "--out", folder / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == 6
    assert document["total"]["zeros"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("case", [VIT])
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("prune", ["--out", "o"], "no images are bundled; give a folder of images"),
        ("prune", ["--out", "o", "--max-length", "8"], "--max-length is for text"),
        ("prune", ["--out", "o", "--samples", "8"], "--samples is for decoders"),
        ("eval", ["--text", "t.txt"], "t.txt is no folder and no .npy file"),
        ("eval", ["--images", "x", "--length", "3"], "--length is for text"),
        ("eval", ["--images", "x", "--kl"], "--kl has no use for encoders"),
    ],
)
def test_what_is_for_other_models_is_refused(folder, command, options, message, capsys):
    if command == "eval":
        encoder_cases.write(folder / "out", VIT)
    assert run(folder, command, *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("case", [VIT])
def test_models_that_read_different_things_are_not_compared(folder, case, capsys):
    encoder_cases.write(folder / "out", encoder_cases.CASES["roberta"])
    assert run(folder, "eval", "--images", folder / "pixels.npy") == 2
    assert "give two of a kind" in capsys.readouterr().err
