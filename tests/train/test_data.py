"""The data is the same every time, and bad files are refused with what is needed."""

import gzip
import struct

import numpy as np
import pytest

from train.lab import data


def write_idx(path, array):
    head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (20, 4, 6), np.uint8),
        "y_train": np.arange(20, dtype=np.uint8) % 3,
        "x_test": rng.integers(0, 256, (6, 4, 6), np.uint8),
        "y_test": np.arange(6, dtype=np.uint8) % 3,
    }


@pytest.fixture
def folder(tmp_path, arrays):
    for name, file in data._IDX_NAMES.items():
        write_idx(tmp_path / file, arrays[name])
    return tmp_path


def test_the_digits_are_split_by_class_and_by_seed():
    first, again, other = data.images(None), data.images(None), data.images(None, 1)
    np.testing.assert_array_equal(first.x_test, again.x_test)
    assert not np.array_equal(first.y_train, other.y_train)
    assert first.x_train.shape[1:] == (8, 8, 1) and first.classes == 10
    counts = np.bincount(first.y_test)
    assert counts.sum() == 540 and np.ptp(counts) <= 3
    assert abs(first.x_train.mean()) < 1e-4 and abs(first.x_train.std() - 1) < 1e-4


def test_idx_files_packed_or_not_and_npz_give_the_same_images(folder, arrays, tmp_path):
    packed = folder / "train-images-idx3-ubyte"
    (folder / "train-images.idx3-ubyte.gz").write_bytes(
        gzip.compress(packed.read_bytes())
    )
    packed.unlink()
    np.savez(tmp_path / "own.npz", **arrays)
    a, b = data.images(folder), data.images(tmp_path / "own.npz")
    assert a.x_train.shape == (20, 4, 6, 1) and a.classes == 3
    for name in arrays:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train-images-idx3-ubyte: the file is empty"),
        (b"\x00\x00", "fewer than 4 bytes, need 0x00000803"),
        (b"\x89PNG" + bytes(60), "magic number 0x89504e47, need 0x00000803"),
        (struct.pack(">II", 0x803, 5), "8 bytes, the header alone has 16"),
        (struct.pack(">4I", 0x803, 5, 4, 6), "0 bytes of data, the header announces"),
    ],
)
def test_a_damaged_idx_file_is_refused(folder, content, message):
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.images(folder)


def test_a_torn_gzip_file_is_refused(folder):
    path = folder / "train-labels-idx1-ubyte"
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(path.read_bytes())[:-9]
    )
    path.unlink()
    with pytest.raises(ValueError, match="idx1-ubyte.gz: not a whole gzip file"):
        data.images(folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no t10k-labels-idx1-ubyte"):
        data.images(folder)
    with pytest.raises(ValueError, match=r"nothing\.npz: there is no such file"):
        data.images(tmp_path / "nothing.npz")
    (tmp_path / "digits.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"digits\.csv: need an .npz file"):
        data.images(tmp_path / "digits.csv")


def test_an_npz_file_without_the_arrays_or_with_wrong_ones_is_refused(tmp_path, arrays):
    path = tmp_path / "own.npz"

    def refused(message, **changed):
        np.savez(path, **(arrays | changed))
        with pytest.raises(ValueError, match=message):
            data.images(path)

    refused(r"x_train has shape \(20, 4\)", x_train=arrays["x_train"][..., 0])
    refused("y_test must be classes", y_test=arrays["y_test"] + 0.5)
    refused("need one size", x_test=arrays["x_test"][:, :3])
    refused("NaN", x_test=np.full((6, 4, 6), np.nan))
    np.savez(path, x_train=arrays["x_train"])
    with pytest.raises(ValueError, match="no y_train, x_test, y_test in it"):
        data.images(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"own\.npz: not an \.npz file"):
        data.images(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"own\.npz: the file is empty"):
        data.images(path)


def test_every_epoch_visits_every_row_once_in_a_new_order():
    epochs = [
        np.concatenate([data.image_rows(12, 4, 0, 3 * e + s) for s in range(3)])
        for e in range(2)
    ]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows), np.arange(12))
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(
        data.image_rows(12, 4, 0, 5), data.image_rows(12, 4, 0, 5)
    )
    with pytest.raises(ValueError, match="batch_size=13: need 1 .. 12"):
        data.image_rows(12, 13, 0, 0)


def test_the_standard_library_is_split_by_file_and_always_the_same():
    first, again = data.text(None, 64, 400_000), data.text(None, 64, 400_000)
    assert first.digest == again.digest
    assert len(first.train) + len(first.valid) == 400_000
    assert 0.01 < len(first.valid) / 400_000 < 0.4
    assert b"import" in first.valid.tobytes()


def test_a_text_file_is_cut_once_and_bad_ones_are_refused(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(bytes(range(250)))
    found = data.text(path, 8)
    np.testing.assert_array_equal(found.valid, np.arange(225, 250))
    with pytest.raises(ValueError, match="25 bytes of validation text, need more than"):
        data.text(path, 30)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"own\.txt: the file is empty"):
        data.text(path, 8)
    with pytest.raises(ValueError, match="there is no such file"):
        data.text(tmp_path / "other.txt", 8)


def test_windows_are_consecutive_bytes_and_follow_the_step():
    source = np.arange(200, dtype=np.uint8)
    batch = data.windows(source, 5, 16, seed=0, step=3)
    assert batch.shape == (5, 17) and batch.dtype == np.int32
    assert (np.diff(batch) == 1).all()
    np.testing.assert_array_equal(batch, data.windows(source, 5, 16, 0, 3))
    assert not np.array_equal(batch, data.windows(source, 5, 16, 0, 4))
    ends = data.even_windows(source, 3, 16)
    assert ends.shape == (3, 17) and ends[0, 0] == 0 and ends[-1, -1] == 199
    assert len(data.even_windows(source, 100, 16)) == 12
