import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.ops import hypernet as eager
from tests.compiled import Compiled

hypernet = Compiled(eager)

KEY = jax.random.key(0)
FORM = {"m": 4, "patterns": 6, "hidden": 8}


def moved(theta, seed=1):
    """The net with all weights random, also the last."""
    leaves, tree = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def place(layer, component):
    return hypernet.Place(jnp.int32(layer), jnp.int32(component))


def test_it_starts_at_zero_with_gradients_in_the_last_layer_only():
    theta = hypernet.initial(KEY, **FORM)
    x = jax.random.normal(KEY, (5, 16))
    assert bool(jnp.all(hypernet.logits(theta, x) == 0))
    grads = jax.grad(lambda t: hypernet.logits(t, x)[:, 0].sum())(theta)["dense"]
    sizes = [float(jnp.abs(g["kernel"]).max()) for g in grads]
    assert sizes[:3] == [0, 0, 0] and sizes[3] > 0


def test_the_spec_of_the_published_size_has_168_thousand_numbers():
    theta = hypernet.initial(KEY, m=4, patterns=6, hidden=256, embedding=64)
    prices = 4 * 256  # ours
    assert abs(sum(x.size for x in jax.tree.leaves(theta)) - prices - 168_000) < 2_000


def test_embeddings_are_inputs_that_all_groups_of_a_matrix_share():
    theta = moved(hypernet.initial(KEY, **FORM, embedding=3, layers=2, components=4))
    x = jax.random.normal(KEY, (5, 16))
    e = jnp.concatenate([theta["layers"][1], theta["components"][2]])
    plain = {"dense": theta["dense"]}
    wide = jnp.concatenate([x, jnp.broadcast_to(e, (5, 6))], axis=1)
    found = hypernet.logits(theta, x, place(1, 2))
    np.testing.assert_allclose(found, hypernet.logits(plain, wide), rtol=1e-4)
    other = hypernet.logits(theta, x, place(0, 2))
    assert float(jnp.abs(found - other).max()) > 0.01


def test_features_do_not_know_the_scale_of_the_inputs():
    w, energy = jnp.array([[1.0, -2, 0, 3]]), jnp.array([1.0, 2, 3, 4])
    price = jnp.array([[0.5, -3.0, 0.0, 9.0]])
    found = hypernet.features(w, jnp.log1p(energy / energy.mean()), price)
    assert found.shape == (1, 16)
    np.testing.assert_array_equal(found[0, :8], [1, -2, 0, 3, 1, 2, 0, 3])
    np.testing.assert_allclose(jnp.sinh(found[0, 12:]), price[0], rtol=1e-5)


def test_the_cache_is_a_uniform_sample_of_all_live_groups():
    size, cache = 200, hypernet.empty(200, 4)
    counts = (300, 100, 600)
    for j, count in enumerate(counts):
        live = jnp.arange(2 * count) % 2 == 0
        x = lambda at, j=j: jnp.broadcast_to(at[:, None] + 10_000.0 * j, (size, 16))  # noqa: E731
        cache = hypernet.remember(jax.random.key(j), cache, x, live, place(j, 7))
    assert bool(jnp.all(cache.priority >= 0))
    names = np.asarray(cache.features[:, 0])
    assert len(set(names)) == size and np.all(names % 2 == 0)
    np.testing.assert_array_equal(cache.place.layer, names // 10_000)
    share = np.bincount(np.asarray(cache.place.layer), minlength=3) / size
    np.testing.assert_allclose(share, np.array(counts) / 1000, atol=0.12)


def test_what_was_never_seen_cannot_drift():
    theta, empty = moved(hypernet.initial(KEY, **FORM)), hypernet.empty(6, 4)
    before = jnp.zeros((6, 6))
    assert float(hypernet.drift(theta, empty, before)) == 0
    x = jax.random.normal(KEY, (4, 16))
    live = jnp.array([True, False, True, True])
    cache = hypernet.remember(KEY, empty, lambda at: x[at], live, None)
    same = hypernet.logits(theta, cache.features)
    assert float(hypernet.drift(theta, cache, same)) == 0
    there = x[jnp.array([0, 2, 3])]
    want = jnp.mean(jnp.square(hypernet.logits(theta, there)))
    np.testing.assert_allclose(hypernet.drift(theta, cache, before), want, rtol=1e-5)
