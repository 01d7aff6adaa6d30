import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.cli.main import main
from flexhinm_jax.io import huggingface, packed
from flexhinm_jax.methods import RefineMask
from flexhinm_jax.ops import masks
from tests.models.directories import QWEN3, make_decoder_directory

FLAGS = ("--pattern", "2:4", "--steps", 4, "--batch-size", 2, "--max-length", 8)
FLAGS += ("--rule", r"layer\.1\.|attention=skip")


@pytest.fixture
def text_file(tmp_path):
    words = "the a cat dog sat ran on under mat tree fast slow".split()
    generator = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    lines = [" ".join(generator.choice(words, 5)) for _ in range(8)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def learn(model_dir, text_file, tmp_path):
    def run(*extra, out="out"):
        args = ["learn", model_dir, "--calibration", text_file, "--out", tmp_path / out]
        return main([str(arg) for arg in (*args, *FLAGS, *extra)])

    return run


def error_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flexhinm: error: ") and err.count("\n") == 1, err
    return err


def test_learned_masks_keep_the_weights_and_are_never_worse_than_the_first(
    learn, model_dir, tmp_path, capsys
):
    assert learn("--json", "--rate", "0.05", "--start", "own") == 0
    document = json.loads(capsys.readouterr().out)
    folder = tmp_path / "out"
    assert document == json.loads((folder / "report.json").read_text())
    before = huggingface.read(model_dir).params
    after = huggingface.read(folder).params
    twin = packed.read_packed(folder / "packed.safetensors")
    assert twin.keys() == before.keys()
    changed = [p for p in before if not np.array_equal(before[p], after[p])]
    assert len(changed) == len(document["weights"]) == 2
    for path in changed:
        kept = after[path] != 0
        np.testing.assert_array_equal(kept.reshape(-1, 4).sum(1), 2)
        np.testing.assert_array_equal(after[path], np.where(kept, before[path], 0))
    assert document["validation"]["best"] <= document["validation"]["first"]
    assert len(document["history"]) == 5
    assert document["method"].startswith("MaskLLM(") and document["start"] is None


@pytest.mark.slow
def test_a_run_that_resumes_ends_with_the_same_masks(learn, tmp_path):
    saves = tmp_path / "saves"
    method = ("-q", "--start", "own", "--rate", "0.05", "--resume", saves)
    assert learn(*method) == 0
    newest = sorted(saves.iterdir())[-1]
    assert newest.is_dir()
    assert learn(*method, out="again") == 0
    a, b = (huggingface.read(tmp_path / out).params for out in ("out", "again"))
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


@pytest.mark.slow
def test_the_first_masks_can_be_those_of_another_method(learn, model_dir, tmp_path):
    assert learn("-q") == 0
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["start"] == repr(RefineMask(weights="dense"))
    assert learn("-q", "--force", "--start", "magnitude", "--rate", "1e-9") == 0
    before, after = (huggingface.read(d).params for d in (model_dir, tmp_path / "out"))
    path = "encoder.layer.0.intermediate.dense.weight"
    want = masks.n_of_m(jax.numpy.abs(before[path]), n=2, m=4)
    np.testing.assert_array_equal(after[path] != 0, want)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("--rate", "0"), "--rate 0.0: need a positive number"),
        (
            ("--method", "proxsparse", "--start", "ria"),
            "begins with a start of its own",
        ),
        (("--start", "fisher"), "need a method that 'flexhinm prune' runs"),
        (("--sparsity", "0.7"), "sparsity"),
        (("--out", "{model}/x"), "one lies inside the other"),
        (("--method", "patch"), "Patch works with Tiles"),
        (("--method", "proxsparse", "--noise"), "proxsparse has no noise to add"),
    ],
)
def test_mistakes_end_in_one_line(learn, model_dir, capsys, extra, told):
    assert learn(*(x.format(model=model_dir) for x in extra)) == 2
    assert told in error_line(capsys)


def test_a_loss_that_is_not_finite_ends_in_one_line(learn, capsys):
    assert learn("--method", "proxsparse", "--rate", "1e30", "-q") == 2
    assert "loss or gradient is not finite" in error_line(capsys)


