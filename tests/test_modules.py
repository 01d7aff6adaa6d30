"""A module in the place of a function or of parameters: what to write is said."""

import jax
import jax.numpy as jnp
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training import objectives

KEY = jax.random.key(0)
METHOD = fh.Magnitude(fh.NM(2, 4))
PARAMS = {"w": jax.random.normal(KEY, (8, 8))}
X = jnp.ones((4, 8))


def apply_fn(params, x):
    return x @ params["w"]


def linen():
    return pytest.importorskip("flax.linen").Dense(8)


def nnx():
    library = pytest.importorskip("flax.nnx")
    return library.Linear(8, 8, rngs=library.Rngs(0))


def equinox():
    return pytest.importorskip("equinox").nn.Linear(8, 8, key=KEY)


def keras():
    cls = type("Layer", (), {"__call__": lambda self, x: x, "shape": ()})
    cls.__module__ = "keras.src.layers.layer"
    return cls()


MESSAGES = {
    linen: r"a Dense, .* flax\.linen, .*: pass model\.apply as apply_fn",
    nnx: r"a Linear, .* flax\.nnx, .*: write graph, params = nnx\.split",
    keras: r"a Layer, .* keras, .*: give params = .*stateless_call",
    equinox: r"a Linear, .* equinox, .*: write .* eqx\.partition",
}


@pytest.mark.parametrize("make", MESSAGES)
def test_a_module_is_no_function_of_parameters(make):
    module, uses = make(), fh.discover(apply_fn, PARAMS, X)
    for call in (
        lambda: fh.prune(module, PARAMS, [X], METHOD, key=KEY),
        lambda: fh.prune_sequential(module, PARAMS, [X], METHOD, key=KEY),
        lambda: fh.discover(module, PARAMS, X),
        lambda: fh.calibrate(module, PARAMS, uses, [X]),
        lambda: fh.sparsify(module)(PARAMS, X),
        lambda: objectives.taught(module, PARAMS, [X]),
    ):
        with pytest.raises(ValueError, match=f"^apply_fn is {MESSAGES[make]}"):
            call()


def test_a_module_that_is_no_tree_is_not_parameters():
    module, uses = linen(), fh.discover(apply_fn, PARAMS, X)
    for call in (
        lambda: fh.prune(apply_fn, module, [X], METHOD, key=KEY),
        lambda: fh.discover(apply_fn, module, X),
        lambda: fh.calibrate(apply_fn, module, uses, [X]),
    ):
        with pytest.raises(ValueError, match=r"^params is a Dense, .*model\.init"):
            call()


@pytest.mark.parametrize("make", [nnx, equinox])
def test_a_module_that_is_a_tree_is_parameters(make):
    module = make()
    if jax.tree.leaves(module)[0] is module:
        pytest.skip("modules of this version are no trees")
    uses = fh.discover(lambda module, x: jax.vmap(module)(x), module, X)
    assert len(uses.leaves) == 1


def test_a_module_without_arrays_is_a_function():
    library = pytest.importorskip("equinox")
    uses = fh.discover(library.filter_jit(apply_fn), PARAMS, X)
    assert list(uses.leaves) == ["w"]
    holding = library.filter_jit(equinox())
    with pytest.raises(ValueError, match="no function of params"):
        fh.discover(holding, PARAMS, X)
