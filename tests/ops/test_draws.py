"""Own draws are those of `jax.random`, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.ops import draws

KEYS = {
    "typed": lambda: jax.random.key(7),
    "raw": lambda: jax.random.PRNGKey(7),
    "another generator": lambda: jax.random.key(7, impl="rbg"),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_bits_are_those_of_jax_random(key):
    ours = draws.bits(key(), (3, 17))
    np.testing.assert_array_equal(ours, jax.random.bits(key(), (3, 17), jnp.uint32))


def test_bits_are_those_of_jax_random_under_vmap_and_the_older_order_of_counting():
    keys = jax.random.split(jax.random.key(3), 4)
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            ours = jax.vmap(lambda key: draws.bits(key, (5,)))(keys)
            theirs = jax.vmap(lambda key: jax.random.bits(key, (5,), jnp.uint32))(keys)
        np.testing.assert_array_equal(ours, theirs)
