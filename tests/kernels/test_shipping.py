"""Packed trees outside the library: orbax alone, `jax.export` in a new process."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export

import flexhinm_jax as fh
from flexhinm_jax import types
from flexhinm_jax.io import packed as packed_file


def apply_fn(params, x):
    return jnp.tanh(x @ params["up"]["w"] + params["up"]["b"]) @ params["down"]


def pruned(pattern, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "up": {"w": jax.random.normal(keys[0], (16, 32), dtype), "b": jnp.ones(32)},
        "down": jax.random.normal(keys[1], (32, 8), dtype),
    }
    uses = fh.discover(apply_fn, params, X)
    method, sparsity = fh.Magnitude(pattern), 0.5
    states = fh.solve(method, jax.random.key(1), params, uses, None, sparsity=sparsity)
    return fh.pack(fh.decide(method, states, params, uses), params, uses)


X = jax.random.normal(jax.random.key(3), (5, 16))
TREES = {
    "2:4": lambda: pruned(fh.NM(2, 4)),
    "vector": lambda: pruned(fh.Vector(4), jnp.bfloat16),
    "flexhinm": lambda: pruned(fh.FlexHiNM(4, permute=None)),
    "prepared": lambda: fh.kernels.prepare(tree_of("2:4"), "xla"),
    "8:16": lambda: pruned(fh.NM(8, 16)),
}


@functools.cache
def tree_of(name):
    return TREES[name]()


@pytest.mark.parametrize("name", sorted(TREES.keys() - {"8:16"}))
def test_orbax_alone_saves_and_restores_a_packed_tree(name, tmp_path):
    tree = tree_of(name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "tree", jax.eval_shape(lambda: tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    y = fh.sparsify(apply_fn)(tree, X)
    np.testing.assert_array_equal(fh.sparsify(apply_fn)(back, X), y)


def rows(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(export.symbolic_shape(shape), dtype)


@pytest.mark.parametrize("name", TREES)
def test_a_program_of_any_batch_survives_serialisation(name):
    pytest.importorskip("flatbuffers")
    tree = tree_of(name)
    sparse = jax.jit(fh.sparsify(apply_fn))
    exported = export.export(sparse, platforms=["cpu"])(tree, rows("b, 16"))
    back = export.deserialize(exported.serialize())
    assert back.in_tree == jax.tree.structure(((tree, 0), {}))
    for n in (1, 8, 70):
        x = jax.random.normal(jax.random.key(n), (n, 16))
        want = np.asarray(sparse(tree, x), np.float32)
        np.testing.assert_allclose(back.call(tree, x), want, rtol=1e-4, atol=1e-4)


def test_an_exported_program_has_derivatives_in_input_and_values():
    pytest.importorskip("flatbuffers")
    tree = tree_of("flexhinm")
    sparse = jax.jit(fh.sparsify(apply_fn))
    exported = export.export(sparse, platforms=["cpu"])(tree, rows("b, t, 16"))
    back = export.deserialize(exported.serialize(vjp_order=1))
    x = jax.random.normal(jax.random.key(4), (2, 3, 16))
    loss = lambda f: lambda tree, x: jnp.sin(f(tree, x)).sum()  # noqa: E731
    gradient = lambda f: jax.grad(loss(f), (0, 1), allow_int=True)(tree, x)  # noqa: E731
    for got, want in zip(
        *(jax.tree.leaves(gradient(f)) for f in (back.call, sparse)), strict=True
    ):
        if got.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


CODE = """
import sys
import numpy as np
from jax import export
import flexhinm_jax
from flexhinm_jax.io import packed
program, file, x, y = sys.argv[1:]
exported = export.deserialize(bytearray(open(program, "rb").read()))
np.save(y, exported.call(packed.read_packed(file), np.load(x)))
"""


def test_a_new_process_runs_an_exported_program_on_a_packed_file(tmp_path):
    pytest.importorskip("flatbuffers")
    pytest.importorskip("safetensors")
    tree = {"w": tree_of("flexhinm")["up"]["w"]}
    sparse = jax.jit(fh.sparsify(lambda p, x: x @ p["w"]))
    program, file, x, y = (str(tmp_path / name) for name in "pfxy")
    exported = export.export(sparse, platforms=["cpu"])(tree, rows("b, 16"))
    (tmp_path / "p").write_bytes(exported.serialize())
    packed_file.write_packed(file, tree)
    np.save(x + ".npy", X)
    arguments = [program, file, x + ".npy", y + ".npy"]
    subprocess.run([sys.executable, "-c", CODE, *arguments], check=True)
    want = sparse(tree, X)
    np.testing.assert_allclose(np.load(y + ".npy"), want, rtol=1e-5, atol=1e-5)


def test_every_pytree_of_the_library_can_be_an_argument_of_an_exported_program():
    pytest.importorskip("flatbuffers")
    a = jnp.ones(3)
    layout = types.Layout((4, 4), (), (types.AxisFactor(1, 1, 4),), ())
    regions = types.Regions(a, a, a, a, 2, 4)
    block = types.BlockDiagonal(a)
    support = types.Support(a, regions)
    weight = types.PackedWeight(
        None, None, a, a, a, a, block, None, (4, 4), 2, 4, layout
    )
    tree = {
        "plan": types.Plan(a, support, a, None, block),
        "state": types.State((), (a, regions)),
        "stats": types.Stats(a, a, a),
        "weight": weight,
        "transposed": types.TransposedWeight(weight),
    }
    exported = export.export(jax.jit(lambda tree: tree))(tree)
    back = export.deserialize(exported.serialize())
    assert back.in_tree == jax.tree.structure(((tree,), {}))
    called: Any = back.call(tree)
    assert called["weight"].layout == layout
