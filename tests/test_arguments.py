"""Wrong arguments are refused by name at the door, with what to do."""

# pyright: reportArgumentType=false

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax import arguments
from flexhinm_jax.training import schedules

KEY = jax.random.key(0)
WANDA = fh.Wanda(fh.NM(2, 4))
MAGNITUDE = fh.Magnitude(fh.NM(2, 4))
FLEX = fh.Wanda(fh.FlexHiNM(4, permute=None))
TX = optax.sgd(1e-3)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]


def loss_fn(params, x):
    return jnp.mean(apply_fn(params, x) ** 2)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with everything that the calls need."""

    params: dict
    x: jax.Array
    uses: fh.Uses
    stats: dict
    states: dict
    plans: dict
    packed: dict


@pytest.fixture(scope="module")
def model():
    keys = jax.random.split(KEY, 3)
    params = {
        "a": jax.random.normal(keys[0], (8, 16)),
        "b": jax.random.normal(keys[1], (16, 8)),
        "bias": jnp.zeros(16),
    }
    x = jax.random.normal(keys[2], (4, 8))
    uses = fh.discover(apply_fn, params, x)
    stats = fh.calibrate(apply_fn, params, uses, [x])
    states = fh.solve(WANDA, KEY, params, uses, stats)
    plans = fh.decide(WANDA, states, params, uses)
    packed = fh.pack(plans, params, uses)
    return Model(params, x, uses, stats, states, plans, packed)


def prune(m, **other):
    given = {"params": m.params, "batches": [m.x], "method": WANDA, "key": KEY}
    given |= other
    return fh.prune(given.pop("apply_fn", apply_fn), **given)


def sequential(m, **other):
    given = {"params": m.params, "batches": [m.x], "method": WANDA, "key": KEY}
    return fh.prune_sequential(apply_fn, **(given | other))


def fit(m, **other):
    given = {
        "method": fh.MaskLLM(fh.NM(2, 4)),
        "states": m.states,
        "loss_fn": loss_fn,
        "params": m.params,
        "uses": m.uses,
        "batches": [(m.x,)],
        "key": KEY,
        "tx": TX,
        "steps": 1,
    }
    return fh.fit(**(given | other))


def gradual(m, **other):
    given = {
        "method": MAGNITUDE,
        "loss_fn": loss_fn,
        "params": m.params,
        "uses": m.uses,
        "batch_at": lambda step: (m.x,),
        "stages": [fh.Stage(0.5, 1)],
        "tx": TX,
        "key": KEY,
    }
    return list(fh.gradual(**(given | other)))


def with_nan(m, path):
    return m.params | {path: m.params[path].at[(0,) * m.params[path].ndim].set(np.nan)}


def swapped(m):
    return {"a": m.plans["b"]}


CASES = {
    "method: text": (lambda m: prune(m, method="wanda"), "'wanda': need a method"),
    "method: class": (lambda m: sequential(m, method=fh.Wanda), "the class Wanda"),
    "method: key first": (
        lambda m: fh.solve(KEY, WANDA, m.params, m.uses),
        "method=an array key",
    ),
    "method: hyper": (
        lambda m: fh.hyper_prune(WANDA, KEY, m.params, m.uses, m.stats),
        r"need HyperPrune\(inner\)",
    ),
    "key: int": (lambda m: prune(m, key=0), "key=0: need a PRNG key, such as"),
    "key: several": (
        lambda m: sequential(m, key=jax.random.split(KEY, 3)),
        "key holds 3 keys",
    ),
    "key: none": (lambda m: fit(m, key=None), "key=None: need"),
    "params: empty": (lambda m: prune(m, params={}), "params={} has no leaves"),
    "params: lists": (
        lambda m: prune(m, params={"a": [1.0, 2.0]}),
        "holds 2 leaves and no array; the first is 1.0",
    ),
    "params: packed": (
        lambda m: fh.solve(MAGNITUDE, KEY, m.packed, m.uses),
        "a: is packed; pass the dense parameters",
    ),
    "params: shapes": (
        lambda m: prune(m, params=jax.eval_shape(lambda: m.params)),
        "ShapeDtypeStructs, which have no values",
    ),
    "params: NaN in the first of two": (
        lambda m: prune(m, params=with_nan(m, "a") | {"b": with_nan(m, "b")["b"]}),
        "^a: the parameter has 1 NaN",
    ),
    "params: NaN in a bias": (
        lambda m: sequential(m, params=with_nan(m, "bias")),
        "^bias: the parameter has 1 NaN",
    ),
    "params: nothing to prune": (
        lambda m: prune(m, rules={".": "skip"}),
        "none of the 3 leaves can be pruned .a: skipped by rule",
    ),
    "batches: array": (lambda m: prune(m, batches=m.x), r"float32\[4, 8\]: need an it"),
    "batches: none": (lambda m: sequential(m, batches=None), "batches is None: need"),
    "apply_fn: none": (lambda m: prune(m, apply_fn=None), "apply_fn is None: need a f"),
    "sparsity: percent": (
        lambda m: prune(m, method=FLEX, sparsity=75),
        "for 75 % give 0.75",
    ),
    "sparsity: text": (lambda m: prune(m, sparsity="0.5"), "sparsity='0.5': need a nu"),
    "sparsity: list": (
        lambda m: prune(m, method=FLEX, sparsity=[0.5, 0.5]),
        r"a: sparsity of shape \(2,\)",
    ),
    "sparsity: unknown leaf": (
        lambda m: prune(m, sparsity={"a": 0.5, "b": 0.5, "c": 0.5}),
        r"sparsity\['c'\]: there is no such leaf",
    ),
    "rules: list": (lambda m: prune(m, rules=[("a", "skip")]), "rules is a list: need"),
    "rules: number": (lambda m: prune(m, rules={1: "skip"}), "1 is no regular expr"),
    "uses: none": (
        lambda m: fh.calibrate(apply_fn, m.params, None, [m.x]),
        "uses is None: need what discover",
    ),
    "stats: of one": (
        lambda m: fh.solve(WANDA, KEY, m.params, m.uses, m.stats["a"]),
        "stats is a Stats: need {leaf path: Stats}",
    ),
    "prev: missing": (
        lambda m: fh.solve(
            WANDA, KEY, m.params, m.uses, m.stats, prev={"a": m.states["a"]}
        ),
        "b: in uses but not in prev",
    ),
    "states: plans": (
        lambda m: fh.decide(WANDA, m.plans, m.params, m.uses),
        r"states\['a'\] is a Plan, not a State",
    ),
    "states: unknown leaf": (
        lambda m: fh.decide(WANDA, {"aa": m.states["a"]}, m.params, m.uses),
        "aa: in states but not in uses; the nearest prunable leaves are a, b",
    ),
    "states: of another method": (
        lambda m: fit(m),
        "MaskLLM cannot read these states",
    ),
    "plans: states": (
        lambda m: fh.densify(m.states, m.params, m.uses),
        r"plans\['a'\] is a State, not a Plan",
    ),
    "plans: of another leaf": (
        lambda m: fh.densify(swapped(m), m.params, m.uses),
        r"a: its plan is for a weight \[8, 16\], the leaf is \[16, 8\]",
    ),
    "plans: keep_tree": (
        lambda m: fh.keep_tree({"c": m.plans["a"]}, m.params, m.uses),
        "c: in plans but not in uses",
    ),
    "adopt: no gates": (
        lambda m: fh.adopt(WANDA, m.plans, m.params, m.uses),
        "Wanda has no gates",
    ),
    "adopt: other params": (
        lambda m: fh.adopt(fh.HardConcrete(), m.plans, {"c": m.x}, m.uses),
        "a: in uses but not in params",
    ),
    "adopt: other plans": (
        lambda m: fh.adopt(fh.HardConcrete(), swapped(m), m.params, m.uses),
        "a: its plan is for a weight",
    ),
    "report: other tree": (
        lambda m: fh.report(m.plans, {"c": m.x}),
        "a: in plans but not in the packed tree",
    ),
    "verify: state": (lambda m: fh.verify(m.states["a"]), "verify got a State: need"),
    "verify: plans": (lambda m: fh.verify(m.plans), "verify got a dict: need one Plan"),
    "sparse_dot: dense": (
        lambda m: fh.sparse_dot(m.x, m.params["a"]),
        r"packed is an array float32\[8, 16\]: need the PackedWeight",
    ),
    "unpack: tree": (lambda m: fh.kernels.unpack(m.packed), "unpack got a dict: need"),
    "share_orders: HiNM": (
        lambda m: fh.share_orders(fh.Wanda(fh.HiNM(4)), KEY, m.params, m.uses, m.stats),
        r"HiNM\(vector_size=4, n=2, m=4\) has no one order for all rows",
    ),
    "keep: other structure": (
        lambda m: fh.keep_sparse(TX, {"a": None}).init(m.params),
        "keep has another tree structure",
    ),
    "keep: no optimiser": (lambda m: fh.keep_sparse({}, TX), "tx={}: need an optax"),
    "fit: batch": (
        lambda m: fit(m, batches=[m.x]),
        r"batches\[0\] is an array float32\[4, 8\]: need a tuple",
    ),
    "fit: steps": (lambda m: fit(m, steps=1.5), "steps=1.5: need an integer"),
    "fit: tx": (lambda m: fit(m, tx=1e-3), "tx=0.001: need an optax optimiser"),
    "gradual: no statistics": (
        lambda m: gradual(m, method=WANDA),
        r"Wanda needs input statistics \(norms\); pass stats_fn=",
    ),
    "gradual: tuples": (
        lambda m: gradual(m, stages=[(0.5, 1)]),
        r"stages\[0\] is \(0.5, 1\): need Stage",
    ),
    "gradual: recipe": (
        lambda m: gradual(m, stages=fh.flexhinm_gp(4, steps=4)),
        "stages is a Recipe: need a list of Stage.*recipe.stages",
    ),
    "gradual: batch": (
        lambda m: gradual(m, batch_at=lambda step: m.x),
        r"batch_at\(0\) is an array",
    ),
    "gradual: loss": (
        lambda m: gradual(m, loss_fn=apply_fn),
        r"loss_fn returned an array float32\[4, 8\]: need one floating number",
    ),
    "step: no optimiser": (
        lambda m: fh.make_step(MAGNITUDE, loss_fn, None, m.uses),
        "tx=None: Magnitude trains the weights",
    ),
    "training: counter": (
        lambda m: fh.Training.under(
            {"w": None, "n": None},
            {"w": m.params["a"], "n": jnp.int32(0)},
            optax.sgd(0.1),
            key=KEY,
        ),
        r"n: an array int32\[\] has no gradient, and a step trains every leaf",
    ),
    "prune: traced": (
        lambda m: jax.jit(lambda p: prune(m, params=p).params)(m.params),
        "params holds traced arrays, and pruning reads values: call it outside of jax",
    ),
    "prune: mapped batch": (
        lambda m: jax.vmap(lambda x: prune(m, batches=[x[None]]).params)(m.x),
        "a batch holds traced arrays",
    ),
    "sequential: traced": (
        lambda m: jax.eval_shape(
            lambda x: (
                fh.prune_sequential(
                    apply_fn, m.params, [x], WANDA, key=jax.random.key(0)
                ).params
            ),
            m.x,
        ),
        "batches holds traced arrays",
    ),
    "schedule: text": (
        lambda m: schedules.cubic("0", 0.5, 3),
        "sparsity from '0' to 0.5",
    ),
    "config: text": (
        lambda m: fh.SparseGPT(damp="x"),
        "damp='x': need a number",
    ),
    "config: fraction": (lambda m: fh.ALPS(iterations=30.5), "30.5: need an integer"),
    "config: flag": (lambda m: fh.HiNM(hardware="no"), "'no': need True or False"),
    "config: number": (lambda m: fh.ALPS(growth=2.0), "growth=2.0: need a tuple"),
    "pattern: text": (lambda m: fh.patterns.parse(fh.NM(2, 4)), "reads text such as"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_refused_by_name(name, model):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call(model)


def test_an_error_of_the_own_function_keeps_its_type_and_says_what_it_got(model):
    with pytest.raises(TypeError) as caught:
        prune(model, batches=[model.x[:, :3]])
    assert any("array float32[4, 3]" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("run", [fh.prune, fh.prune_sequential])
def test_an_option_that_does_not_exist_is_refused_whatever_the_method(run, model):
    """Also by a method that does not calibrate, which would not look at it."""
    options = {"key": KEY, "sparsty": 0.5}
    text = f"{run.__name__}.*no option 'sparsty'; did you mean 'sparsity'"
    with pytest.raises(TypeError, match=text):
        run(apply_fn, model.params, [model.x], MAGNITUDE, **options)


def test_leaves_that_are_no_arrays_are_left_alone(model):
    result = prune(model, params=model.params | {"rate": 1.0, "name": "x"})
    assert result.params["rate"] == 1.0 and result.params["name"] == "x"


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1)])
def test_typed_and_raw_keys_are_both_keys(key):
    arguments.key(key)
    arguments.key(np.asarray(jax.random.PRNGKey(1)))


def test_a_pattern_in_a_message_shows_its_numbers_and_what_is_not_the_default():
    assert str(fh.NM(1, 4)) == "NM(n=1, m=4)"
    assert (
        str(fh.HiNM(8, permute=None)) == "HiNM(vector_size=8, n=2, m=4, permute=None)"
    )
