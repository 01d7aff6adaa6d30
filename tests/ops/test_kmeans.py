import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax.ops import kmeans


def test_clusters_have_equal_size_and_contain_every_point_once():
    points = jax.random.normal(jax.random.key(0), (30, 5))
    table = kmeans.balanced(jax.random.key(1), points, 6)
    assert table.shape == (5, 6)
    assert sorted(table.ravel().tolist()) == list(range(30))


def test_separated_clusters_are_found():
    centres = 100 * jnp.eye(3)
    label = np.tile(np.arange(3), 8)
    points = centres[label] + jax.random.normal(jax.random.key(2), (24, 3))
    found = [kmeans.balanced(jax.random.key(seed), points, 8) for seed in range(4)]
    pure = [(label[np.asarray(t)] == label[np.asarray(t)][:, :1]).all() for t in found]
    assert any(pure)
