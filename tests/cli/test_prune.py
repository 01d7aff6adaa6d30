import argparse
import json
import re
from string import Formatter

import chex
import numpy as np
import pytest
import safetensors.numpy

from flexhinm_jax import NM, SparseGPT, Wanda, arguments, methods, models
from flexhinm_jax.cli import flags, prune_encoder
from flexhinm_jax.cli.main import main
from flexhinm_jax.io import huggingface, packed, sources
from flexhinm_jax.kernels import unpack
from flexhinm_jax.types import PackedWeight


@pytest.fixture
def prune(model_dir, text_file, tmp_path):
    def run(*extra, pattern="2:4", sparsity=None, calibration=text_file):
        args = ["prune", model_dir, "--pattern", pattern, "--out", tmp_path / "out"]
        args += ["--method", "wanda"]
        if sparsity is not None:
            args += ["--sparsity", sparsity]
        if calibration is not None:
            args += ["--calibration", calibration]
        return main([str(arg) for arg in (*args, *extra)])

    return run


def error_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flexhinm: error: ") and err.count("\n") == 1, err
    return err


def test_packed_values_in_eight_bits_are_written_and_told(prune, tmp_path, capsys):
    assert prune("--pack-values", "int8") == 0
    assert "packed values are rounded by" in capsys.readouterr().out
    params = huggingface.read(tmp_path / "out").params
    twin = packed.read_packed(tmp_path / "out" / "packed.safetensors")
    for path, leaf in twin.items():
        if isinstance(leaf, PackedWeight):
            assert leaf.values_dtype == np.int8 and leaf.dtype == params[path].dtype
            top = np.abs(params[path]).max(1, keepdims=True)
            lost = np.abs(np.asarray(unpack(leaf), np.float32) - params[path])
            assert (lost <= top / 254 * 1.01).all()
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(0 < row["rounding"] < 0.02 for row in document["weights"])
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "pack_values: int8" in recipe


