"""Pruning in two processes; run as a program by `test_meshes.py`.

Arguments: port, rank. Both processes also prune alone on a device of their own.
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax.training import sharding

SPECS = {"up": P(None, "model"), "b": P("model"), "down": P()}


def model(p, x):
    return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]


def data():
    r = np.random.default_rng(0)
    shapes = {"up": (8, 8), "b": (8,), "down": (8, 8)}
    params = {k: r.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return params, [r.normal(size=(4, 3, 8)).astype(np.float32) for _ in range(2)]


def main(port, rank):
    # Before anything touches a device, as the imported programs do.
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    key, (params, batches) = jax.random.key(0), data()
    mesh = sharding.make_mesh(2, 2)
    placed = sharding.put(params, SPECS, mesh)
    # Every process gives its half of the examples.
    halves = [sharding.shard_batch(b[2 * rank : 2 * rank + 2], mesh) for b in batches]
    for prune, method in (
        (fh.prune, fh.Wanda(fh.NM(2, 4))),
        (fh.prune_sequential, fh.SparseGPT(fh.NM(2, 4))),
    ):
        with jax.default_device(jax.local_devices()[0]):
            want = prune(model, params, batches, method, key=key)
        got = prune(model, placed, halves, method, key=key)
        for path, plan in got.plans.items():
            keep = np.asarray(plan.support.keep)
            multihost_utils.assert_equal(keep, f"masks of {path} differ")
            np.testing.assert_array_equal(keep, want.plans[path].support.keep)
        for name, leaf in got.params.items():
            assert isinstance(leaf.sharding, NamedSharding)
            assert leaf.sharding.is_equivalent_to(placed[name].sharding, leaf.ndim)
            for shard in leaf.addressable_shards:
                np.testing.assert_allclose(
                    shard.data, want.params[name][shard.index], atol=1e-4
                )
        assert got.report.total["zeros"] == 0.5
    print("@ok", rank, flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
