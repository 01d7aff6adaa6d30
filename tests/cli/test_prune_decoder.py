"""`flexhinm prune` and `inspect` of decoder directories."""

import collections
import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

from flexhinm_jax import kernels, models
from flexhinm_jax.cli import flags, unfinished
from flexhinm_jax.cli.main import main
from flexhinm_jax.io import huggingface, packed, tensors
from flexhinm_jax.models import evaluation
from flexhinm_jax.pruning.owl import OWL
from flexhinm_jax.sequential.cuts import Programs
from flexhinm_jax.streaming import learned, streaming, work
from flexhinm_jax.streaming.memory import Ahead
from flexhinm_jax.types import PackedWeight
from tests.models.directories import QWEN3, make_decoder_directory

CONFIG = QWEN3 | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
TEXT = "the cat sat on the mat, a dog ran under a tree. " * 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "model"
    make_decoder_directory(folder, CONFIG, 0, 2)
    return folder


@pytest.fixture
def model_dir(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "model")
    return tmp_path / "model"


PROGRAMS = Programs(Ahead())


@pytest.fixture
def prune(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "Programs", lambda solver: PROGRAMS)
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*extra):
        args = ["prune", model_dir, "--out", tmp_path / "out", "--method", "wanda"]
        args += ["--calibration", tmp_path / "text.txt"]
        return main([str(arg) for arg in (*args, *extra)])

    return run


