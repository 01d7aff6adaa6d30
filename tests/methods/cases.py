"""Inputs for the claims of the methods."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.cases import stats


def correlated(inputs: int = 32, rank: int = 8):
    """Statistics of inputs that a few directions explain, as in trained networks."""
    keys = jax.random.split(jax.random.key(300), 4)
    x = jax.random.normal(keys[0], (512, rank)) @ jax.random.normal(
        keys[1], (rank, inputs)
    )
    x = x / rank**0.5 + 0.4 * jax.random.normal(keys[2], (512, inputs))
    x = x * jnp.exp(0.5 * jax.random.normal(keys[3], (inputs,)))
    gram = x.T @ x
    return dataclasses.replace(
        stats(),
        sq_norm=jnp.diag(gram),
        mean=x.mean(0),
        count=jnp.float32(512),
        gram=gram,
    )