CONFIG = QWEN3 | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_a_decoder_is_learned_block_by_block(tmp_path, capsys):
    make_decoder_directory(tmp_path / "model", CONFIG)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, a dog ran under a tree. " * 6)
    arguments = ["learn", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2]
    arguments += ["--calibration", text, "--length", 16, "--samples", 8, "--pack"]
    arguments += ["--start", "own", "--rule", "self_attn=skip"]
    assert main([str(x) for x in arguments]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "planned memory for 8 samples of 16 tokens:"
    assert lines[-1].startswith("block 2/2: error 0.") and "left" in lines[-1]
    assert "loss of the blocks on held-back text: " in out
    assert "with packed/ and report.json" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["weights"]) == 2 * 3 and report["steps"] == 2
    assert len(report["validation"]) == 2 and (report["samples"], 16) == (8, 16)
    assert (report["window"], report["target"]) == ("block", "seq")
    after = huggingface.read(tmp_path / "out").params
    for row in report["weights"]:
        assert np.mean(after[row["path"]] == 0) == 0.5
    assert (tmp_path / "out" / "packed" / "block-00001.safetensors").is_file()
    assert "| steps | 2 |" in (tmp_path / "out" / "README.md").read_text()
    assert main([str(x) for x in (*arguments, "--force", "--limit", 3)]) == 2
    assert "--limit is for encoders; give --samples" in error_line(capsys)


def test_a_decoder_can_be_learned_whole(tmp_path, capsys):
    config = CONFIG | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    make_decoder_directory(tmp_path / "model", config)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, a dog ran under a tree. " * 6)
    line = ["learn", tmp_path / "model", "--out", tmp_path / "out", "--steps", 16]
    line += ["--calibration", text, "--length", 16, "--samples", 8, "--pack"]
    line += ["--start", "magnitude", "--rate", 1e-3, "--rule", "self_attn=skip"]
    line += ["--window", "model"]
    assert main([str(x) for x in line]) == 0
    told = capsys.readouterr().out
    assert " packed; " in told and "with packed.safetensors and report.json" in told
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = report["window"], report["samples"], report["length"]
    assert told == ("model", 8, 16) and "target" not in report
    # The head is no part of a block.
    names = {row["path"] for row in report["weights"]}
    assert names == {
        f"model.layers.0.mlp.{x}_proj.weight" for x in ("up", "gate", "down")
    }
    dense, sparse = (fh.models.load(tmp_path / x) for x in ("model", "out"))
    tokens = sparse.encode(text.read_text(), 8 * 16)[0].reshape(8, 1, 16)
    logs = [
        jax.nn.log_softmax(jnp.stack([m.apply(m.params, x) for x in tokens]))
        for m in (dense, sparse)
    ]
    each = jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), -1).mean((1, 2))
    first, best = report["validation"]["first"], report["validation"]["best"]
    # One of the eight samples judged.
    assert best < first and np.isclose(each, best, rtol=1e-3).any()
    packed = fh.models.load(tmp_path / "out", packed=True)
    assert jnp.allclose(
        packed.apply(packed.params, tokens[0]),
        sparse.apply(sparse.params, tokens[0]),
        atol=1e-5,
    )
    line.remove("--pack")
    line[line.index("--steps") + 1] = 1
    assert main([str(x) for x in (*line, "--force")]) == 0
    told = capsys.readouterr().out
    assert (
        "whole model" not in told
        and f"wrote {tmp_path / 'out'} with report.json" in told
    )
    assert not (tmp_path / "out" / "packed.safetensors").exists()
    for extra, wanted in (
        (("--memory", "1GiB"), "--memory is for masks that are learned block by block"),
        (("--method", "hyperprune"), "choose another method or leave --window model"),
    ):
        assert main([str(x) for x in (*line, "--force", *extra)]) == 2
        assert wanted in error_line(capsys)


def test_a_decoder_is_learned_by_a_method_with_a_loop_of_its_own(tmp_path, capsys):
    make_decoder_directory(tmp_path / "model", CONFIG | {"num_hidden_layers": 1})
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, a dog ran under a tree. " * 6)
    line = ["learn", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2]
    line += ["--method", "hyperprune", "--calibration", text, "--length", 16]
    line += ["--samples", 4, "--rule", "self_attn|up|gate=skip"]
    assert main([str(x) for x in line]) == 0
    out, _ = capsys.readouterr()
    assert "down_proj" in out and "held-back" not in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["validation"] == [[]] and report["total"]["zeros"] == 0.5


def test_options_of_decoders_and_their_methods_are_refused_for_encoders(learn, capsys):
    for extra, told in (
        (("--memory", "1GiB"), "--memory is for decoders; leave it out"),
        (("--target", "asym"), "--target is for decoders; leave it out"),
        (("--window", "part"), "--window is for decoders; leave it out"),
        (("--weights-rate", "1e-3"), "--weights-rate is for decoders; leave it out"),
        (("--method", "hyperprune"), "learns block by block, which is for decoders"),
    ):
        assert learn(*extra) == 2
        assert told in error_line(capsys)
