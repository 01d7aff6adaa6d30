"""Sums over three devices that stand for processes; a program of `test_share.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexhinm_jax.sequential import share


def main():
    """Five batches, so that the last turn has two; sizes that three do not divide."""
    mesh = Mesh(jax.devices()[:3], (share.AXIS,))
    scale = 10.0 ** np.random.default_rng(0).integers(-6, 6, (5, 7, 5))
    batches = np.random.default_rng(1).normal(size=(5, 7, 5)) * scale
    batches = batches.astype(np.float32)
    over = NamedSharding(mesh, P(share.AXIS))
    padded = np.pad(batches.reshape(5, 35), ((0, 1), (0, 1))).reshape(2, 3, 3, 12)
    sums = {"gram": jax.device_put(jnp.zeros((36,), jnp.float32), over)}
    for turn, present in ((0, 3), (1, 2)):
        cut = {"gram": jax.device_put(jnp.asarray(padded[turn]), over)}
        sums = share.exchanged(sums, cut, mesh=mesh, present=present)
    want = functools.reduce(np.add, batches, np.zeros((7, 5), np.float32))
    got = np.asarray(share.whole(mesh, sums["gram"]))[:35].reshape(7, 5)
    np.testing.assert_array_equal(got, want)
    backwards = functools.reduce(np.add, batches[::-1], np.zeros((7, 5), np.float32))
    assert (backwards != want).any(), "the order does not matter for these numbers"
    print("@ok")


if __name__ == "__main__":
    main()
