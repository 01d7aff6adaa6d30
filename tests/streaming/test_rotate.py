"""Rotated directories hold the same function, and N:M keeps more of what counts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax.cli.main import main  # noqa: E402
from flexhinm_jax.models import load  # noqa: E402
from flexhinm_jax.models.basis import Basis, change  # noqa: E402
from flexhinm_jax.ops import gram as gram_ops  # noqa: E402
from flexhinm_jax.streaming import rotate as room  # noqa: E402
from flexhinm_jax.streaming.rotate import Learning, rotate  # noqa: E402
from tests.models import decoder_cases, directories  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 19, (4, 8)).astype(np.int32)
SHORT = Learning(steps=8, rate=0.02, blocks=2)
CASES = {
    "llama": directories.LLAMA2,
    "qwen2, tied, with biases": directories.QWEN2,
    "gemma3, heads alone": decoder_cases.GEMMA3
    | {"vocab_size": directories.VOCABULARY},
    "qwen3 with experts": decoder_cases.QWEN3_MOE
    | {"vocab_size": directories.VOCABULARY},
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_and_groups_keep_more(name, tmp_path):
    shards = 2 if "tied" in name else 1
    directories.make_decoder_directory(tmp_path / "dense", CASES[name], shards=shards)
    steps = []
    result = rotate(
        tmp_path / "dense",
        tmp_path / "out",
        TOKENS,
        jax.random.key(0),
        learning=SHORT,
        progress=lambda *done: steps.append(done),
    )
    one, other = load(tmp_path / "dense"), load(tmp_path / "out")
    total = one.config.num_hidden_layers
    assert steps == [(k + 1, total + 8) for k in range(total + 8)]
    turns = not one.config.sandwich_norms
    assert other.config.tie_word_embeddings == (
        one.config.tie_word_embeddings and not turns
    )
    got, want = (jax.jit(m.apply)(m.params, TOKENS) for m in (other, one))
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * float(np.abs(want).max()))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(one.params[key], other.params[key]) != turns
    gain = {k: result.after[k] - result.before[k] for k in result.before}
    assert gain["self_attn.o_proj"] > 2e-4 and min(gain.values()) > -1e-3, gain
    assert sum(gain.values()) > (5e-3 if turns else 2e-4), gain


def test_what_is_kept_is_counted_on_the_rotated_model(tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    directories.make_decoder_directory(dense, directories.LLAMA2)
    result = rotate(dense, out, TOKENS, jax.random.key(0), learning=SHORT)
    for folder, kept in ((dense, result.before), (out, result.after)):
        model = load(folder)
        # Costs do not change with the norms in the weights, but for what is damped.
        same = Basis(stream=jnp.eye(model.config.hidden_size))
        params, _ = change(model.params, model.config, same)
        uses = fh.discover(model.apply, params, TOKENS)
        stats = fh.calibrate(model.apply, params, uses, [(TOKENS,)])
        for name, value in kept.items():
            losses = []
            for layer in range(model.config.num_hidden_layers):
                path = f"model.layers.{layer}.{name}.weight"
                w = np.asarray(params[path], np.float64)
                gram = np.asarray(stats[path].gram, np.float64) / TOKENS.size
                damped = gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
                costs = w**2 / np.diagonal(np.linalg.inv(damped))
                groups = np.sort(costs.reshape(len(costs), -1, 4), -1)
                losses.append(groups[..., :2].sum() / np.trace(w @ gram @ w.T))
            assert 1 - value == pytest.approx(np.mean(losses), rel=0.02), name


def test_a_direction_is_the_slope_along_the_group():
    key = jax.random.key(1)
    w = jax.random.normal(key, (6, 8))
    x = jax.random.normal(jax.random.fold_in(key, 1), (32, 8))
    gram, name = x.T @ x / 32, "mlp.up_proj.weight"
    weights = {name: w}
    inputs = {name: room.Inputs(room.inverse(gram), gram_ops.energy(w, gram))}
    stream = room.cayley(
        room.skew(jax.random.normal(jax.random.fold_in(key, 2), (8, 8)))
    )
    np.testing.assert_allclose(stream.T @ stream, np.eye(8), atol=1e-5)
    heads = jnp.zeros((1, 2, 2), jnp.float32)
    slope, _ = room.ascent(stream, heads, weights, inputs, (2, 4))

    def lost(step):
        turned = stream @ room.cayley(step)
        (kept,) = room.shares(turned, heads, weights, inputs, (2, 4)).values()
        return -float(kept)

    assert lost(-0.05 * slope) < lost(0 * slope) < lost(0.05 * slope)
    direction = room.skew(jax.random.normal(jax.random.fold_in(key, 3), (8, 8)))
    numeric = (lost(1e-2 * direction) - lost(-1e-2 * direction)) / 2e-2
    assert numeric == pytest.approx(float(jnp.sum(slope * direction)), rel=0.05)


def test_bad_groups_are_refused(tmp_path):
    directories.make_decoder_directory(tmp_path / "dense", directories.LLAMA2)
    with pytest.raises(ValueError, match="2:3 does not divide the 32 channels"):
        rotate(tmp_path / "dense", tmp_path / "out", TOKENS, jax.random.key(0), m=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": float("nan")}, "rate=nan: need a number"),
        ({"rate": -1.0}, "rate=-1.0: need a positive number"),
        ({"steps": 0}, "steps=0: need an integer of at least 1"),
        ({"blocks": 0}, "blocks=0: need an integer of at least 1"),
    ],
)
def test_wrong_numbers_of_learning_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Learning(**wrong)


def test_the_command_writes_a_directory_and_says_what_it_gained(tmp_path, capsys):
    dense, out = tmp_path / "dense", tmp_path / "out"
    directories.make_decoder_directory(dense, directories.LLAMA2)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is not. " * 9)
    line = ["rotate", str(dense), "--out", str(out), "--calibration", str(text)]
    line += ["--length", "16", "--samples", "4", "--steps", "2", "--json", "-q"]
    assert main(line) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert len(kept) == 7 and all(x["after"] > 0 for x in kept.values())
    assert (out / "tokenizer.json").exists()
