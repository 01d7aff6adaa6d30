import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.patterns import RandomRows
from flexhinm_jax.types import BlockDiagonal

KEY = jax.random.key(0)


def packed(seed, shape=(16, 16)):
    w = jax.random.normal(jax.random.key(seed), shape)
    method = fh.Magnitude(fh.FlexHiNM(4, permute=RandomRows(sweeps=0)))
    return kernels.pack(method.decide(method.solve(KEY, w, None, sparsity=0.75), w))


def network(first, second, bias, x):
    return fh.sparse_dot(jax.nn.gelu(fh.sparse_dot(x, first) + bias), second)


def test_folding_the_order_leaves_the_logits_as_they_are():
    first, second = packed(1), packed(2)
    assert first.out_order.tolist() != list(range(16))
    bias = jax.random.normal(jax.random.key(3), (16,))
    folded, (reader,), order = kernels.fold(first, second)
    assert folded.out_order.tolist() == list(range(16))
    x = jax.random.normal(jax.random.key(4), (5, 16))
    kernels.check_equal(
        lambda x: network(first, second, bias, x),
        lambda x: network(folded, reader, bias[order], x),
        x,
    )
    np.testing.assert_array_equal(
        network(first, second, bias, x), network(folded, reader, bias[order], x)
    )


def test_a_bias_that_stays_behind_is_noticed():
    first, second = packed(1), packed(2)
    bias = jax.random.normal(jax.random.key(3), (16,))
    folded, (reader,), _ = kernels.fold(first, second)
    with pytest.raises(ValueError, match="outputs differ"):
        kernels.check_equal(
            lambda x: network(first, second, bias, x),
            lambda x: network(folded, reader, bias, x),
            jnp.ones((2, 16)),
        )


def test_a_stack_folds_like_its_members():
    stack = lambda *p: jax.tree.map(lambda *x: jnp.stack(x), *p)  # noqa: E731
    sizes = [packed(s) for s in (1, 1)]
    first, (reader,), order = kernels.fold(stack(*sizes), stack(*sizes))
    alone, (one,), alone_order = kernels.fold(sizes[0], sizes[0])
    np.testing.assert_array_equal(order[1], alone_order)
    np.testing.assert_array_equal(reader.nm_index[1], one.nm_index)
    np.testing.assert_array_equal(first.out_order[1], alone.out_order)


def test_pairs_that_do_not_allow_it_are_refused():
    first, second = packed(1), packed(2)
    with pytest.raises(ValueError, match="does not contract"):
        kernels.fold(first, packed(3, (16, 32)))
    mixed = BlockDiagonal(jnp.ones((4, 4, 4)))
    with pytest.raises(ValueError, match="on its outputs"):
        kernels.fold(dataclasses.replace(first, left=mixed), second)
    with pytest.raises(ValueError, match="on its inputs"):
        kernels.fold(first, dataclasses.replace(second, right=mixed))


def test_folded_weights_lose_the_layouts_of_their_old_order():
    w = jax.random.normal(KEY, (8, 8))
    method = fh.Magnitude(fh.NM(2, 4))
    one = kernels.pack(method.decide(method.solve(KEY, w, None), w))
    ready = kernels.prepare(one, "xla")
    first, readers, _ = kernels.fold(ready, ready)
    assert not any(p.layouts for p in (first, *readers))
    first, readers, _ = kernels.fold_inputs(ready, ready)
    assert not any(p.layouts for p in (first, *readers))