def test_the_output_is_the_same_model_with_zeros_and_a_packed_twin(
    prune, model_dir, tmp_path
):
    assert prune("-q", pattern="flexhinm:v=8,permute=none", sparsity="0.75") == 0
    source_params = huggingface.read(model_dir).params
    pruned = huggingface.read(tmp_path / "out")
    assert pruned.params.keys() == source_params.keys()
    twin = packed.read_packed(tmp_path / "out" / "packed.safetensors")
    count = 0
    for path, before in source_params.items():
        after = pruned.params[path]
        assert after.dtype == before.dtype and after.shape == before.shape
        if isinstance(twin[path], PackedWeight):
            count += 1
            assert np.mean(after == 0) == pytest.approx(0.75, abs=0.03)
            assert np.all((after == 0) | (after == before))
            np.testing.assert_array_equal(np.asarray(unpack(twin[path])), after)
        else:
            np.testing.assert_array_equal(after, before)
    assert count == 12
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_json_is_the_whole_of_stdout_and_equals_the_report_file(
    prune, tmp_path, capsys
):
    assert prune("--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["sentences"] == 3
    assert document["method"] == repr(Wanda(NM(2, 4)))
    assert document["total"]["zeros"] == 0.5
    assert len(document["weights"]) == 12
    assert document["total"]["packed_bytes"] < document["total"]["dense_bytes"]


def test_quiet_shows_nothing_and_the_default_shows_a_table(prune, capsys):
    assert prune("-q") == 0
    assert capsys.readouterr() == ("", "")
    assert prune("--force", "--rows", "all") == 0
    out, err = capsys.readouterr()
    # Said only where it takes a while.
    assert err in ("", "solving 12 weights (the first of a shape compiles)\n")
    assert "encoder.layer.1.output.dense.weight" in out
    assert "all pruned weights" in out
    assert "packed.safetensors" in out


def test_the_table_groups_layers_and_shows_the_errors_of_outputs(
    prune, model_dir, text_file, tmp_path, capsys
):
    assert prune("--method", "sparsegpt") == 0
    lines = capsys.readouterr().out.splitlines()
    header = lines[0].split()
    assert header == "weight shape zeros error dense packed retained".split()
    (row,) = (line for line in lines if "attention.self.query.weight x2" in line)
    assert len([line for line in lines if " x2 " in line]) == 6
    # The outputs of the first query, on the hidden states before it.
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    path = "encoder.layer.{}.attention.self.query.weight"
    errors = [report["errors"][path.format(k)] for k in (0, 1)]
    assert float(row.split()[4]) == pytest.approx(np.mean(errors), abs=1e-4)
    model = models.load(model_dir)
    (batch,) = model.tokenize(sources.read_sentences(text_file), 3)
    dense = {k: np.asarray(v) for k, v in model.params.items()}
    at = {k.removeprefix("embeddings."): v for k, v in dense.items()}
    x = at["word_embeddings.weight"][batch.tokens[batch.mask != 0]]
    x = x + at["position_embeddings.weight"][np.nonzero(batch.mask)[1]]
    x = x + at["token_type_embeddings.weight"][0]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    x = x * at["LayerNorm.weight"] + at["LayerNorm.bias"]
    before = dense[path.format(0)]
    after = huggingface.read(tmp_path / "out").params[path.format(0)]
    want = np.sum((x @ (after - before).T) ** 2) / np.sum((x @ before.T) ** 2)
    assert errors[0] == pytest.approx(want, rel=1e-3)


def test_the_same_seed_gives_the_same_files(prune, tmp_path):
    def arrays():
        files = (tmp_path / "out").glob("*.safetensors")
        return {f.name: safetensors.numpy.load_file(f) for f in files}

    assert prune("-q", "--seed", "3") == 0
    first = arrays()
    assert first.keys() == {"model.safetensors", "packed.safetensors"}
    assert prune("-q", "--seed", "3", "--force") == 0
    chex.assert_trees_all_equal(arrays(), first)


def test_calibration_text_changes_what_wanda_keeps(prune, tmp_path, text_file):
    def weights():
        return huggingface.read(tmp_path / "out").params

    prune("-q")
    first = weights()
    text_file.write_text("tree tree tree fast\n")
    prune("-q", "--force")
    assert any((first[k] != w).any() for k, w in weights().items())


def test_padding_does_not_change_the_result(prune, tmp_path):
    def weights():
        return huggingface.read(tmp_path / "out").params

    prune("-q", "--batch-size", "1")
    first = weights()
    prune("-q", "--batch-size", "7", "--force")
    for path, w in weights().items():
        np.testing.assert_array_equal(first[path], w)


def test_magnitude_needs_no_calibration_and_a_fixed_pattern_no_sparsity(
    prune, tmp_path
):
    assert prune("-q", "--method", "magnitude", calibration=None) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"] is None  # of the text that nobody read
    weight = huggingface.read(tmp_path / "out").params[
        "encoder.layer.0.output.dense.weight"
    ]
    assert ((weight.reshape(32, -1, 4) != 0).sum(-1) == 2).all()


def test_rules_skip_leaves_and_change_patterns(prune, tmp_path):
    rules = ["--rule", r"layer\.0\.=skip", "--rule", r"(?=.)output\.dense=1:4"]
    assert prune("-q", *rules) == 0
    params = huggingface.read(tmp_path / "out").params
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    zeros = {row["path"]: row["zeros"] for row in report["weights"]}
    assert all("layer.1." in path for path in zeros)
    assert zeros["encoder.layer.1.output.dense.weight"] == 0.75
    assert zeros["encoder.layer.1.intermediate.dense.weight"] == 0.5
    assert (params["encoder.layer.0.output.dense.weight"] != 0).all()
    assert "rule" in report["skipped"]["encoder.layer.0.output.dense.weight"]


def test_weights_that_read_the_same_input_can_share_an_order(prune, tmp_path, capsys):
    options = ("-q", "--method", "magnitude", "--share-orders")
    assert prune(*options, calibration=None) == 0
    twin = packed.read_packed(tmp_path / "out" / "packed.safetensors")
    at = "encoder.layer.0.attention.self.{}.weight"
    q, k, v = (twin[at.format(n)].nm_index for n in ("query", "key", "value"))
    np.testing.assert_array_equal(q, k)
    np.testing.assert_array_equal(q, v)
    assert q[0].tolist() != list(range(32))
    assert prune(*options, "--sequential", "--force") != 0
    assert "not for --sequential" in error_line(capsys)


def test_sequential_prunes_in_order_and_resumes(prune, tmp_path, capsys):
    options = ("-q", "--method", "sparsegpt", "--sequential", "--target", "resid")

    def weights():
        params = huggingface.read(tmp_path / "out").params
        return [x for name, x in params.items() if name.endswith("dense.weight")]

    assert prune(*options, "--resume", tmp_path / "half-way") == 0
    first = weights()
    assert len(list((tmp_path / "half-way").glob("*.npz"))) == 12
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["target"] == "resid"
    # Biases were refitted.
    assert {p.rpartition(".")[2] for p in report["moved"]} == {"bias"}
    assert prune(*options, "--resume", tmp_path / "half-way", "--force") == 0
    for before, after in zip(first, weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    other = ("--resume", tmp_path / "half-way", "--force", "--seed", "4")
    assert prune(*options, *other) == 2
    told = "half-way was begun with other options: --seed (0 before, 4 now). Give"
    assert told in error_line(capsys)


@pytest.mark.parametrize(
    "option",
    [
        ("--target", "asym"),
        ("--resume", "folder"),
        ("--statistics", "block"),
        ("--reconstruct", "block"),
    ],
)
def test_options_of_the_sequential_walk_need_it(prune, capsys, option):
    assert prune(*option) == 2
    assert f"{option[0]} is for --sequential" in error_line(capsys)


def test_unstructured_is_written_and_said_to_stay_dense(prune, tmp_path, capsys):
    assert prune(pattern="unstructured", sparsity="0.5") == 0
    assert "stays dense" in capsys.readouterr().out


def test_a_limit_takes_the_first_sentences(prune, tmp_path):
    assert prune("-q", "--limit", "1") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sentences"] == 1


BAD = {
    "unknown pattern": (dict(pattern="hexagon"), [], "hexagon.*flexhinm"),
    "unknown pattern option": (dict(pattern="hinm:q=3"), [], "q=3.*v="),
    "mistyped method": ({}, ["--method", "wnda"], "did you mean 'wanda'?"),
    "mistyped pattern": (dict(pattern="flexinm:v=8"), [], "did you mean 'flexhinm'?"),
    "unknown method": ({}, ["--method", "oracle"], "oracle.*magnitude, wanda"),
    "method with a loss": ({}, ["--method", "fisher"], "gradients of a loss"),
    "method that learns": ({}, ["--method", "maskllm"], "use 'flexhinm learn'"),
    "percent as sparsity": (
        dict(pattern="hinm:v=8", sparsity="75"),
        [],
        r"--sparsity 75 .*fraction",
    ),
    "missing sparsity": (dict(pattern="hinm:v=8"), [], "needs a target"),
    "sparsity of another pattern": (dict(sparsity="0.7"), [], "always removes 0.5"),
    "sparsity is no number": (dict(sparsity="half"), [], "--sparsity.*half"),
    "tile does not divide": (dict(pattern="vector:v=48", sparsity="0.5"), [], "48"),
    "dataset without column": (
        dict(calibration="hf:wikitext:train"),
        [],
        "write hf:DATASET",
    ),
    "calibration not there": (dict(calibration="nowhere.txt"), [], "nowhere.txt"),
    "rule without value": ({}, ["--rule", "dense"], "'dense' is not REGEX=PATTERN"),
    "rule with bad pattern": ({}, ["--rule", "dense=cube"], "cube.*known.*skip"),
    "rule with bad regex": ({}, ["--rule", "(=skip"], "no regular expression"),
    "rule without match": ({}, ["--rule", "decoder=skip"], "decoder"),
    "rules that skip all": ({}, ["--rule", ".=skip"], "no weight is left"),
    "too long": ({}, ["--max-length", "17"], "max_position_embeddings=16"),
    "text to compare on not there": ({}, ["--eval", "nowhere.txt"], "is not a file"),
    "percent sign": (dict(sparsity="50%"), [], "such as 0.5 for 50 %"),
    "batch of none": ({}, ["--batch-size", "0"], "--batch-size"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(prune, case, capsys, tmp_path):
    options, extra, wanted = BAD[case]
    try:
        status = prune(*extra, **options)
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    assert status == 2
    assert re.search(wanted, error_line(capsys))
    assert not (tmp_path / "out").exists()


PYTHON = r"\w=|\w\(|\{|None|True|False"


@pytest.mark.parametrize(
    ("options", "extra", "wanted"),
    [
        (dict(pattern="nm:n=2,m=24"), [], "exclude the leaf with --rule 'REGEX=skip'"),
        (
            dict(pattern="2:4", sparsity="0.7"),
            [],
            "error: --pattern 2:4: --sparsity 0.7, but NM(n=2, m=4) always removes 0.5;"
            " leave --sparsity out",
        ),
        (dict(pattern="vector:v=8"), [], "pass --sparsity in"),
        (dict(pattern="vector:v=8", sparsity="75"), [], "--sparsity 75 is outside"),
        (
            dict(pattern="vector:v=8", sparsity="0.5"),
            ["--rule", ".=0.25"],
            "--rule REGEX=SPARSITY cover every layer and remove 0.25 of all weights,"
            " not --sparsity 0.5",
        ),
        (
            dict(pattern="vector:v=8", sparsity="0.9"),
            ["--rule", "attention=0.1"],
            "--sparsity 0.9 cannot be met",
        ),
        (
            dict(pattern="vector:v=8", sparsity="0.5"),
            ["--share-orders", "--method", "magnitude"],
            "--share-orders: ",
        ),
        (dict(), ["--out", "{model}/../text.txt/x/.."], "text.txt"),
    ],
)
def test_hints_speak_the_words_of_the_command_line(
    prune, model_dir, capsys, options, extra, wanted
):
    assert prune(*(x.format(model=model_dir) for x in extra), **options) == 2
    line = error_line(capsys)
    assert wanted in line
    # The name of a pattern, as its options are written, is the command line's too.
    spoken = re.sub(
        r"(NM|Vector)\(.*?\)", "", line.replace("in=", "").replace("m=", "")
    )
    spoken = re.sub(r"max_position_embeddings=|REGEX=|v=", "", spoken)
    assert not re.search(PYTHON, spoken), line


def test_the_command_line_has_a_word_for_every_word_of_python():
    assert flags.WORDS.keys() == arguments.WORDS.keys()

    def values(text: str) -> int:
        return sum(field is not None for _, field, _, _ in Formatter().parse(text))

    for name, text in arguments.WORDS.items():
        assert values(text) == values(flags.WORDS[name]), name
    with arguments.speaking(flags.WORDS):
        assert arguments.say("sparsity", 0.5) == "--sparsity 0.5"
    assert arguments.say("skip") == 'rules={"<regex>": "skip"}'


@pytest.mark.parametrize(
    ("content", "wanted"), [(b"\n \n", "has no text"), (b"\xff\xfe\xff", "UTF-8")]
)
def test_calibration_text_must_be_text(prune, text_file, capsys, content, wanted):
    text_file.write_bytes(content)
    assert prune() == 2
    assert wanted in error_line(capsys)


def test_an_existing_output_is_replaced_only_with_force(prune, tmp_path, capsys):
    assert prune("-q") == 0
    assert prune("-q") == 2
    assert "--force" in error_line(capsys)
    assert prune("-q", "--force") == 0


def test_a_folder_that_is_no_model_is_never_replaced(prune, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("important")
    assert prune("--force") == 2
    assert "config.json" in error_line(capsys)
    (tmp_path / "out" / "config.json").write_text("{}")  # of something else
    assert prune("--force") == 2
    assert "no weights, so it is no model directory" in error_line(capsys)
    assert (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_output_must_lie_beside_the_model(
    prune, model_dir, text_file, capsys, where
):
    out = str(model_dir / where)
    arguments = ["--pattern", "2:4", "--calibration", str(text_file), "--force"]
    assert main(["prune", str(model_dir), *arguments, "--out", out]) == 2
    assert "beside" in error_line(capsys)
    assert (model_dir / "config.json").exists()


def test_a_second_process_is_refused_before_it_reads_the_model(
    prune, tmp_path, capsys, monkeypatch
):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(prune_encoder, "load", None)
    with open(tmp_path / ".out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 123 on elsewhere")
        lock.flush()
        assert prune() == 2
    assert "out is being written by process 123 on elsewhere" in error_line(capsys)


def test_a_source_that_cannot_be_copied_is_refused_before_it_is_read(
    prune, model_dir, capsys, monkeypatch
):
    monkeypatch.setattr(prune_encoder, "load", None)
    (model_dir / "vocab.txt").symlink_to(model_dir / "gone")
    assert prune() == 2
    assert "vocab.txt is a link to" in error_line(capsys)


def test_another_kind_of_model_is_refused_by_name(prune, model_dir, capsys):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert prune() == 2
    assert "'mamba' is not supported" in error_line(capsys)


def test_a_missing_tokenizer_is_named(prune, model_dir, capsys):
    (model_dir / "tokenizer.json").unlink()
    assert prune() == 2
    assert "tokenizer.json is missing" in error_line(capsys)


def test_a_tokenizer_of_another_model_is_refused(prune, model_dir, capsys):
    path = model_dir / "tokenizer.json"
    path.write_text(path.read_text().replace('"slow": 15', '"slow": 99'))
    assert prune() == 2
    assert "token 99" in error_line(capsys)


def test_weights_that_are_not_finite_are_refused(prune, model_dir, capsys):
    path = model_dir / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    stored["encoder.layer.0.output.dense.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(stored, path, {"format": "pt"})
    assert prune() == 2
    assert "NaN" in error_line(capsys)


def test_a_failed_write_leaves_the_old_output(prune, tmp_path, monkeypatch, capsys):
    assert prune("-q") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "packed.safetensors")

    monkeypatch.setattr(packed, "write_packed", full)
    assert prune("-q", "--force", "--seed", "9") == 2
    assert "No space left on device" in error_line(capsys)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_text_is_cut_by_the_tokenizer_and_keeps_its_closing_token(model_dir):
    model = models.load(model_dir)
    (batch,) = model.tokenize(["the cat sat on the mat"], 1, 4)
    assert batch.tokens.tolist() == [[2, 4, 6, 3]]


def test_a_global_budget_keeps_the_total_and_spreads_it(prune, capsys):
    options = {"pattern": "vector:v=8", "sparsity": "0.5"}
    assert prune("--json", "--allocate", "global", **options) == 0
    report = json.loads(capsys.readouterr().out)
    found = {round(row["zeros"], 3) for row in report["weights"]}
    assert len(found) > 1
    assert abs(report["total"]["zeros"] - 0.5) < 0.05


def test_a_global_budget_is_refused_where_there_is_nothing_to_spread(prune, capsys):
    assert prune("--allocate", "global", pattern="2:4") == 2
    assert "2:4 has only one sparsity, 0.5" in error_line(capsys)
    for text, match in (("owl:lambda=2", "owl takes multiple="), ("x", "uniform, gl")):
        with pytest.raises(argparse.ArgumentTypeError, match=match):
            flags.mode(text)


def test_exceptions_and_owl_in_order(prune, capsys):
    options = {"pattern": "vector:v=8", "sparsity": "0.5"}
    rules = ("--rule", r"0\.attention=0.25", "--rule", "1.*query=dense")
    owl = ("--allocate", "owl", "--sequential")
    assert prune("--json", *owl, *rules, **options) == 0
    report = json.loads(capsys.readouterr().out)
    zeros = {row["path"]: row["zeros"] for row in report["weights"]}
    assert len(zeros) == 11 and report["exceptions"] == {r"0\.attention": 0.25}
    assert {x for path, x in zeros.items() if "0.attention" in path} == {0.25}
    assert abs(report["total"]["zeros"] - 0.5) < 0.02


def test_a_weight_that_needed_more_damping_is_named(prune, capsys, monkeypatch):
    made = lambda text, pattern: SparseGPT(pattern, damp=1e-8)  # noqa: E731
    monkeypatch.setattr(methods, "parse", made)
    one = ("--rule", r"layer\.0\.output=prune", "--rule", ".=skip")
    for more in ((), ("--sequential",)):
        assert prune("--json", "--force", "--limit", "1", *one, *more) == 0
        out, err = capsys.readouterr()
        assert err == ""
        notes = json.loads(out)["notes"]
        assert list(notes) == ["encoder.layer.0.output.dense.weight"]
        (text,) = notes.values()
        assert re.search("needed damping .* instead of 1e-08", text)
