"""Packed trees outside the library: orbax alone, `jax.export` in a new process."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flexhinm_jax as fh


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
    "prepared": lambda: fh.kernels.prepare(pruned(fh.NM(2, 4)), "xla"),
}


@pytest.mark.parametrize("name", TREES)
def test_orbax_alone_saves_and_restores_a_packed_tree(name, tmp_path):
    tree = TREES[name]()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "tree", jax.eval_shape(lambda: tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    y = fh.sparsify(apply_fn)(tree, X)
    np.testing.assert_array_equal(fh.sparsify(apply_fn)(back, X), y)
