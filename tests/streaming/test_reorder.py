"""Reordered directories hold the same function and suit N:M groups better."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax import atomic  # noqa: E402
from flexhinm_jax.cli.main import main  # noqa: E402
from flexhinm_jax.models import load  # noqa: E402
from flexhinm_jax.streaming.reorder import reorder  # noqa: E402
from tests.models import decoder_cases, directories  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 19, (4, 8)).astype(np.int32)
CASES = {
    "llama": directories.LLAMA2,
    "qwen2, tied, with biases": directories.QWEN2,
    "qwen3 with experts": decoder_cases.QWEN3_MOE
    | {"vocab_size": directories.VOCABULARY},
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_and_groups_keep_more(name, tmp_path):
    directories.make_decoder_directory(tmp_path / "dense", CASES[name])
    steps = []
    result = reorder(
        tmp_path / "dense",
        tmp_path / "out",
        TOKENS,
        jax.random.key(0),
        progress=lambda *done: steps.append(done),
    )
    one, other = load(tmp_path / "dense"), load(tmp_path / "out")
    total = one.config.num_hidden_layers
    assert steps == [(k + 1, total) for k in range(total)]
    got, want = (jax.jit(m.apply)(m.params, TOKENS) for m in (other, one))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
    for group in result.groups:
        assert group.before <= group.after < 1, group
    assert result.mean("stream")[1] > result.mean("stream")[0]
    # Orders move numbers and make no new ones.
    for key, leaf in one.params.items():
        np.testing.assert_array_equal(
            np.sort(leaf, None), np.sort(other.params[key], None)
        )


def test_what_is_kept_is_counted_in_what_dropping_costs(tmp_path):
    dense = tmp_path / "dense"
    params = directories.make_decoder_directory(dense, directories.LLAMA2)
    model = load(dense)
    result = reorder(dense, tmp_path / "out", TOKENS, jax.random.key(0))
    names = [group.name for group in result.groups]
    assert names == ["0 heads", "0 inner", "1 heads", "1 inner", "stream"]
    down = "model.layers.0.mlp.down_proj.weight"
    uses = fh.discover(model.apply, model.params, TOKENS)
    stats = fh.calibrate(model.apply, model.params, uses, [(TOKENS,)])
    gram = np.asarray(stats[down].gram, np.float64) / TOKENS.size
    damped = gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    costs = np.square(params[down]) / np.diagonal(np.linalg.inv(damped))
    groups = np.sort(costs.reshape(len(costs), -1, 4), -1)
    kept = groups[..., 2:].sum() / groups.sum()
    assert result.groups[1].before == pytest.approx(kept, rel=1e-3)


def test_groups_that_do_not_divide_are_refused(tmp_path):
    directories.make_decoder_directory(tmp_path / "dense", directories.LLAMA2)
    with pytest.raises(ValueError, match="2:3 does not divide the 32 channels"):
        reorder(
            tmp_path / "dense", tmp_path / "out", TOKENS, jax.random.key(0), n=2, m=3
        )
    assert not (tmp_path / "out").exists()


def test_a_directory_that_another_run_writes_is_refused_before_the_search(owned):
    dense = owned.with_name("dense")
    directories.make_decoder_directory(dense, directories.LLAMA2)
    seen = []
    with pytest.raises(atomic.InUse, match="out is being written by process 123"):
        reorder(
            dense,
            owned,
            TOKENS,
            jax.random.key(0),
            progress=lambda *done: seen.append(done),
        )
    assert not seen and not owned.exists()


def test_the_command_writes_a_directory_and_says_what_it_gained(tmp_path, capsys):
    dense, out = tmp_path / "dense", tmp_path / "out"
    directories.make_decoder_directory(dense, directories.LLAMA2)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is not. " * 9)
    line = ["reorder", str(dense), "--out", str(out), "--calibration", str(text)]
    line += ["--length", "16", "--samples", "4", "--json", "-q"]
    assert main(line) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert set(kept) == {"stream", "heads", "inner"}
    assert kept["inner"]["after"] >= kept["inner"]["before"]
    assert load(out).config == load(dense).config
    assert main([*line, "--force", "--pattern", "vector:v=8"]) == 2
    assert "channels are arranged for groups" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reorder", "rotate"])
def test_a_pruned_model_keeps_its_channels(tmp_path, capsys, command):
    directories.make_decoder_directory(tmp_path / "pruned", directories.LLAMA2)
    report = tmp_path / "pruned" / "report.json"
    report.write_text(json.dumps({"weights": [{"path": "w"}]}))
    line = [command, str(tmp_path / "pruned"), "--out", str(tmp_path / "out")]
    assert main([*line, "--length", "16", "--samples", "4"]) == 2
    assert "is pruned already, as its report.json says" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
