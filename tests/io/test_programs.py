import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flexhinm_jax.io import programs

X = jnp.ones((2, 4))
ROOT = Path(__file__).parents[2]


def function(turn=jnp.tanh, constant=(1.0, 2.0, 3.0), first=0):
    """A function with most kinds of equations that hold functions or constants."""

    @jax.custom_vjp
    def doubled(h):
        return 2 * h

    doubled.defvjp(lambda h: (doubled(h), None), lambda _, g: (g,))

    def apply_fn(params, x):
        h = jax.nn.silu(jax.nn.relu(x @ params["w"])) + np.array(constant, np.float32)
        h = jax.checkpoint(turn)(h) + jax.random.normal(jax.random.key(first), (3,))
        h, _ = jax.lax.scan(lambda c, w: (turn(c + w), None), h, jnp.ones((2, 2, 3)))
        h = jax.lax.cond(h.sum() > 0, doubled, lambda h: h, h)
        mesh = jax.make_mesh((1, 1), ("data", "model"))
        h = jax.shard_map(turn, mesh=mesh, in_specs=P(), out_specs=P())(h)
        like = jax.ShapeDtypeStruct(h.shape, h.dtype)
        return jax.pure_callback(np.sin, like, jax.nn.softmax(h))

    return apply_fn


def digest(apply_fn, dtype=jnp.float32):
    return programs.digest_of(apply_fn, {"w": jnp.ones((4, 3), dtype)}, X)


def test_a_program_is_told_from_others_and_known_again():
    digests = [
        digest(function()),
        digest(function(jnp.cos)),
        digest(function(constant=(1.0, 2.0, 3.5))),
        digest(function(first=1)),
        digest(function(), jnp.bfloat16),
        digest(lambda params, x: function()(params, 2 * x)),
        digest(lambda params, x: function()(params, 3 * x)),
        digest(lambda params, x: (function()(params, x), x)),
    ]
    assert len(set(digests)) == len(digests)
    jax.clear_caches()
    assert digest(function()) == digests[0]
    renamed = lambda p, x: jax.jit(lambda *args: function()(*args))(p, x)  # noqa: E731
    other = lambda p, x: jax.jit(function())(p, x)  # noqa: E731
    assert digest(renamed) == digest(other)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_finds_the_same(seed):
    code = "from tests.io import test_programs as t; print(t.digest(t.function()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [digest(function())], done.stderr
