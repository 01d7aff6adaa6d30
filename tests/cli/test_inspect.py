import json

import numpy as np
import pytest
import safetensors.numpy

from flexhinm_jax.cli.main import main


@pytest.fixture
def width():
    return 64


def test_every_leaf_is_listed_as_prunable_or_with_a_reason(model_dir, capsys):
    assert main(["inspect", str(model_dir), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    stored = safetensors.numpy.load_file(model_dir / "model.safetensors")
    leaves = {leaf["path"]: leaf for leaf in document["leaves"]}
    assert leaves.keys() == stored.keys()
    for path, leaf in leaves.items():
        assert leaf["shape"] == list(stored[path].shape)
        assert leaf["bytes"] == stored[path].nbytes
        assert bool(leaf["reason"]) != leaf["prunable"]
    prunable = [path for path, leaf in leaves.items() if leaf["prunable"]]
    assert len(prunable) == 2 * 6
    assert all(path.startswith("encoder.layer.") for path in prunable)
    assert leaves["encoder.layer.0.intermediate.dense.weight"]["matrix"] == [64, 32]
    assert document["prunable"]["leaves"] == 12
    assert document["all"]["bytes"] == sum(a.nbytes for a in stored.values())


def test_zeros_of_a_leaf_are_counted(model_dir, capsys):
    path = model_dir / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    stored["pooler.dense.weight"] = np.tile(np.array([0, 0, 0, 1], np.float32), (32, 8))
    safetensors.numpy.save_file(stored, path, {"format": "pt"})
    main(["inspect", str(model_dir), "--json"])
    leaves = json.loads(capsys.readouterr().out)["leaves"]
    zeros = {leaf["path"]: leaf["zeros"] for leaf in leaves}
    assert zeros["pooler.dense.weight"] == 0.75


def test_the_table_names_every_leaf_in_full_and_the_totals(model_dir, capsys):
    assert main(["inspect", str(model_dir), "--rows", "all"]) == 0
    out, err = capsys.readouterr()
    assert "encoder.layer.1.attention.output.LayerNorm.weight " in out
    assert "yes, [64, 32]" in out
    assert "12 of " in out
    assert err == ""


def test_equal_leaves_of_all_layers_share_a_row(model_dir, capsys):
    assert main(["inspect", str(model_dir)]) == 0
    out = capsys.readouterr().out
    assert "encoder.layer.*.attention.self.query.weight x2 " in out
    assert "pooler.dense.weight " in out and "layer.0" not in out
    assert "12 of " in out


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named_in_one_line(model_dir, capsys, missing):
    (model_dir / missing).unlink()
    assert main(["inspect", str(model_dir)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flexhinm: error: ") and err.count("\n") == 1
    assert missing in err
