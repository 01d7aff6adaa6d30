"""`flexhinm eval` and `flexhinm generate` on tiny directories."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from flexhinm_jax import models
from flexhinm_jax.cli import console
from flexhinm_jax.cli.main import main
from flexhinm_jax.models import decoder, evaluation
from flexhinm_jax.models.decoder import DecoderConfig
from tests.models import directories

CONFIG = directories.QWEN2 | {"max_position_embeddings": 16, "num_hidden_layers": 1}
TEXT = "one déjà-vu,\ntwo déjà-vus"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense directory in two shards, one with zeros, and a text."""
    root = tmp_path_factory.mktemp("models")
    params = directories.make_decoder_directory(root / "dense", CONFIG, shards=2)
    shutil.copytree(root / "dense", root / "pruned")
    for path in (root / "pruned").glob("*.safetensors*"):
        path.unlink()
    sparse = {
        k: np.where(np.arange(x.shape[-1]) % 2, x, 0).astype(x.dtype)
        if k.startswith("model.layers") and x.ndim == 2
        else x
        for k, x in params.items()
    }
    directories.write_weights(root / "pruned" / "model.safetensors", sparse)
    (root / "text.txt").write_text(TEXT, newline="")
    return root


@jax.jit
def logits(params, tokens):
    return decoder.apply(params, tokens, DecoderConfig.from_dict(CONFIG))


def by_hand(folder, length, stride):
    """Nats of all tokens but the first, one at a time, each with its own context."""
    model = models.load(folder)
    tokens = model.tokenizer.encode(TEXT).ids
    total = 0.0
    for target in range(1, len(tokens)):
        # The first window whose inputs reach the token before the target.
        k = max(0, math.ceil((target - length) / stride))
        context = tokens[k * stride : target]
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(context)] = context
        found = np.asarray(logits(model.params, padded)[0, len(context) - 1], float)
        total += np.log(np.exp(found).sum()) - found[tokens[target]]
    return total, len(tokens) - 1


