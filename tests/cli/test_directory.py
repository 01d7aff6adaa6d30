"""Where models and texts come from."""

import json
import sys
import types

import pytest

from flexhinm_jax import NM, methods, patterns
from flexhinm_jax.cli import choices
from flexhinm_jax.cli.main import main
from flexhinm_jax.io import huggingface, sources

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(model_dir, tmp_path):
    """A cache as huggingface_hub lays it out, with one model in it."""
    repo = tmp_path / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    (repo / "snapshots" / SHA).mkdir(parents=True)
    (repo / "blobs").mkdir()
    for k, file in enumerate(sorted(model_dir.iterdir())):
        file.rename(repo / "blobs" / str(k))
        (repo / "snapshots" / SHA / file.name).symlink_to(f"../../blobs/{k}")
    model_dir.rmdir()
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_pruned_by_its_name(hub, tmp_path, capsys):
    pytest.importorskip("huggingface_hub")
    out = tmp_path / "out"
    command = ["prune", "owner/tiny", "--out", str(out), "--method", "magnitude"]
    options = ["--offline", "--hub-cache", str(hub)]
    assert main([*command, *options, "-q"]) == 0
    params = huggingface.read(out).params
    weight = params["encoder.layer.0.output.dense.weight"]
    assert ((weight.reshape(32, -1, 4) != 0).sum(-1) == 2).all()  # 2:4 by default
    assert not (out / "config.json").is_symlink()
    at = sources.find(f"owner/tiny@{SHA}", hub, offline=True)
    assert at.name == SHA and (at / "config.json").is_file()
    command[1] = "owner/other"
    assert main([*command, "--force", *options]) == 2
    err = capsys.readouterr().err
    assert "owner/other is no folder here, and not to be had" in err
    assert "it is not in the cache, and offline nothing is fetched" in err
    assert sources.short(at) == "owner/tiny"


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert sources.find("owner/tiny", offline=True).is_dir()
    for name in ("nowhere", "./a/b/c", "/a/b"):
        assert str(sources.find(name, offline=True)).strip("./") in name


def test_the_default_method_follows_the_pattern_and_the_sparsity():
    def method(text, sparsity=None):
        return choices.best(patterns.parse(text), sparsity)

    assert method("2:4") == method("vector:v=8", 0.75) == "alps"
    assert method("unstructured", 0.75) == "alps"
    for text in ("flexhinm:v=8", "hinm:v=8"):
        assert method(text, 0.5) == "alps"
        assert method(text, 0.625) == method(text, 0.75) == "staged_alps"
    assert methods.parse("alps", NM(2, 4)).needs == "gram"


def test_the_bundled_text_is_sentences_of_plain_english():
    sentences = sources.read_sentences("builtin")
    assert len(sentences) > 100 and len(set(sentences)) == len(sentences)
    assert all(20 < len(s) < 200 and s.isascii() for s in sentences)
    assert len(sources.read_sentences("builtin", 7)) == 7


def test_the_bundled_text_is_used_with_a_note(model_dir, tmp_path, capsys):
    command = ["prune", str(model_dir), "--out", str(tmp_path / "out")]
    assert main([*command, "--method", "wanda", "--limit", "4"]) == 0
    assert "calibrating on the bundled text" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sentences"] == 4 and report["total"]["zeros"] == 0.5


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffa cat\r\na dog".encode())
    assert sources.read_text(path) == "a cat\r\na dog"
    assert sources.read_sentences(path) == ["a cat", "a dog"]


@pytest.fixture
def datasets(monkeypatch):
    """Stands for the package: a table of two columns, and what was asked for."""
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter(
            [{"text": t, "id": k} for k, t in enumerate(["a b", " ", "c", "d"])]
        )

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_dataset_gives_its_rows_with_text(datasets):
    assert sources.read_sentences("hf:o/n:cfg:train:text", 2) == ["a b", "c"]
    assert sources.read_text("hf:o/n:train:text") == "a b\nc\nd"
    streaming = {"split": "train", "streaming": True}
    assert datasets == [(("o/n", "cfg"), streaming), (("o/n",), streaming)]
    with pytest.raises(ValueError, match="hf:o/n:train:body: KeyError: 'body'"):
        sources.read_text("hf:o/n:train:body")


@pytest.mark.parametrize("name", ["hf:a", "hf:a:b", "hf:a::c:d", "hf:a:b:c:d:e"])
def test_an_odd_name_of_a_dataset_is_refused(name, datasets):
    with pytest.raises(ValueError, match="write hf:DATASET"):
        sources.read_text(name)
    assert datasets == []


def test_missing_packages_are_named(monkeypatch):
    for package, extra, read in (
        ("datasets", "datasets", lambda: sources.read_text("hf:a:b:c")),
        ("huggingface_hub", "hf", lambda: sources.find("no/where")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"flexhinm_jax\[{extra}\]"):
            read()
