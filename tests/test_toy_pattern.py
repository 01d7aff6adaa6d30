"""The pattern that docs/architecture.md adds works with methods, packed and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax import patterns
from flexhinm_jax.io import checkpoints
from flexhinm_jax.methods import METHODS
from flexhinm_jax.pruning.apply import dense_weight
from flexhinm_jax.training.sharding import check_sharding
from tests.cases import SHAPE, stats, weight
from tests.pages import added

KEY = jax.random.key(0)
ANY = [name for name, method in METHODS.items() if not method.chooses_groups]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """PATTERNS with the file and the line of the page."""
    return patterns.PATTERNS | added("patterns", tmp_path_factory.mktemp("patterns"))


@pytest.fixture
def banded(registry, monkeypatch):
    monkeypatch.setattr(patterns, "PATTERNS", registry)
    return patterns.parse("banded:r=8")


def test_the_page_describes_the_best_run(banded):
    scores = np.asarray(jnp.abs(weight()))
    support = banded.project(KEY, jnp.asarray(scores), 0.75)
    for tile, keep in zip(
        scores.reshape(2, 8, 32).sum(1),
        np.asarray(support.keep).reshape(2, 8, 32),
        strict=True,
    ):
        best = max(range(25), key=lambda s: tile[s : s + 8].sum())  # noqa: B023
        want = np.isin(np.arange(32), np.arange(best, best + 8))
        np.testing.assert_array_equal(keep, np.broadcast_to(want, keep.shape))


@pytest.mark.once
@pytest.mark.parametrize("name", ANY)
def test_every_method_prunes_to_a_pattern_of_one_file(name, banded, tmp_path):
    if not METHODS[name].fits(banded):
        with pytest.raises(ValueError, match="works with"):
            METHODS[name](banded)
        return
    method = METHODS[name](banded)

    @jax.jit
    def run(w, stats, sparsity, prev):
        state = method.solve(KEY, w, stats, sparsity=sparsity, prev=prev)
        return state, method.decide(state, w)

    state, plan = run(weight(), stats(), jnp.float32(0.5), None)
    fh.verify(plan)
    assert float(plan.support.keep.mean()) == pytest.approx(0.5)
    x = weight(9, (5, SHAPE[1]))
    dense, packed = x @ dense_weight(plan).T, fh.kernels.pack(plan)
    np.testing.assert_allclose(fh.sparse_dot(x, packed), dense, rtol=1e-4, atol=1e-4)
    # A state goes through a file, and the next stage shrinks what came back.
    checkpoints.save(tmp_path / "state", state, method)
    restored = checkpoints.restore(
        tmp_path / "state", jax.eval_shape(lambda: state), method
    )
    _, later = run(weight(3), stats(), jnp.float32(0.75), restored)
    fh.verify(later)
    assert not np.any(later.support.keep & ~plan.support.keep)
    assert float(later.support.keep.mean()) == pytest.approx(0.25)


def test_a_shard_may_hold_whole_tiles_only(banded):
    params = {"up": weight(0, (32, 16))}  # [in, out]
    apply_fn = lambda p, x: x @ p["up"]  # noqa: E731
    uses = fh.discover(apply_fn, params, weight(1, (4, 32)))
    mesh = jax.sharding.AbstractMesh((2,), ("model",))

    def split(*axes):
        sharding = NamedSharding(mesh, P(*axes))
        return {"up": jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding)}

    check_sharding(split(None, "model"), uses, fh.Wanda(banded))
    with pytest.raises(ValueError, match="splits a run: .* chooses columns among all"):
        check_sharding(split("model", None), uses, fh.Wanda(banded))
