import dataclasses
import errno
import json
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax import kernels  # noqa: E402
from flexhinm_jax.io import packed, tensors  # noqa: E402
from flexhinm_jax.kernels import positions, validation  # noqa: E402
from flexhinm_jax.ops import words  # noqa: E402
from flexhinm_jax.types import (  # noqa: E402
    AxisFactor,
    BlockDiagonal,
    Layout,
    PackedWeight,
)


def layout_of(stack=()):
    """A leaf [*stack, 16, 2, 4]: 16 inputs, outputs along two axes."""
    k = len(stack)
    return Layout(
        shape=(*stack, 16, 2, 4),
        stack=tuple(AxisFactor(axis, 1, size) for axis, size in enumerate(stack)),
        out=(AxisFactor(k + 1, 1, 2), AxisFactor(k + 2, 1, 4)),
        inputs=(AxisFactor(k, 1, 16),),
    )


LAYOUT = layout_of()


def weight(dtype=jnp.bfloat16, layout=None, stack=(), wrapped=False, n=2, m=4):
    """[8, 16] in two tiles of four rows: D = 3 dense and H = 8 N:M columns."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(*stack, *shape)), dtype)

    # The inputs of a tile are distinct.
    inputs = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (*stack, 2, 16))
    inputs = jnp.asarray(rng.permuted(inputs, axis=-1))
    kept = 8 // m * n
    first = np.tile(np.arange(n, dtype=np.uint32), kept // n)  # of every group
    stored = positions.encode(np.broadcast_to(first, (*stack, 2, 4, kept)), n, m)
    order = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32)[::-1], (*stack, 8))
    back = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[::-1], (*stack, 16))
    return PackedWeight(
        dense_index=inputs[..., :3],
        dense_values=normal(2, 4, 3),
        nm_index=inputs[..., 3:11],
        nm_values=normal(2, 4, kept),
        nm_positions=jnp.asarray(stored),
        out_order=order,
        left=BlockDiagonal(normal(2, 4, 4)) if wrapped else None,
        right=BlockDiagonal(normal(4, 4, 4), back) if wrapped else None,
        shape=(8, 16),
        n=n,
        m=m,
        layout=layout,
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_packed_weight_comes_back_bit_for_bit(tmp_path, dtype, stack, wrapped):
    leaves = {
        "layer/w": weight(dtype, layout_of(stack), stack, wrapped),
        "layer/b": jnp.ones(8, dtype),
        "ids": np.arange(3, dtype=np.int64),
    }
    path = packed.write_packed(tmp_path / "packed.safetensors", leaves)
    back = packed.read_packed(path)
    assert_same(back, leaves)
    assert back["layer/w"].layout == layout_of(stack)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (3, 4), (4, 4), (2, 8)])
def test_every_group_size_comes_back(tmp_path, n, m):
    leaves = {"w": weight(n=n, m=m)}
    path = packed.write_packed(tmp_path / "p", leaves)
    assert_same(packed.read_packed(path), leaves)


def test_regions_without_columns_come_back(tmp_path):
    full = weight()
    groups, dense = (
        dict.fromkeys(names) for names in (validation.GROUPS, validation.DENSE)
    )
    leaves = {
        "vector": dataclasses.replace(full, **groups),
        "nm": dataclasses.replace(full, **dense),
    }
    path = packed.write_packed(tmp_path / "p", leaves)
    assert_same(packed.read_packed(path), leaves)
    shapes = tensors.read_header(path).shapes
    assert shapes["vector#nm_values"][-1] == shapes["nm#dense_index"][-1] == 0


def test_empty_arrays_of_older_trees_and_files_are_read_as_none(tmp_path):
    full = weight()
    cut = lambda names: {f: getattr(full, f)[..., :0] for f in names}  # noqa: E731
    leaves = {
        "nm": dataclasses.replace(full, **cut(validation.DENSE)),
        "nothing": dataclasses.replace(
            full, **cut(validation.DENSE + validation.GROUPS)
        ),
    }
    path = packed.write_packed(tmp_path / "p", leaves)
    back = packed.read_packed(path)
    assert back["nm"].dense_values is None
    assert all(array.size for array in jax.tree.leaves(back))
    assert not kernels.unpack(back["nothing"]).any()


def test_a_nested_tree_is_restored_into_its_structure(tmp_path):
    tree = {"params": {"a": weight(), "b": [jnp.zeros(2), None, (jnp.ones(1),)]}}
    path = packed.write_packed(tmp_path / "p", tree)
    assert set(packed.read_packed(path)) == {"a", "b/0", "b/2/0"}
    assert_same(packed.read_packed(path, like=tree), tree)


def test_dense_parameters_can_give_the_structure(tmp_path):
    tree = {"a": weight(), "b": jnp.zeros(2)}
    path = packed.write_packed(tmp_path / "p", tree)
    like = {"a": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16), "b": 0}
    assert_same(packed.read_packed(path, like=like), tree)


def test_another_structure_is_refused_by_leaf(tmp_path):
    path = packed.write_packed(tmp_path / "p", {"a": weight(), "b": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"missing in the file \['c'\].*\['b'\]"):
        packed.read_packed(path, like={"a": 0, "c": 0})


def test_the_file_opens_with_any_safetensors_reader(tmp_path):
    from safetensors.numpy import load_file

    w = weight(jnp.float32)
    path = packed.write_packed(tmp_path / "p", {"w": w})
    arrays = load_file(path)
    assert set(arrays) == {f"w#{f}" for f in packed.ARRAYS}
    np.testing.assert_array_equal(arrays["w#nm_values"], w.nm_values)
    metadata = tensors.read_header(path).metadata
    assert (metadata["format"], metadata["version"]) == ("flexhinm_jax.packed", "2")
    assert json.loads(metadata["packed"])["w"] == {
        "shape": [8, 16],
        "n": 2,
        "m": 4,
        "dtype": "float32",
        "stack": [],
        "left": False,
        "right": False,
        "layout": None,
    }


def test_a_file_cannot_be_overwritten_by_accident(tmp_path):
    path = packed.write_packed(tmp_path / "p", {"w": weight()})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        packed.write_packed(path, {"w": weight()})
    packed.write_packed(path, {"v": weight()}, overwrite=True)
    assert list(packed.read_packed(path)) == ["v"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def failing(path, *args):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        packed.write_packed(tmp_path / "p", {"w": weight()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("leaf", [1.5, "text", jax.random.key(0)])
def test_a_leaf_that_is_no_array_of_numbers_is_refused(tmp_path, leaf):
    with pytest.raises(ValueError, match="^step is .*take the leaf out"):
        packed.write_packed(tmp_path / "p", {"step": leaf})


def test_two_leaves_of_one_name_are_refused(tmp_path):
    tree = {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}
    with pytest.raises(ValueError, match="share the normalised path 'a/b'"):
        packed.write_packed(tmp_path / "p", tree)
    tree = {"w": weight(), "w#out_order": jnp.zeros(1)}
    with pytest.raises(ValueError, match="stored as w#out_order"):
        packed.write_packed(tmp_path / "p", tree)


def rewritten(tmp_path, change, *, checksums=True):
    """A valid file with `change(arrays, description, metadata)` applied."""
    good = packed.write_packed(
        tmp_path / "good", {"enc/w": weight(wrapped=True, layout=LAYOUT)}
    )
    arrays, metadata = tensors.read(good), tensors.read_header(good).metadata
    description = json.loads(metadata["packed"])
    if not checksums:  # as early versions wrote it
        del metadata["checksums"]
    change(arrays, description["enc/w"], metadata)
    metadata.setdefault("packed", "")
    if metadata["packed"].startswith("{"):
        metadata["packed"] = json.dumps(description)
    tensors.write(tmp_path / "bad", arrays, metadata)
    return tmp_path / "bad"


def put(field, value):
    def change(arrays, description, metadata):
        arrays[f"enc/w#{field}"].flat[0] = value

    return change


def replace(field, make):
    def change(arrays, description, metadata):
        arrays[f"enc/w#{field}"] = make(arrays[f"enc/w#{field}"])

    return change


def describe(**fields):
    return lambda arrays, description, metadata: description.update(fields)


def layout(**fields):
    return lambda arrays, description, metadata: description["layout"].update(fields)


def same(index, a, b):
    index[0, a] = index[0, b]
    return index


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("dense_index", 16), "dense_index has an index outside 0 .. 15"),
        (put("nm_index", -1), "nm_index has an index outside 0 .. 15"),
        (put("out_order", 0), "out_order is not a permutation"),
        (put("nm_positions", 0), "nm_positions do not increase"),
        (replace("nm_values", lambda a: a[..., :-1]), r"nm_values is .*expected"),
        (replace("nm_values", lambda a: a.astype(np.float32)), "nm_values is float32"),
        (replace("nm_positions", lambda a: a.astype(np.int32)), "nm_positions is int"),
        (replace("dense_index", lambda a: a[0]), "dense_index has shape"),
        (replace("nm_index", lambda a: a[..., :6]), "do not fit shape"),
        (replace("dense_index", lambda a: a[:0]), "do not fit shape"),
        (replace("out_order", lambda a: a[:4]), "out_order is"),
        (replace("left", lambda a: a[:1]), "left has blocks"),
        (replace("right", lambda a: a[0]), "right has blocks"),
        (put("right_order", 0), "right_order is not a permutation of 16 channels"),
        (replace("right_order", lambda a: a[:8]), "right_order is not a permutation"),
        (describe(orders=["up"]), "description is damaged"),
        (describe(orders="left"), "description is damaged"),
        (describe(m=1 << 40), "description is damaged"),
        (describe(shape=[-8, -16]), "description is damaged"),
        (describe(stack=[0]), "description is damaged"),
        (describe(stack={"a": 1}), "description is damaged"),
        (replace("nm_index", lambda a: np.roll(a, 1, -1) * 0 + a[..., :1]), "twice"),
        (replace("nm_index", lambda a: same(a, 0, 5)), "input 1?[0-9] is there twice"),
        (replace("dense_index", lambda a: same(a, 0, 2)), "twice in tile 0"),
        (layout(shape=[15, 2, 4]), "layout covers .16, 2, 4. of a leaf of shape .15"),
        (layout(shape=[16, 8]), "does not divide the leaf"),
        (layout(shape=[-16, 2, 4]), "description is damaged"),
        (layout(shape=[16, 2, 4, 1, 2]), "layout covers"),
        (layout(inputs=[]), "its layout is one of .8, 1."),
        (layout(inputs=[[0, 1, 4]]), "its layout is one of .8, 4."),
        (layout(inputs=[[-1, 1, 16]]), "does not divide the leaf"),
        (layout(inputs=[[9, 1, 16]]), "does not divide the leaf"),
        (layout(inputs=[[0, 2, 16]]), "does not divide the leaf"),
        (layout(out=[[1, 1, 2], [1, 1, 4]]), "does not divide the leaf"),
        (layout(out=[[0, 1, 8]]), "does not divide the leaf"),
        (layout(stack=[[3, 1, 1]]), "its layout is one of .1, 8, 16."),
        (layout(out=[[1, 1]]), "description is damaged"),
        (layout(out="12"), "description is damaged"),
        (describe(m=8), "expected"),
        (describe(n=0), "description is damaged"),
        (describe(n=True), "description is damaged"),
        (describe(shape=[8]), "description is damaged"),
        (describe(dtype="complex"), "description is damaged"),
        (describe(dtype=["float32"]), "description is damaged"),
        (describe(layout={"shape": [1]}), "description is damaged"),
        (describe(stack=[2]), "dense_index has shape"),
        (lambda a, d, m: d.pop("left"), "description is damaged"),
        (lambda a, d, m: d.clear(), "description is damaged"),
        (lambda a, d, m: a.pop("enc/w#nm_index"), "enc/w#nm_index is missing"),
        (lambda a, d, m: a.pop("enc/w#right"), "enc/w#right is missing"),
    ],
)
def test_a_damaged_leaf_is_named(tmp_path, change, message, checksums):
    path = rewritten(tmp_path, change, checksums=checksums)
    with pytest.raises(ValueError, match=f"bad: enc/w: .*{message}"):
        packed.read_packed(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, d, m: m.update(version="3"), "version '3'.*reads versions 1 and 2"),
        (lambda a, d, m: m.pop("version"), "version None"),
        (lambda a, d, m: m.update(format="pt"), "not a packed file"),
        (lambda a, d, m: m.pop("format"), "not a packed file"),
        (lambda a, d, m: m.update(packed="x"), "description is not valid JSON"),
        (lambda a, d, m: m.update(packed="[]"), "not a JSON object"),
        (
            lambda a, d, m: m.update(packed="[" * 100_000),
            "description is .* too deeply",
        ),
        (lambda a, d, m: m.update(checksums="null"), "checksums holds a NoneType"),
        (lambda a, d, m: m.update(checksums="[" * 100_000), "checksums is .* deeply"),
        (lambda a, d, m: m.update(checksum="{}"), "unknown metadata 'checksum'"),
        (lambda a, d, m: m.update(checksums="{}"), "enc/w: its checksum is not"),
        (lambda a, d, m: a.update({"enc/w": np.ones(1, np.int8)}), "stored twice"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"bad.*{message}"):
        packed.read_packed(rewritten(tmp_path, change))


def small():
    """A leaf that is packed and one that is not, in a file of 2 kB."""
    w = jnp.asarray([[4.0, 1, 0, 3], [0, 2, 5, 1]], jnp.float32)
    method = fh.Magnitude(fh.NM(2, 4))
    leaf = kernels.pack(method.decide(method.solve(jax.random.key(0), w, None), w))
    return {"w": leaf, "b": np.arange(3, dtype=np.float32)}


@pytest.mark.parametrize(
    "bits", [range(1), pytest.param(range(1, 8), marks=pytest.mark.slow)]
)
def test_every_flipped_bit_is_caught(tmp_path, bits):
    data = packed.write_packed(tmp_path / "p", small()).read_bytes()
    bad = tmp_path / "bad"
    for at in range(len(data)):
        for bit in bits:
            flipped = bytearray(data)
            flipped[at] ^= 1 << (at + bit) % 8
            bad.write_bytes(flipped)
            with pytest.raises(ValueError, match="bad"):
                packed.read_packed(bad)
    assert len(data) < 3000


def test_a_file_without_checksums_opens(tmp_path):
    path = rewritten(tmp_path, lambda *_: None, checksums=False)
    assert set(tensors.read_header(path).metadata) == {"format", "version", "packed"}
    assert_same(packed.read_packed(path)["enc/w"], weight(wrapped=True, layout=LAYOUT))


OLD = Path(__file__).parent / "fixtures" / "packed-version-1.safetensors"
"""Written by the library before positions had ranks: every weight "a" has its dense
matrix "a_dense" beside it."""


def test_a_file_of_version_1_opens(tmp_path):
    assert tensors.read_header(OLD).metadata["version"] == "1"
    old = packed.read_packed(OLD)
    names = [name for name in old if f"{name}_dense" in old]
    assert {(old[k].n, old[k].m) for k in names} >= {(2, 4), (4, 8), (6, 8), (8, 16)}
    for name in names:
        np.testing.assert_array_equal(kernels.unpack(old[name]), old[f"{name}_dense"])
    path = packed.write_packed(tmp_path / "p", old)
    assert tensors.read_header(path).metadata["version"] == "2"
    assert path.stat().st_size < OLD.stat().st_size
    again = packed.read_packed(path)
    for name in names:
        assert_same(again[name], old[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * 0, "nm_positions do not increase"),
        (lambda a: a | np.uint32(0xFF), "do not increase|outside 0"),
        (lambda a: a[..., :-1], "nm_positions is uint32"),
        (lambda a: a.astype(np.int32), "nm_positions is int32"),
    ],
)
def test_damaged_positions_of_version_1_are_named(tmp_path, change, message):
    arrays = {k: np.asarray(v) for k, v in tensors.read(OLD).items()}
    arrays["4:8#nm_positions"] = change(arrays["4:8#nm_positions"])
    metadata = dict(tensors.read_header(OLD).metadata)
    del metadata["checksums"]
    tensors.write(tmp_path / "bad", arrays, metadata)
    with pytest.raises(ValueError, match=f"4:8: .*{message}"):
        packed.read_packed(tmp_path / "bad")


def test_a_rank_out_of_range_is_named(tmp_path):
    bad = dataclasses.replace(
        weight(n=4, m=8), nm_positions=weight(n=4, m=8).nm_positions * 0 + 127
    )
    with pytest.raises(ValueError, match=r"w: nm_positions has a rank outside 0 .. 69"):
        packed.write_packed(tmp_path / "p", {"w": bad})


def test_padding_columns_may_repeat_an_input(tmp_path):
    """A tile with fewer columns repeats one with value zero, also after folding."""
    w = weight()
    dense, nm = np.array(w.dense_index), np.array(w.nm_index)
    nm[0, 4:], dense[1, 2] = nm[0, 0], dense[1, 0]
    values, kept = np.array(w.dense_values), np.array(w.nm_values)
    kept[0, :, 2:], values[1, :, 2] = 0, 0
    index = {"dense_index": jnp.asarray(dense), "nm_index": jnp.asarray(nm)}
    filled = {"dense_values": jnp.asarray(values), "nm_values": jnp.asarray(kept)}
    leaf = dataclasses.replace(w, **index, **filled)
    path = packed.write_packed(tmp_path / "p", {"w": leaf})
    assert_same(packed.read_packed(path)["w"], leaf)
    with pytest.raises(ValueError, match="is there twice in tile 0"):
        packed.write_packed(tmp_path / "q", {"w": dataclasses.replace(w, **index)})


def test_a_layout_that_does_not_fit_is_not_written(tmp_path):
    leaf = weight(layout=layout_of((3,)))
    with pytest.raises(ValueError, match=r"w: its layout is one of \[3, 8, 16\]"):
        packed.write_packed(tmp_path / "p", {"w": leaf})
    assert os.listdir(tmp_path) == []


def test_a_truncated_file_is_named(tmp_path):
    path = packed.write_packed(tmp_path / "p.safetensors", {"w": weight()})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"p\.safetensors is truncated"):
        packed.read_packed(path)


def test_a_weight_that_breaks_its_promises_is_not_written(tmp_path):
    bad = dataclasses.replace(weight(), nm_index=weight().nm_index + 16)
    with pytest.raises(ValueError, match="w: nm_index has an index outside"):
        packed.write_packed(tmp_path / "p", {"w": bad})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 14, 30, 32])
def test_numbers_are_read_as_the_kernels_pack_them(bits):
    given = np.random.default_rng(0).integers(0, 1 << bits, (2, 3, 21), np.uint32)
    stored = jax.jit(words.to_words, static_argnums=1)(given, bits)
    np.testing.assert_array_equal(stored, words.to_words(given, bits))
    assert stored.shape == (2, 3, -(-21 * bits // 32))
    for kind in (np.asarray, jnp.asarray):
        got = words.from_words(kind(stored), 21, bits)
        assert isinstance(got, type(kind(stored)))
        np.testing.assert_array_equal(got, given)


def test_what_the_kernels_pack_computes_the_same_after_a_round_trip(tmp_path):
    w = weight(jnp.float32)
    path = packed.write_packed(tmp_path / "p", {"w": w})
    back = packed.read_packed(path)["w"]
    unpack = jax.jit(kernels.unpack)
    chex.assert_trees_all_equal(unpack(back), unpack(w))
