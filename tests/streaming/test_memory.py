"""Bytes of a walk, from shapes alone."""

import jax
import jax.numpy as jnp

import flexhinm_jax as fh
from flexhinm_jax.sequential import cuts
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.streaming import memory


def chain(params, x):
    h = jnp.tanh(x @ params["first"])
    return h @ params["second"] + params["bias"]


def test_memory_is_known_before_the_walk():
    like = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in {"first": (8, 16), "second": (16, 8), "bias": (8,)}.items()
    }
    batch = (jax.ShapeDtypeStruct((32, 8), jnp.float32),)
    uses = fh.discover(chain, like, *batch)
    request = Request(method=fh.Wanda(fh.NM(2, 4)), key=jax.random.key(5))
    job = Job(chain, like, [batch] * 2, uses, request)
    ahead = memory.Ahead()
    walk = cuts.Walk(job, memory.Ledger(), to_end=True)
    first, second, end = memory.stages(walk, ahead)
    assert [s.paths for s in (first, second, end)] == [("first",), ("second",), ()]
    # The input, then what lies between the layers, then the result: of two batches.
    assert [s.held for s in (first, second, end)] == [
        2 * 32 * 4 * n for n in (8, 16, 8)
    ]
    assert [s.stats for s in (first, second)] == [4 * 8 * 8, 4 * 16 * 16]
    assert first.step == 0 and second.step >= 32 * 4 * (8 + 16)
    assert second.solver >= 2 * 4 * 16 * 8  # the weight and its plan
    assert len(ahead.known) == 2
    assert memory.resident_peak() > 1 << 20
