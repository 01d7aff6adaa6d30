import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.models import batches, encoder
from tests.train.small import CONFIG
from train.lab import packing

LISTS = [[2, 5, 6, 3], [2, 7, 3], [2, 8, 9, 10, 11, 3], [2, 3], [2] * 9, [4, 4, 4]]


@pytest.fixture(scope="module")
def params():
    return encoder.init(jax.random.key(0), CONFIG)


def rows_of(length=10, slots=3):
    return packing.pack_rows(LISTS, np.arange(6), length=length, slots=slots)


def alone(params):
    tokens, mask = map(jnp.asarray, batches.pad_tokens(LISTS, 12))
    return np.asarray(
        jax.jit(encoder.embed, static_argnums=3)(params, tokens, mask, CONFIG)
    )


def test_every_list_is_packed_once_and_whole():
    rows = rows_of()
    assert sorted(rows.lists[rows.lists >= 0]) == list(range(6))
    for r, members in enumerate(rows.lists):
        for slot, j in enumerate(members):
            there = rows.slots[r] == slot
            if j < 0:
                assert not there.any()
                continue
            assert rows.tokens[r, there].tolist() == LISTS[j]
            assert rows.positions[r, there].tolist() == list(range(len(LISTS[j])))


def test_rows_hold_at_most_so_many_lists_and_are_well_filled():
    generator = np.random.default_rng(0)
    lists = [[1] * n for n in generator.integers(6, 40, 300)]
    rows = packing.pack_rows(lists, generator.permutation(300), length=64, slots=4)
    assert (rows.slots >= 0).mean() > 0.93
    assert rows.lists.shape[1] == 4


def test_packed_sentences_get_the_embeddings_they_get_alone(params):
    rows = rows_of()

    @jax.jit
    def run(params):
        states = packing.hidden_states(params, rows, CONFIG)
        assert len(states) == CONFIG.num_hidden_layers
        return packing.pool(states[-1], rows)

    found = np.asarray(run(params))
    there = rows.lists >= 0
    np.testing.assert_allclose(
        found[there], alone(params)[rows.lists[there]], atol=2e-6
    )
    assert not found[~there].any()


def test_low_precision_comes_close_forward_and_backward(params):
    rows = rows_of()

    def total(params, precision):
        states = packing.hidden_states(params, rows, CONFIG, precision)
        return jnp.sum(packing.pool(states[-1], rows)[..., :8])

    weights = {k: v for k, v in params.items() if k.startswith("encoder.layer.1")}
    grads = [
        jax.jit(jax.grad(lambda w, p=precision: total({**params, **w}, p)))(weights)
        for precision in ("float32", "bfloat16")
    ]
    exact, near = (jax.flatten_util.ravel_pytree(g)[0] for g in grads)
    assert near.dtype == jnp.float32
    cosine = jnp.vdot(exact, near) / jnp.linalg.norm(exact) / jnp.linalg.norm(near)
    assert cosine > 0.999
    np.testing.assert_allclose(jnp.linalg.norm(near), jnp.linalg.norm(exact), rtol=0.02)


def test_a_list_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="list 4 has 9 tokens, allowed are 1 .. 8"):
        rows_of(length=8)
