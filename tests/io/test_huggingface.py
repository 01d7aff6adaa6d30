import errno
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors")
from flexhinm_jax.io import huggingface, tensors  # noqa: E402

CONFIG = {"model_type": "bert", "tie_word_embeddings": True}
METADATA = {"format": "pt", "origin": "test"}


def arrays():
    rng = np.random.default_rng(0)
    return {
        "encoder.0.weight": rng.normal(size=(4, 8)).astype(np.float32),
        "encoder.0.bias": rng.normal(size=4).astype(np.float32),
        "head.weight": rng.normal(size=(2, 4)).astype(ml_dtypes.bfloat16),
        "position_ids": np.arange(5, dtype=np.int64)[None],
    }


def write_others(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the unpruned model")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")


@pytest.fixture
def single(tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    write_others(folder)
    tensors.write(folder / "model.safetensors", arrays(), METADATA)
    return folder


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_others(folder)
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for k, (key, array) in enumerate(arrays().items()):
        shards["ab"[k % 2] + ".safetensors"][key] = array
    for file, held in shards.items():
        tensors.write(folder / file, held, METADATA)
    index = {
        "metadata": {"total_size": sum(a.nbytes for a in arrays().values())},
        "weight_map": {key: file for file, held in shards.items() for key in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(params=["single", "sharded"])
def source(request):
    return request.getfixturevalue(request.param)


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_checkpoint_shows_itself_in_one_line(single):
    told = repr(huggingface.read(single))
    assert told == "Checkpoint('single', 'bert', 4 arrays, 0.0 MB)"


def test_reading_keeps_names_dtypes_and_bits(source):
    checkpoint = huggingface.read(source)
    assert checkpoint.config == CONFIG
    assert set(checkpoint.params) == set(arrays())
    for key, array in arrays().items():
        assert checkpoint.params[key].dtype == array.dtype
        assert checkpoint.params[key].tobytes() == array.tobytes()
    assert all(m == METADATA for m in checkpoint.metadata.values())


def test_an_unchanged_checkpoint_is_written_byte_for_byte(source, tmp_path):
    out = huggingface.write(tmp_path / "out", huggingface.read(source))
    for key, array in huggingface.read(out).params.items():
        assert array.tobytes() == arrays()[key].tobytes()
    unwanted = {"pytorch_model.bin", ".cache", ".cache/lock"}
    assert listing(out) == sorted(set(listing(source)) - unwanted)
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert huggingface.read(out).files == huggingface.read(source).files


def test_a_report_makes_a_card_of_its_own_and_keeps_the_card_before(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\n---\nScores 90.\n")
    params = huggingface.read(source).params
    report = {"method": "Wanda", "total": {"zeros": 0.5}, "weights": [1, 2]}
    out = huggingface.write(tmp_path / "out", params, source=source, report=report)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "Scores 90" not in card
    assert f"# {source.name}, pruned" in card and "| method | Wanda |" in card
    assert "50.0% of 2 weight matrices are zero" in card
    assert "Scores 90" in (out / "README.base.md").read_text()
    assert json.loads((out / "report.json").read_text()) == report


def test_only_the_changed_tensor_changes(source, tmp_path):
    params = dict(huggingface.read(source).params)
    params["encoder.0.weight"] = params["encoder.0.weight"] * 0
    out = huggingface.write(tmp_path / "out", params, source=source)
    for key, array in huggingface.read(out).params.items():
        same = array.tobytes() == arrays()[key].tobytes()
        assert same == (key != "encoder.0.weight")


def test_a_trip_through_jax_keeps_every_dtype(source, tmp_path):
    checkpoint = huggingface.read(source)
    params = jax.tree.map(jnp.asarray, checkpoint.params)
    out = huggingface.write(tmp_path / "out", params, source=checkpoint)
    for key, array in huggingface.read(out).params.items():
        assert array.dtype == arrays()[key].dtype
        assert array.tobytes() == arrays()[key].tobytes()


def test_the_framework_is_always_named(single, tmp_path):
    tensors.write(single / "model.safetensors", arrays(), {"origin": "test"})
    out = huggingface.write(tmp_path / "out", huggingface.read(single))
    assert tensors.read_header(out / "model.safetensors").metadata == METADATA


def test_a_tied_head_that_is_not_stored_stays_so(single, tmp_path):
    params = huggingface.read(single).params
    tied = {**params, "lm_head.weight": params["head.weight"]}
    with pytest.raises(ValueError, match=r"not in the source lm_head\.weight"):
        huggingface.write(tmp_path / "out", tied, source=single)


def test_a_tied_head_may_not_differ_from_its_embedding(single, tmp_path):
    table = np.ones((3, 4), np.float32)
    tied = {"lm_head.weight": table, "model.embed_tokens.weight": table}
    tensors.write(single / "model.safetensors", tied)
    huggingface.write(tmp_path / "same", tied, source=single)
    tied["lm_head.weight"] = table * 0
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        huggingface.write(tmp_path / "out", tied, source=single)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("head.weight"), r"missing head\.weight"),
        (lambda p: p.update(extra=p["head.weight"]), "not in the source extra"),
        (
            lambda p: p.update({"head.weight": p["head.weight"].T}),
            r"head\.weight has shape \(4, 2\), the source has \(2, 4\)",
        ),
        (
            lambda p: p.update({"head.weight": p["head.weight"].astype(np.float32)}),
            r"head\.weight has dtype float32, the source has bfloat16",
        ),
    ],
)
def test_parameters_unlike_the_source_are_refused(source, tmp_path, change, message):
    params = dict(huggingface.read(source).params)
    change(params)
    with pytest.raises(ValueError, match=message):
        huggingface.write(tmp_path / "out", params, source=source)
    assert not (tmp_path / "out").exists()


def test_a_dict_without_a_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source is needed"):
        huggingface.write(tmp_path / "out", arrays())


def test_an_existing_output_is_refused_and_replaced_on_demand(source, tmp_path):
    checkpoint = huggingface.read(source)
    out = huggingface.write(tmp_path / "out", checkpoint)
    before = os.stat(out).st_ino
    with pytest.raises(FileExistsError, match="overwrite=True"):
        huggingface.write(out, checkpoint)
    assert os.stat(out).st_ino == before
    huggingface.write(out, checkpoint, overwrite=True)
    assert os.stat(out).st_ino != before


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_source_is_never_written_over(single, place):
    checkpoint = huggingface.read(single)
    before = listing(single)
    with pytest.raises(ValueError, match="beside the source"):
        huggingface.write(single / place, checkpoint, overwrite=True)
    assert listing(single) == before


def pipe(folder):
    os.mkfifo(folder / "queue")
    return ValueError, r"queue is no file that can be copied \(a pipe"


def dangling(folder):
    (folder / "vocab.txt").symlink_to(folder / "blobs" / "gone")
    return FileNotFoundError, r"vocab\.txt is a link to .*gone, which does not exist"


def unreadable(folder):
    (folder / "secret.json").write_text("{}")
    return PermissionError, r"secret\.json may not be read"


@pytest.mark.parametrize("trouble", [pipe, dangling, unreadable])
@pytest.mark.parametrize("place", [".", "1_Pooling"])
def test_what_cannot_be_copied_is_refused_before_and_not_after(
    single, tmp_path, monkeypatch, trouble, place
):
    checkpoint = huggingface.read(single)
    error, message = trouble(single / place)
    # The rights of the one who runs the tests may be those of root.
    monkeypatch.setattr(
        os, "access", lambda path, mode: "secret" not in os.fspath(path)
    )
    before = listing(tmp_path)
    with pytest.raises(error, match=message):
        huggingface.check_copy(single, tmp_path / "out")
    with pytest.raises(error, match=message):
        huggingface.write(tmp_path / "out", checkpoint)
    assert listing(tmp_path) == before


def test_weights_of_further_modules_are_copied(single, tmp_path):
    parts = [{"type": "t.Transformer", "path": ""}, {"type": "d.Dense"}, {"path": None}]
    parts[1]["path"] = "2_Dense"
    for name in ("2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "o/m.onnx"):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text(name)
    params = huggingface.read(single).params
    for text, copied in ((json.dumps(parts), True), ("[[", False), ("[1]", False)):
        (single / "modules.json").write_text(text)
        out = huggingface.write(tmp_path / "out", params, source=single, overwrite=True)
        for name in ("model.safetensors", "pytorch_model.bin"):
            assert (out / "2_Dense" / name).exists() == copied
        assert not (out / "o").exists() and (out / "modules.json").exists()


def test_a_folder_with_a_config_alone_is_not_replaced(single, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    params = huggingface.read(single)
    with pytest.raises(FileExistsError, match="has a config.json but no weights"):
        huggingface.write(tmp_path / "out", params, overwrite=True)
    assert listing(tmp_path / "out") == ["config.json"]


def test_links_are_followed_once(single, tmp_path):
    """The hub's cache is made of links; one may lead back to a folder above it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("a")
    (single / "more").symlink_to(elsewhere)
    (single / "b.txt").symlink_to(elsewhere / "a.txt")
    (single / "1_Pooling" / "up").symlink_to(single)
    huggingface.write(tmp_path / "out", huggingface.read(single))
    written = set(listing(tmp_path / "out"))
    assert {"more/a.txt", "b.txt"} <= written and "1_Pooling/up" not in written
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    checkpoint = huggingface.read(source)
    before = listing(tmp_path)
    write, calls = tensors.write, []

    def failing(path, *args):
        calls.append(path)
        write(path, *args)
        if len(calls) == len(checkpoint.metadata):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        huggingface.write(tmp_path / "out", checkpoint)
    assert listing(tmp_path) == before


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        huggingface.read(tmp_path / "nowhere")


def test_a_missing_config_is_named(single):
    (single / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        huggingface.read(single)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not valid JSON"),
        ("[1]", r"config\.json holds a list"),
        (b"\xff\xfe\x00", r"config\.json is not valid JSON"),
        ("[" * 100_000, r"config\.json is not valid JSON: nested too deeply"),
    ],
)
def test_a_damaged_config_is_named(single, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (single / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        huggingface.read(single)


def test_missing_weights_are_explained(single):
    (single / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds pytorch_model\.bin"):
        huggingface.read(single)


def test_truncated_weights_are_named(single):
    os.truncate(single / "model.safetensors", 200)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        huggingface.read(single)


def test_a_missing_shard_is_named(sharded):
    (sharded / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        huggingface.read(sharded)


def test_a_truncated_shard_is_named(sharded):
    os.truncate(sharded / "b.safetensors", 100)
    with pytest.raises(ValueError, match=r"b\.safetensors is truncated"):
        huggingface.read(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"ghost": "a.safetensors"}, r"places ghost in a\.safetensors"),
        ({"ghost": "../a.safetensors"}, "not the name of a file"),
        ({"ghost": 3}, "not the name of a file"),
        ({"ghost": ["a.safetensors"]}, "not the name of a file"),
        ({"ghost": {}}, "not the name of a file"),
        ({"ghost": None}, "not the name of a file"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_a_wrong_index_is_explained(sharded, weight_map, message):
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        huggingface.read(sharded)


def test_a_key_that_the_index_forgot_is_read_and_written(sharded, tmp_path):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["head.weight"]
    path.write_text(json.dumps(index))
    out = huggingface.write(tmp_path / "out", huggingface.read(sharded))
    assert set(huggingface.read(out).params) == set(arrays())


def test_an_unsupported_dtype_is_named(single):
    header = b'{"w":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + b"1234"
    (single / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="w has dtype F8_E8M0; supported are"):
        huggingface.read(single)
