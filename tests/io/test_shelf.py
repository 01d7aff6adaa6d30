import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.io import shelf

DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int4", "int8", "bool", "complex64"]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_comes_back_bit_for_bit(tmp_path, dtype, durable):
    x = np.asarray(jnp.arange(-3, 3).reshape(2, 3).astype(dtype)).T
    stored = shelf.store(tmp_path / "new" / "x", x, durable=durable)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x"]
    for back in (stored.read(), stored.mapped()):
        assert back.dtype == x.dtype and back.shape == (3, 2)
        assert back.tobytes() == x.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        stored.mapped()[0, 0] = 1


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,) * 32])
def test_scalars_empty_arrays_and_many_axes_come_back(tmp_path, shape):
    x = np.full(shape, 7, np.float32)
    stored = shelf.store(tmp_path / "x", x)
    for back in (stored.read(), stored.mapped()):
        np.testing.assert_array_equal(back, x, strict=True)


def test_beyond_the_limit_arrays_go_to_files_that_are_removed(tmp_path):
    kept = shelf.Shelf(100, tmp_path)
    arrays = [np.full(10, k, np.float32) for k in range(5)]  # 40 bytes each
    places = [kept.put(x) for x in arrays]
    assert kept.held == kept.peak == 80
    assert [isinstance(p, shelf.Stored) for p in places] == [False] * 2 + [True] * 3
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3
    for x, place in zip(arrays, places, strict=True):
        np.testing.assert_array_equal(kept.get(place), x, strict=True)
    kept.drop(places[0])
    assert kept.held == 40
    kept.drop(places[4])
    assert len(list(folder.iterdir())) == 2
    assert kept.put(arrays[0]) is arrays[0]  # there is room again
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_durable_arrays_are_in_files_of_the_caller_in_any_case(tmp_path):
    kept = shelf.Shelf(50)
    first, second = (np.full(10, k, np.float32) for k in range(2))
    assert kept.put(first, tmp_path / "a", durable=True) is first
    place = kept.put(second, tmp_path / "b", durable=True)
    assert place == shelf.Stored(tmp_path / "b")
    np.testing.assert_array_equal(shelf.Stored(tmp_path / "a").read(), first)
    kept.drop(place)
    kept.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_keys_stay_in_memory_and_mapped_arrays_where_they_are(tmp_path):
    kept = shelf.Shelf(0)
    key = jax.random.key(0)
    assert kept.put(key) is key
    there = shelf.store(tmp_path / "x", np.ones(3, np.float32))
    assert kept.put(there) is there
    view = there.mapped()[1:]
    assert kept.put(view) is view and kept.get(view) is view
    assert kept.folder is None
