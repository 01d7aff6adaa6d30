import errno
import os
import stat
import sys

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors")
from flexhinm_jax.io import tensors  # noqa: E402


@pytest.mark.parametrize("name", tensors.DTYPES)
def test_every_supported_dtype_comes_back_bit_for_bit(tmp_path, name):
    dtype = tensors.DTYPES[name]
    raw = np.random.default_rng(0).integers(0, 2, 6 * dtype.itemsize, np.uint8)
    array = raw.view(dtype).reshape(2, 3)
    tensors.write(tmp_path / "a", {"x": array, "empty": array[:0]})
    back = tensors.read(tmp_path / "a")
    assert back["x"].dtype == dtype
    assert back["x"].tobytes() == array.tobytes()
    assert back["empty"].shape == (0, 3)
    assert tensors.read_header(tmp_path / "a").dtypes["x"] == name


def test_a_transposed_view_is_stored_as_it_looks(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensors.write(tmp_path / "a", {"x": array})
    np.testing.assert_array_equal(tensors.read(tmp_path / "a")["x"], array)


def test_files_are_readable_under_the_usual_permissions(tmp_path):
    tensors.write(tmp_path / "a", {"x": np.zeros(1, np.float32)})
    (tmp_path / "b").write_text("")
    modes = [stat.S_IMODE(os.stat(tmp_path / n).st_mode) for n in "ab"]
    assert modes[0] == modes[1]


def test_an_unsupported_dtype_is_named(tmp_path):
    array = np.zeros(2, ml_dtypes.int4)
    with pytest.raises(ValueError, match="w has dtype int4"):
        tensors.write(tmp_path / "a", {"w": array})


@pytest.mark.parametrize("size", [0, 4, 30, 150])
def test_a_truncated_file_is_named(tmp_path, size):
    path = tmp_path / "cut.safetensors"
    tensors.write(path, {"x": np.zeros(64, np.float32)})
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"cut\.safetensors is truncated"):
        tensors.read(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        tensors.read_header(path)


def test_offsets_beyond_the_end_are_refused(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        tensors.read(tmp_path / "a")


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "[]",
        "7",
        '{"x": null}',
        '{"x": [1]}',
        '{"x": {"dtype": "F32", "shape": [1]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": null}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [[0], [4]]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}',
        '{"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"__metadata__": [1], "x": {"dtype": "F32", "shape": [1], '
        '"data_offsets": [0, 4]}}',
        '{"__metadata__": {"a": 1}, "x": {"dtype": "F32", "shape": [1], '
        '"data_offsets": [0, 4]}}',
    ],
)
def test_a_header_of_another_form_is_refused(tmp_path, header):
    path, text = tmp_path / "odd.safetensors", header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=r"odd\.safetensors is truncated or not a"):
        tensors.read_header(path)


def test_metadata_may_be_null_as_for_other_readers(tmp_path):
    text = (
        b'{"__metadata__": null, "x": {"dtype": "F32", "shape": [1], '
        b'"data_offsets": [0, 4]}}'
    )
    path = tmp_path / "null.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert tensors.read_header(path).metadata == {}
    np.testing.assert_array_equal(tensors.read(path)["x"], np.zeros(1, np.float32))


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError) as raised:
        tensors.write(tmp_path / "no" / "a", {"x": np.zeros(1, np.float32)})
    assert raised.value.errno == errno.ENOENT


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "flexhinm_jax\[hf\]"'):
        tensors.read(tmp_path / "a")