def test_the_plan_comes_first_then_a_line_per_block(prune, model_dir, tmp_path, capsys):
    options = "--memory 4GiB --length 16 --samples 8 --target asym".split()
    assert prune(*options) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "planned memory for 8 samples of 16 tokens:"
    for part in ("block weights", "statistics", "solver", "hidden states", "limit"):
        assert any(part in line for line in lines)
    assert lines[-2].startswith("block 1/2: error 0.") and lines[-2].endswith("left")
    assert lines[-1].startswith("block 2/2: ") and "peak" in lines[-1]
    assert "model.layers.*.mlp.down_proj.weight x2" in out
    before = huggingface.read(model_dir).params
    after = huggingface.read(tmp_path / "out").params
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    pruned = {row["path"] for row in report["weights"]}
    assert len(pruned) == 2 * 7 and report["errors"].keys() == pruned
    assert (report["samples"], report["length"]) == (8, 16)
    for key, x in after.items():
        assert np.mean(x == 0) == 0.5 if key in pruned else (x == before[key]).all()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert "target: asym" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_blocks_are_reconstructed_and_the_recipe_says_how(prune, tmp_path, capsys):
    assert prune("--reconstruct-steps", 2) == 2
    assert "--reconstruct-steps is for --reconstruct" in capsys.readouterr().err
    assert prune("--reconstruct", "blok") == 2
    assert "--reconstruct blok matches no leaf; the nearest" in capsys.readouterr().err
    options = "--length 16 --samples 8 --statistics block --reconstruct block"
    options += " --reconstruct-steps 4 --reconstruct-rate 0.01"
    assert prune(*options.split()) == 0
    told = [x for x in capsys.readouterr().err.splitlines() if "outputs off by" in x]
    assert [x.partition(":")[0] for x in told] == ["model.layers.0", "model.layers.1"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reconstruct"].startswith("Reconstruct(window='block', steps=4, rate")
    assert report["total"]["zeros"] == 0.5
    norms = {p for p in report["skipped"] if "layernorm" in p}
    assert report["moved"] and norms & {*report["moved"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "other leaves have new values, such as" in card
    assert "| reconstruction | Reconstruct(window='block'" in card
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "reconstruct: block" in recipe and "reconstruct_steps: '4'" in recipe


def test_budgets_of_blocks_with_exceptions(prune, model_dir, tmp_path, capsys):
    make_decoder_directory(tmp_path / "deep", CONFIG | {"num_hidden_layers": 4}, 0, 1)
    shutil.rmtree(model_dir)
    (tmp_path / "deep").rename(model_dir)
    options = "--method magnitude --pattern vector:v=4 --sparsity 0.5 --length 16"
    options += " --allocate owl:multiple=2,spread=0.1 --first-last 0.25"
    assert prune(*options.split(), "--rule", r"\.1\..*up_proj=dense") == 0
    err = capsys.readouterr().err
    (line,) = (x for x in err.splitlines() if x.startswith("sparsity of the blocks:"))
    blocks = [float(x) for x in line.split()[4:]]
    assert blocks[0] == blocks[3] == 0.25 and 0.5 < min(blocks[1:3])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["allocate"] == repr(OWL(2.0, 0.1))
    zeros = {row["path"]: row["zeros"] for row in report["weights"]}
    assert report["budgets"].keys() == zeros.keys()
    assert "model.layers.1.mlp.up_proj.weight" not in zeros
    for path, target in report["budgets"].items():
        assert abs(zeros[path] - target) <= 1 / 16
    assert abs(report["total"]["zeros"] - 0.5) < 0.02


@pytest.mark.parametrize("dtype", ["checkpoint", "float32"])
def test_a_float16_model_is_pruned_and_measured(
    prune, model_dir, tmp_path, capsys, dtype
):
    shutil.rmtree(model_dir)
    config = CONFIG | {"num_hidden_layers": 1}
    make_decoder_directory(model_dir, config, 0, 1, jnp.float16)
    make_decoder_directory(tmp_path / "wide", config, 0, 1)
    options = ["--dtype", dtype, "--length", 16, "--samples", 2, "--json", "--eval"]
    assert prune(*options, tmp_path / "text.txt") == 0
    after = huggingface.read(tmp_path / "out").params
    assert {str(x.dtype) for x in after.values()} == {"float16"}
    assert (after["model.layers.0.mlp.up_proj.weight"] == 0).mean() == 0.5
    told = json.loads(capsys.readouterr().out)["evaluation"]["models"]
    dense, pruned = (x["perplexity"] for x in told)
    assert 1 < dense != pruned > 1
    text = (tmp_path / "text.txt").read_text()
    half, wide = models.load(model_dir), models.load(tmp_path / "wide")
    assert evaluation.divergence(wide, half, text).kl < 1e-3


EMPTY = "text.txt has 1 tokens, 1 samples of 64 need 64"
FIRST_LAST = (
    "--method magnitude --pattern vector:v=4 --length 16 --samples 2 --sparsity"
)


@pytest.mark.parametrize(
    ("sparsity", "asked", "rule", "outer", "inner"),
    [
        (0.7, "1:4", "o_proj=0.25", 0.75, 0.25),
        (0.4, "0.25", "o_proj=1:4", 0.25, 0.75),
        (0.5, "dense", "o_proj=1:4", None, 0.75),
    ],
)
def test_the_first_and_the_last_block_come_before_all_rules(
    prune, model_dir, tmp_path, sparsity, asked, rule, outer, inner
):
    shutil.rmtree(model_dir)
    make_decoder_directory(model_dir, CONFIG | {"num_hidden_layers": 3}, 0, 1)
    options = [*FIRST_LAST.split(), sparsity, "--first-last", asked, "--rule", rule]
    assert prune(*options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # A few weights are zero from the start; shares are multiples of a quarter.
    zeros = {row["path"]: round(row["zeros"] * 4) / 4 for row in report["weights"]}
    found = [zeros.get(f"model.layers.{k}.self_attn.o_proj.weight") for k in range(3)]
    assert found == [outer, inner, outer]
    others = {x for path, x in zeros.items() if ".1." not in path}
    assert others == ({outer} if outer else set())


def test_what_is_computed_in_float32_is_packed_and_counted_as_it_is_stored(
    prune, model_dir, tmp_path
):
    shutil.rmtree(model_dir)
    make_decoder_directory(model_dir, CONFIG, 0, 2, jnp.bfloat16)
    options = ["--method", "magnitude", "--dtype", "float32", "--pack", "--length", 16]
    assert prune(*options, "--samples", 8) == 0
    stored = huggingface.read(tmp_path / "out").params
    twin = {}
    for file in (tmp_path / "out" / "packed").iterdir():
        twin |= packed.read_packed(file)
    for key, leaf in twin.items():
        dense = kernels.unpack(leaf) if isinstance(leaf, PackedWeight) else leaf
        assert dense.dtype == jnp.bfloat16 and (dense == stored[key]).all()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    pruned = [row["path"] for row in report["weights"]]
    assert report["total"]["dense_bytes"] == sum(stored[k].nbytes for k in pruned)
    size = sum(leaf.nbytes for leaf in (stored | twin).values())
    assert report["total"]["tree_packed_bytes"] == size


def test_zeros_that_are_in_packed_form_alone_are_told(prune, tmp_path, capsys):
    options = "--method armor:block=4,steps=1 --length 16 --samples 8".split()
    options += ["--rule", "self_attn|up|gate=skip"]
    warning = "warning: nothing sparse is written"
    assert prune(*options) == 0
    out = capsys.readouterr().out
    assert warning in out and "give --pack" in out and "0.0% is zero" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50.0% of the cores of 2 weight matrices are zero, in packed form" in card
    after = huggingface.read(tmp_path / "out").params
    assert (after["model.layers.0.mlp.down_proj.weight"] != 0).all()
    assert prune(*options, "--pack", "--force") == 0
    out = capsys.readouterr().out
    assert warning not in out and "the zeros of 2 of 2 weights" in out


def test_packed_files_are_told_where_they_are_written(prune, tmp_path, capsys):
    options = "--method magnitude --length 16 --samples 8".split()
    assert prune(*options) == 0
    out = capsys.readouterr().out
    assert (
        "whole model" not in out and f"wrote {tmp_path / 'out'} with report.json" in out
    )
    assert prune(*options, "--pack", "--force") == 0
    out = capsys.readouterr().out
    assert "whole model: " in out and " packed; " in out
    assert f"wrote {tmp_path / 'out'} with packed/ and report.json" in out


def test_an_empty_directory_is_filled_where_it_stands(prune, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out")
    options = ["--method", "magnitude", "--length", "16", "--samples", "8", "--force"]
    for out in (".", tmp_path / "link"):
        assert prune("--out", out, *options) == 0
        assert (tmp_path / "out" / "report.json").is_file()
    assert (tmp_path / "link").is_symlink()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["link", "model", "out", "text.txt"]


def test_a_comparison_that_fails_says_that_the_model_is_written(
    prune, model_dir, tmp_path, capsys
):
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (model_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "short.txt").write_text("a")
    options = ["--method", "magnitude", "--length", "16", "--samples", "8", "-q"]
    assert prune(*options, "--eval", tmp_path / "short.txt") == 2
    out, told = capsys.readouterr()
    assert out == "" and told.count("\n") == 1
    assert f"{tmp_path / 'out'} is written, but not compared with {model_dir}: " in told
    assert "the text has 1 tokens" in told
    assert (tmp_path / "out" / "report.json").is_file()


def test_inspect_reads_headers_only(model_dir, capsys, monkeypatch):
    def read(*args):
        raise AssertionError("values were read")

    monkeypatch.setattr(tensors, "read", read)
    monkeypatch.setattr(tensors, "mapped", read)
    assert main(["inspect", str(model_dir), "--json"]) == 0
    leaves = json.loads(capsys.readouterr().out)["leaves"]
    prunable = {x["path"]: x for x in leaves if x["prunable"]}
    assert len(prunable) == 14 and all(
        bool(x["reason"]) != x["prunable"] for x in leaves
    )
    assert prunable["model.layers.0.mlp.down_proj.weight"]["matrix"] == [16, 32]
    assert all(x["zeros"] is None for x in leaves)
    assert main(["inspect", str(model_dir)]) == 0
    assert "14 of" in capsys.readouterr().out


def edit_config(**fields):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def edit_weights(change):
    def edit(folder):
        path = sorted(folder.glob("*.safetensors"))[0]
        arrays = safetensors.numpy.load_file(path)
        change(arrays)
        safetensors.numpy.save_file(arrays, path, {"format": "pt"})

    return edit


def half_downloaded(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size // 2)


def without(name):
    return lambda folder: (folder / name).unlink()


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "options", "match"),
    [
        (edit_config(model_type="mamba"), "", "model_type='mamba' is not supported"),
        (
            edit_config(num_hidden_layers=3),
            "",
            "missing model.layers.2.input_layernorm",
        ),
        (edit_config(num_hidden_layers=1), "", "not known model.layers.1."),
        (edit_config(intermediate_size=48), "", "(32, 16), the configuration gives"),
        (edit_weights(lambda x: x.pop(NORM)), "", NORM),
        (edit_weights(lambda x: x.update(odd=x[NORM])), "", "not known odd"),
        (half_downloaded, "", "-00002-of-00002.safetensors is truncated"),
        (without("tokenizer.json"), "", "tokenizer.json is missing"),
        (None, "--samples 40 --length 16", "need 640; give more text, fewer --samples"),
        (lambda folder: (folder.parent / "text.txt").write_text(""), "", EMPTY),
        (None, "--pattern 2:3 --on-mismatch skip", "q_proj.weight: does not fit NM("),
        (None, "--length 999", "--length 999 is more than this model reads"),
        (None, "--resume x", "--resume is for encoders; a decoder goes on by itself"),
        (None, "--length 16 --target asym --memory 1kB", "the limit is 0.00 GiB"),
        (None, "--pattern 2:5", "multiple of m=5"),
        (None, "--allocate owl", "2:4 has only one sparsity"),
        (None, "--first-last dense", ".weight: skipped by rule '^("),
        (None, "--first-last 0.9", "need one sparsity"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    prune, model_dir, tmp_path, capsys, edit, options, match
):
    if edit is not None:
        edit(model_dir)
    assert prune("--method", "wanda", *options.split()) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("flexhinm: error: ") and match in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.fixture
def stopped(prune, monkeypatch):
    """A run that is stopped in the second block; with more options another one."""

    def run(*more):
        def stop(layer, *others):
            if layer == 1:
                raise KeyboardInterrupt
            return write(layer, *others)

        with monkeypatch.context() as patch:
            write = streaming.write_block
            patch.setattr(streaming, "write_block", stop)
            return prune("--length", "16", "--samples", "8", *more)

    return run


def test_a_stopped_run_says_where_it_goes_on_and_that_it_does(
    stopped, prune, tmp_path, capsys
):
    partial = tmp_path / "out.partial"
    assert stopped() == 130
    told = capsys.readouterr().err
    assert f"{partial} is kept: the same command goes on from there" in told
    assert "going on with" not in told
    assert prune("--length", "16", "--samples", "8") == 0
    told = capsys.readouterr().err
    assert f"going on with {partial}" in told and "is kept" not in told
    assert not partial.exists()


def test_a_run_that_others_began_is_refused_by_its_options(
    stopped, prune, tmp_path, capsys
):
    assert stopped() == 130
    capsys.readouterr()
    partial = tmp_path / "out.partial"
    (tmp_path / "other.txt").write_text(TEXT.replace("cat", "cow"))
    other = ["--calibration", tmp_path / "other.txt"]
    for more, wanted in (
        (["--samples", 4], "options: --samples or --calibration (8 before, 4 now)."),
        (["--seed", 3], "options: --seed (0 before, 3 now)."),
        (["--batch-size", 2], "options: --batch-size (4 before, 2 now)."),
        (other, "options: --calibration."),
        (["--pattern", "1:4"], "options: --pattern."),
        (["--method", "magnitude"], "options: --method."),
        (["--pack"], "options: --pack or --pack-values."),
    ):
        assert prune("--length", "16", "--samples", "8", *more) == 2
        err = capsys.readouterr().err
        assert wanted in err and f"{partial} was begun with other options" in err
        assert "remove it to begin anew" in err
        assert "going on" not in err and "is kept" not in err
    assert main([*map(str, _learning(tmp_path))]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "was begun by another command" in told and "remove it" in told
    assert (partial / "block-00000.json").exists()


def _learning(folder):
    line = ["learn", folder / "model", "--out", folder / "out", "--steps", 1]
    line += ["--calibration", folder / "text.txt", "--length", 16, "--samples", 8]
    return [*line, "--start", "own"]


def test_every_part_of_a_fingerprint_has_the_words_of_its_options(tmp_path, prune):
    job = "method sparsity target center statistics block reconstruct key params"
    job += " batches token_mask leaves"
    fields = {f.name for f in dataclasses.fields(learned.Learning)}
    streamed = fields - {"tx", "weights_tx"} | {"fingerprint", *job.split()}
    taken = []

    def record(setting):
        taken.extend(whole(setting))
        return whole(setting)

    whole = work.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "record", record)
        assert prune("--length", "16", "--samples", "8") == 0
    assert unfinished.PARTS.keys() == (streamed | set(taken)) - {"fingerprint"}


def test_a_folder_of_the_user_is_left_alone(prune, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("mine")
    assert prune("--length", "16") == 2
    told = capsys.readouterr().err
    assert "out.partial holds precious.txt and no job.json" in told
    assert "move it away" in told and "going on" not in told and "is kept" not in told
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_known_before(prune, monkeypatch, capsys):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10))
    assert prune("--length", "16") == 2
    assert "0.00 GB are free on its disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GiB", 8 << 30), ("1.5 G", 3 << 29), ("800MB", 8 * 10**8), ("77", 77)],
)
def test_sizes_are_read(text, value):
    assert flags.size(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "8 gigs", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(flags.argparse.ArgumentTypeError, match="8GiB"):
        flags.size(text)


def test_weights_that_do_not_fit_stay_dense_on_request(prune, tmp_path, capsys):
    options = ["--pattern", "vector:v=32", "--sparsity", "0.5", "--length", "16"]
    assert prune(*options) == 2
    assert "out=16 is not a multiple" in capsys.readouterr().err
    assert prune(*options, "--on-mismatch", "skip") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    skipped = {k for k, why in report["skipped"].items() if "does not fit" in why}
    at = "model.layers.{}.{}.weight"
    parts = ("self_attn.o_proj", "mlp.down_proj")
    assert skipped == {at.format(k, part) for k in (0, 1) for part in parts}
    assert len(report["weights"]) == 2 * 5


def test_the_output_has_a_card_and_keeps_the_one_before(prune, model_dir, tmp_path):
    old = "---\nlicense: mit\ntags: [tiny]\nmodel_index: 3\n---\n# Tiny\n"
    (model_dir / "README.md").write_text(old)
    text = tmp_path / "text.txt"
    assert prune("--length", "16", "--eval", text, "--rule", "o_proj=dense", "-q") == 0
    assert (tmp_path / "out" / "README.base.md").read_text() == old
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "mit",
        "tags": ["tiny", "pruned", "sparse", "flexhinm_jax"],
    }
    for part in (
        "# model, pruned",
        "50.0% of 12 weight matrices are zero; ",
        " other leaves are as they were (`report.json`)",
        "| method | Wanda(",
        f"| calibration | {text} |",
        "| rule | `o_proj`: skip |",
        "| out | 4",
        f"flexhinm prune {model_dir} --out",
        "`README.base.md`",
    ):
        assert part in body, body
