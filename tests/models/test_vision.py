"""The image classifiers are pure, can be pruned, and refuse what they cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import vision

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
SMALL = {
    "mlp": {"width": 32, "hidden": 32, "depth": 1},
    "vit": {"width": 32, "hidden": 32, "depth": 1, "patch": 4},
    "resnet": {"widths": (16, 32)},
}


@pytest.fixture(params=SMALL, scope="module")
def case(request):
    model = vision.create(request.param, 10, **SMALL[request.param])
    return model, model.init(jax.random.key(0), IMAGES)


def test_the_logits_of_an_image_do_not_depend_on_its_batch(case):
    model, params = case
    assert set(params) == {"params"}, "no running statistics"
    run = jax.jit(model.apply)
    whole = run(params, IMAGES)
    assert whole.shape == (4, 10) and whole.dtype == jnp.float32
    np.testing.assert_allclose(run(params, IMAGES[::-1])[::-1], whole, atol=1e-5)


def test_every_kernel_can_be_pruned(case):
    model, params = case
    uses = fh.discover(model.apply, params, IMAGES)
    paths = fh.paths.leaf_paths(params)
    assert set(uses.leaves) == {path for path in paths if path.endswith("kernel")}


def test_the_mlp_without_blocks_is_two_linear_layers_around_a_norm():
    model = vision.create("mlp", 3, width=32, depth=0)
    params = model.init(jax.random.key(0), IMAGES)
    p = params["params"]
    x = IMAGES.reshape(4, -1) @ p["stem"]["kernel"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    want = x @ p["head"]["kernel"]
    np.testing.assert_allclose(model.apply(params, IMAGES), want, atol=1e-4)


def test_unknown_names_and_impossible_sizes_are_refused():
    with pytest.raises(
        ValueError, match="unknown model 'cnn'; known: mlp, vit, resnet"
    ):
        vision.create("cnn", 10)
    with pytest.raises(ValueError, match="classes=1"):
        vision.create("mlp", 1)
    with pytest.raises(ValueError, match="8 x 8 are not a multiple of patch=3"):
        vision.create("vit", 10, patch=3).init(jax.random.key(0), IMAGES)
