"""The same training in two processes; run as a program by `test_sharding.py`.

Arguments: port, rank. Both processes also train alone on their own device and compare.
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax.training import sharding


def main(port, rank):
    # Before anything touches a device, as the imported programs do.
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    from tests.training import on_devices, program

    assert jax.device_count() == 4 and jax.local_device_count() == 2
    mine = program.params()
    with jax.default_device(jax.local_devices()[0]):
        uses, training = on_devices.start(mine)
        alone = on_devices.train(training, uses, lambda b: b)
    on_devices.ALONE = alone
    mesh = sharding.make_mesh(4)
    params = sharding.put(mine, jax.tree.map(lambda _: P(), mine), mesh)

    def place(batch):
        part = jax.tree.map(lambda x: x[8 * rank : 8 * rank + 8], batch)
        return sharding.shard_batch(part, mesh)

    uses, training = on_devices.start(params)
    losses, training = on_devices.train(training, uses, place)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for path, state in training.states.items():
        support = jax.tree.map(np.asarray, state.fixed["support"])
        multihost_utils.assert_equal(support, f"supports of {path} differ")
        want = alone[1].states[path].fixed["support"]
        assert jax.tree.all(jax.tree.map(np.array_equal, support, want)), path
    zeros = np.asarray(training.params["in"]) == 0
    assert zeros.mean() == 0.75
    assert isinstance(training.params["in"].sharding, NamedSharding)
    fh.check_sharding(training.params, uses, on_devices.METHOD)
    print("@ok", rank, flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
