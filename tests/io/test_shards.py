"""Shards read lazily and written in place, array by array."""

import collections
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors")
from flexhinm_jax.io import huggingface, shards, tensors  # noqa: E402


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(4, 8)).astype(np.float32),
        "b.weight": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "c.ids": np.arange(5, dtype=np.int64)[None],
        "d.scalar": np.float32(2.5).reshape(()),
        "e.empty": np.zeros((0, 3), np.float16),
    }


@pytest.fixture(params=[1, 2])
def source(request, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    held = collections.defaultdict(dict)
    for k, (key, array) in enumerate(arrays().items()):
        name = shards.SINGLE if request.param == 1 else f"part-{k % 2}.safetensors"
        held[name][key] = array
    for name, some in held.items():
        tensors.write(folder / name, some, {"format": "pt", "origin": "test"})
    if request.param > 1:
        names = {key: name for name, some in held.items() for key in some}
        text = json.dumps({"metadata": {}, "weight_map": names})
        (folder / shards.INDEX).write_text(text)
    return folder


def test_arrays_are_mapped_with_their_bits_and_cannot_be_written(source):
    index = shards.read_index(source)
    assert index.size == sum(a.nbytes for a in arrays().values())
    for key, array in arrays().items():
        got = index.read(key)
        assert got.dtype == array.dtype and got.shape == array.shape
        assert got.tobytes() == array.tobytes()
        if array.ndim and array.size:
            assert not got.flags.writeable


def test_opening_reads_headers_only(source, monkeypatch):
    def read(*args):
        raise AssertionError("an array was read")

    monkeypatch.setattr(tensors, "mapped", read)
    monkeypatch.setattr(tensors, "read", read)
    assert shards.read_index(source).shape("a.weight") == (4, 8)


def written(source, folder):
    folder.mkdir(exist_ok=True)
    writer = shards.Writer(folder, shards.read_index(source))
    for key, array in reversed(arrays().items()):
        if key.startswith("a"):
            writer.put(key, array * 2)
        else:
            writer.copy(key)
    writer.flush()
    return writer


def test_what_is_written_in_any_order_is_read_by_others(source, tmp_path):
    written(source, tmp_path / "out").finish()
    shutil.copy(source / "config.json", tmp_path / "out")
    got = huggingface.read(tmp_path / "out")
    assert got.files == huggingface.read(source).files
    for key, array in arrays().items():
        want = array * 2 if key.startswith("a") else array
        assert got.params[key].tobytes() == want.tobytes()
    assert all(m == {"format": "pt", "origin": "test"} for m in got.metadata.values())


def test_nothing_looks_complete_before_the_end(source, tmp_path):
    writer = written(source, tmp_path / "out")
    assert all(p.suffix == ".partial" for p in (tmp_path / "out").iterdir())
    with pytest.raises(FileNotFoundError, match="neither"):
        shards.read_index(tmp_path / "out")
    again = shards.Writer(tmp_path / "out", shards.read_index(source))
    again.finish()
    writer.finish()  # a second time changes nothing
    shards.Writer(tmp_path / "out", shards.read_index(source)).finish()
    assert shards.read_index(tmp_path / "out").read("a.weight")[0, 0] != 0


def test_the_bytes_depend_on_the_contents_alone(source, tmp_path):
    for name in ("one", "two"):
        written(source, tmp_path / name).finish()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_another_shape_or_dtype_is_refused(source, tmp_path):
    writer = written(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a.weight is float32\[2, 8\]"):
        writer.put("a.weight", np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="a.weight is float64"):
        writer.put("a.weight", np.zeros((4, 8)))


def test_files_of_another_checkpoint_are_not_continued(source, tmp_path):
    written(source, tmp_path / "out")
    path = next((tmp_path / "out").iterdir())
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is of another checkpoint"):
        shards.Writer(tmp_path / "out", shards.read_index(source))


@pytest.mark.parametrize("by", [-3, 5])
def test_a_shard_of_another_size_than_its_header_says_is_named(source, by):
    path = next(source.glob("*.safetensors"))
    size = path.stat().st_size
    os.truncate(path, size + by)
    with pytest.raises(ValueError, match=f"has {size + by} bytes, .* promises {size}"):
        shards.read_index(source)


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9))
    shards.check_space(tmp_path / "new" / "folder", 10**9)
    with pytest.raises(OSError, match=r"needs 2.00 GB, but only 1.00 GB are free"):
        shards.check_space(tmp_path / "new" / "folder", 2 * 10**9)