def run(capsys, *args):
    assert main([str(a) for a in (*args, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *args):
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_perplexity_beyond_all_numbers_is_infinite():
    lost = evaluation.Perplexity(nats=8000.0, tokens=10, bytes=9, length=4, stride=4)
    assert lost.perplexity == math.inf and lost.bits_per_byte > 1000


def test_perplexity_is_that_of_every_token_with_its_own_window(folders, capsys):
    text = ["--text", folders / "text.txt"]
    options = ["--length", 8, "--stride", 5, "--batch-size", 3]
    found = run(capsys, "eval", folders / "dense", folders / "pruned", *text, *options)
    for row, name, zeros in zip(
        found["models"], ("dense", "pruned"), (0, 0.5), strict=True
    ):
        nats, count = by_hand(folders / name, 8, 5)
        assert row["tokens"] == count == len(TEXT.encode())
        assert row["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        # A token of this tokenizer is a byte, and "<s>" stands before the first.
        assert row["bits_per_byte"] == pytest.approx(nats / count / math.log(2), 1e-4)
        assert row["zeros"] == pytest.approx(zeros, abs=0.02)
        assert (row["length"], row["stride"]) == (8, 5)


def test_an_end_that_the_tokenizer_adds_takes_no_bytes(folders, tmp_path, capsys):
    shutil.copytree(folders / "dense", tmp_path / "ends")
    path = tmp_path / "ends" / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    ends = [("<s>", directories.BYTES), ("</s>", directories.BYTES + 1)]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=ends
    )
    made.save(str(path))
    text = ["--text", folders / "text.txt", "--length", 8]
    (row,) = run(capsys, "eval", tmp_path / "ends", *text)["models"]
    assert row["bytes"] == len(TEXT.encode()) == row["tokens"] - 1


def test_predictions_of_two_models_are_compared_token_by_token(folders, capsys):
    paths = folders / "dense", folders / "pruned"
    text = ["--text", folders / "text.txt"]
    options = ["--length", 8, "--batch-size", 3, "--limit", 13]
    compared = run(capsys, "eval", *paths, *text, *options, "--kl")
    plain = run(capsys, "eval", *paths, *text, *options)
    for with_kl, alone in zip(compared["models"], plain["models"], strict=True):
        assert with_kl["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
        assert with_kl["stored_bytes"] == alone["stored_bytes"]
    tokens = models.load(paths[0]).tokenizer.encode(TEXT).ids[:13]
    p, q = (
        np.concatenate(
            [
                jax.nn.log_softmax(
                    np.asarray(
                        logits(model.params, padded(part))[0, : len(part)], float
                    )
                )
                for part in (tokens[:8], tokens[8:12])
            ]
        )
        for model in map(models.load, paths)
    )
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    assert compared["kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    assert compared["same_top"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    both = [str(path) for path in paths]
    assert main(["eval", *both, *map(str, (*text, *options)), "--kl"]) == 0
    assert f"KL {kl:.4f} nats a token" in capsys.readouterr().out
    assert "give OTHER too" in refused(capsys, "eval", paths[0], *text, "--kl")


def padded(part):
    """One window of tokens, filled up to what the model reads."""
    window = np.zeros((1, 16), np.int32)
    window[0, : len(part)] = part
    return window


def test_the_table_shows_dense_beside_pruned(folders, capsys):
    text = ["--text", str(folders / "text.txt"), "--limit", "12"]
    assert main(["eval", str(folders / "dense"), str(folders / "pruned"), *text]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "perplexity" in out[0] and "bits per byte" in out[0]
    assert "dense" in out[1] and "pruned" in out[2] and "11" in out[1]
    assert out[3] == "windows of 11 tokens, one every 11"


@pytest.mark.parametrize("count", [2, 5, 8, 9, 20, 21])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 4), (8, 3), (8, 8)])
def test_windows_score_every_target_once_with_what_is_before_it(count, length, stride):
    tokens = np.arange(count, dtype=np.int32) * 3
    inputs, targets, scored = evaluation.windows(tokens, length, stride)
    np.testing.assert_array_equal(targets[scored], tokens[1:])
    np.testing.assert_array_equal(inputs[scored] + 3, targets[scored])
    # Inputs up to a scored one are consecutive: its context has no holes.
    for row, mask in zip(inputs, scored, strict=True):
        last = np.flatnonzero(mask)[-1]
        assert np.all(np.diff(row[: last + 1]) == 3)
    if len(inputs) > 1:
        lookback = np.argmax(scored[1:], 1) + 1
        assert lookback.min() >= length - stride + 1


def test_embeddings_of_two_encoders_are_compared(
    model_dir, text_file, capsys, monkeypatch
):
    other = model_dir.parent / "other"
    shutil.copytree(model_dir, other)
    path = other / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    table = "embeddings.word_embeddings.weight"
    stored[table] = stored[table] * (np.abs(stored[table]) > 0.015)
    directories.write_weights(path, stored)
    found = run(capsys, "eval", model_dir, other, "--text", text_file)
    assert found["lines"] == 3
    assert 0.5 < found["lowest"] <= found["quantile_5"] < found["mean_cosine"] < 0.999
    assert "give OTHER too" in refused(capsys, "eval", model_dir, "--text", text_file)
    both = (model_dir, other, "--text", text_file)
    assert "--kl has no use" in refused(capsys, "eval", *both, "--kl")
    monkeypatch.setattr(console, "SHORT_SECONDS", 0.0)
    assert main(["eval", *map(str, both), "--batch-size", "2"]) == 0
    out, err = capsys.readouterr()
    assert f"{model_dir.name}: 1 of 2 (50 %)" in err and "other: 2 of 2" in err
    assert out.splitlines()[1].split()[:2] == [model_dir.name, "other"]


def test_generation_prints_the_likeliest_continuation(folders, capsys):
    prompt = ["--prompt", "hé", "--tokens", "4"]
    found = run(capsys, "generate", folders / "dense", *prompt)
    model = models.load(folders / "dense")
    tokens = model.tokenizer.encode("hé").ids
    for new in found["tokens"]:
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        assert int(jnp.argmax(logits(model.params, padded)[0, len(tokens) - 1])) == new
        tokens.append(new)
    assert len(found["tokens"]) == 4 or found["ended"]
    assert main(["generate", str(folders / "dense"), *prompt]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"


@pytest.fixture(scope="module")
def packed(folders):
    """What `prune --pack` writes, with its zeros in other places than those above."""
    out = folders / "packed"
    arguments = ["--method", "magnitude", "--pack", "--length", 8, "--out", out, "-q"]
    arguments += ["--calibration", folders / "text.txt"]
    assert main([str(a) for a in ("prune", folders / "dense", *arguments)]) == 0
    return out


def test_packed_weights_run_beside_dense_ones(folders, packed, capsys):
    text = ["--text", folders / "text.txt", "--packed"]
    rows = run(capsys, "eval", packed, *text)["models"]
    assert [row["packed"] for row in rows] == [False, True]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-4)
    assert rows[0]["zeros"] == rows[1]["zeros"] == pytest.approx(0.5, abs=0.01)
    assert rows[1]["stored_bytes"] < rows[0]["stored_bytes"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    rows = run(capsys, "eval", folders / "dense", packed, *text)["models"]
    assert [row["packed"] for row in rows] == [False, True] and rows[0]["zeros"] < 0.1
    assert main([str(a) for a in ("eval", packed, *text)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("tokens per second")
    assert out[2].startswith(f"{packed.name} packed ")
    told = refused(capsys, "eval", folders / "dense", *text)
    assert "dense holds no packed weights" in told and "with --pack" in told


def test_packed_weights_are_compared_token_by_token_with_bytes_and_speed(
    folders, packed, capsys
):
    text = ["--text", folders / "text.txt", "--packed", "--kl"]
    found = run(capsys, "eval", packed, *text)
    assert abs(found["kl"]) < 1e-4 and found["same_top"] > 0.99
    dense, sparse = found["models"]
    assert sparse["packed"] and sparse["stored_bytes"] < dense["stored_bytes"]
    assert dense["tokens_per_second"] > 0 and sparse["tokens_per_second"] > 0
    assert main([str(a) for a in ("eval", packed, *text)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[-4:] == ["bytes", "tokens", "per", "second"]


def test_packed_values_in_eight_bits_run(folders, packed, capsys):
    out = folders / "int8"
    arguments = ["--method", "magnitude", "--length", 8, "--out", out, "-q"]
    arguments += ["--calibration", folders / "text.txt", "--pack-values", "int8"]
    base = ["prune", folders / "dense", *arguments]
    assert main([str(a) for a in base]) == 2
    assert "--pack-values says what --pack writes" in capsys.readouterr().err
    assert main([str(a) for a in (*base, "--pack")]) == 0
    text = ["--text", folders / "text.txt", "--packed"]
    rows = run(capsys, "eval", out, *text)["models"]
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.01)
    wide = run(capsys, "eval", packed, *text)["models"]
    assert rows[1]["stored_bytes"] < wide[1]["stored_bytes"]
    found = run(capsys, "generate", out, "--prompt", "h", "--tokens", "4", "--packed")
    assert found["packed"]


def test_packed_weights_generate_what_dense_ones_do(packed, capsys):
    prompt = ["--prompt", "hé", "--tokens", "4", "--packed"]
    found = run(capsys, "generate", packed, *prompt)
    assert found["packed"] and not found["dense"]["packed"]
    assert found["tokens"] == found["dense"]["tokens"]
    assert found["stored_bytes"] < found["dense"]["stored_bytes"]
    assert main([str(a) for a in ("generate", packed, *prompt)]) == 0
    out = capsys.readouterr().out
    assert "(packed: " in out and "(dense: " in out and "tokens per second)" in out


def test_bad_options_are_refused_in_one_line(folders, capsys, tmp_path):
    dense, text = folders / "dense", ["--text", folders / "text.txt"]

    def evaluated(*args):
        return refused(capsys, "eval", dense, *args)

    assert "nothing.txt is not a file" in evaluated("--text", tmp_path / "nothing.txt")
    assert "windows of 17 tokens are more than" in evaluated(*text, "--length", 17)
    assert "a stride of 9 is more than windows of 8" in evaluated(
        *text, "--length", 8, "--stride", 9
    )
    assert "the text has 1 tokens; at least 2" in evaluated(*text, "--limit", 1)
    (tmp_path / "empty.txt").write_text("")
    assert "has no text; give a text" in evaluated("--text", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "is not UTF-8 text" in evaluated("--text", tmp_path / "latin.txt")
    assert "is not UTF-8" in refused(capsys, "generate", dense, "--prompt", "\udcff")
    told = refused(capsys, "generate", dense, "--prompt", "a" * 14, "--tokens", 2)
    assert "prompt of 15 tokens and 2 new ones are more than max_position" in told
    assert "take fewer --tokens" in told
    told = refused(
        capsys, "generate", dense, "--prompt", "a", "--tokens", 2, "--top-k", 2
    )
    assert "--top-k 2 has no use at temperature 0" in told
    with pytest.raises(SystemExit):
        main(["generate", str(dense), "--prompt", "a", "--tokens", "0"])
    assert "argument --tokens: 0 is not at least 1" in capsys.readouterr().err


def test_a_decoder_and_an_encoder_are_not_compared(folders, model_dir, capsys):
    told = refused(
        capsys, "eval", folders / "dense", model_dir, "--text", folders / "text.txt"
    )
    assert "give two of a kind" in told


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of the pruned directory, to be damaged."""
    shutil.copytree(folders / "pruned", tmp_path / "broken")
    return tmp_path / "broken"


def damage(folder, **changes):
    """Rewrites config.json with some fields changed."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def weights_damaged(folder, change):
    path = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    change(stored)
    directories.write_weights(path, stored)


LAST = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: damage(f, model_type="gpt2"), "model_type='gpt2' is not supported"),
        (lambda f: damage(f, hidden_act="relu"), "config.json: hidden_act='relu'"),
        (lambda f: damage(f, num_hidden_layers=2), "missing model.layers.1.input_l"),
        (lambda f: damage(f, intermediate_size=63), "the configuration gives (63, 32)"),
        (
            lambda f: (
                damage(f, vocab_size=200)
                or weights_damaged(
                    f,
                    lambda s: s.update(
                        {k: x[:200] for k, x in s.items() if "embed_tokens" in k}
                    ),
                )
            ),
            "vocab_size=200; they belong to different models",
        ),
        (
            lambda f: weights_damaged(f, lambda s: s.pop(LAST)),
            f"missing {LAST}; not known none",
        ),
        (
            lambda f: weights_damaged(
                f, lambda s: s.update(extra=np.zeros(2, np.float32))
            ),
            "missing none; not known extra",
        ),
        (
            lambda f: weights_damaged(f, lambda s: s[LAST].fill(np.nan)),
            f"NaN or infinity in {LAST}",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (
            lambda f: (f / "generation_config.json").write_text("[]"),
            "generation_config.json holds a list, not a JSON object",
        ),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(
    broken, folders, capsys, change, message
):
    change(broken)
    assert message in refused(capsys, "eval", broken, "--text", folders / "text.txt")
