import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.methods.ordered import Ordered
from flexhinm_jax.patterns import ChannelSearch
from flexhinm_jax.pruning.share_orders import groups, share_orders, ties
from tests.cases import stats, weight
from tests.methods.cases import correlated

KEY = jax.random.key(0)
SEARCH = ChannelSearch(sweeps=8)
NM = fh.NM(2, 4, permute=SEARCH)
HEADS, WIDTH = 2, 16


def attention(params, x):
    q, k, v = (x @ params[n] for n in ("q", "k", "v"))
    split = lambda y: y.reshape(-1, HEADS, WIDTH // HEADS)  # noqa: E731
    logits = jnp.einsum("qhd,khd->hqk", split(q), split(k))
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), split(v))
    x = x + mixed.reshape(-1, WIDTH) @ params["o"]
    inner = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
    return x + inner @ params["down"]


def block():
    shapes = dict.fromkeys("qkvo", (WIDTH, WIDTH))
    shapes |= {"gate": (WIDTH, 32), "up": (WIDTH, 32), "down": (32, WIDTH)}
    keys = jax.random.split(KEY, len(shapes))
    return {
        name: jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@pytest.fixture(scope="module")
def model():
    params = block()
    x = jax.random.normal(jax.random.key(1), (24, WIDTH)) * jnp.exp(
        jax.random.normal(jax.random.key(2), (WIDTH,))
    )
    uses = fh.discover(attention, params, x)
    return params, x, uses, fh.calibrate(attention, params, uses, [x])


def solve(method, given, **options):
    params, _, uses, s = given
    method, s = share_orders(method, KEY, params, uses, s, **options)
    states = fh.solve(method, KEY, params, uses, s)
    return fh.decide(method, states, params, uses)


def test_leaves_that_read_the_same_input_form_a_group(model):
    assert groups(model[2]) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


SLOW = [fh.ALPS(NM), fh.Refit(fh.RIA(NM)), fh.ARMOR(NM, block=8)]


@pytest.mark.parametrize(
    "method",
    [
        fh.Magnitude(NM),
        fh.SparseGPT(NM),
        *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_method_solves_in_the_shared_order(model, method):
    plans = solve(method, model)
    orders = {p: plan.support.regions.in_order for p, plan in plans.items()}
    for plan in plans.values():
        fh.verify(plan)
    for group in groups(model[2]):
        for path in group[1:]:
            np.testing.assert_array_equal(orders[path], orders[group[0]])
    assert orders["q"][0].tolist() != list(range(WIDTH))


def test_a_shared_order_retains_more_than_the_natural_one(model):
    plans = solve(fh.Wanda(NM), model)
    params, _, uses, s = model
    plain = fh.Wanda(fh.NM(2, 4))
    natural = fh.decide(plain, fh.solve(plain, KEY, params, uses, s), params, uses)
    for group in groups(uses):
        kept = [sum(float(p[n].retained) for n in group) for p in (plans, natural)]
        assert kept[0] > kept[1]


def test_an_order_solves_what_permuting_by_hand_solves():
    w, s = weight(), correlated()
    order = jax.random.permutation(KEY, 32).astype(jnp.int32)
    method = fh.SparseGPT(fh.NM(2, 4))
    given = Ordered(method)
    state = given.solve(KEY, w, fh.types.Stats(**vars(s) | {"order": order}))
    plan = given.decide(state, w)
    fh.verify(plan)
    by_hand = fh.types.Stats(
        s.sq_norm[order], s.mean[order], s.count, s.gram[order][:, order]
    )
    alone = method.decide(method.solve(KEY, w[:, order], by_hand), w[:, order])
    np.testing.assert_array_equal(plan.weight[:, order], alone.weight)
    np.testing.assert_array_equal(plan.support.regions.in_order[0], order)
    again = given.solve(KEY, w, s, prev=state)
    np.testing.assert_array_equal(
        given.decide(again, w).support.keep, plan.support.keep
    )


def test_without_an_order_the_natural_one_is_used():
    w, s = weight(), stats()
    given, plain = Ordered(fh.Wanda(NM)), fh.Wanda(fh.NM(2, 4))
    one = given.decide(given.solve(KEY, w, s), w)
    other = plain.decide(plain.solve(KEY, w, s), w)
    np.testing.assert_array_equal(one.support.keep, other.support.keep)


def test_no_gather_is_left_in_a_block_with_shared_orders(model):
    params, x, uses, _ = model
    plans = solve(fh.Wanda(NM), model, within={"^o$": WIDTH // HEADS})
    packed = fh.pack(plans, params, uses)
    order, (q, k, v) = kernels.gather_once(*(packed[n] for n in "qkv"))
    v, (o,), _ = kernels.fold_inputs(v, packed["o"], within=WIDTH // HEADS)
    inside, (gate, up) = kernels.gather_once(packed["gate"], packed["up"])
    gate, (down,), same = kernels.fold_inputs(gate, packed["down"])
    up, (_,), _ = kernels.fold_inputs(up, packed["down"])
    folded = {"q": q, "k": k, "v": v, "o": o, "gate": gate, "up": up, "down": down}
    for name, leaf in folded.items():
        identity = np.arange(leaf.shape[1])
        np.testing.assert_array_equal(leaf.nm_index[0], identity, err_msg=name)
        np.testing.assert_array_equal(leaf.out_order, np.arange(leaf.shape[0]))
    assert same.tolist() != list(range(32))

    def run(leaves, first, second, x):
        dot = lambda name, x: fh.sparse_dot(x, leaves[name])  # noqa: E731
        y = x[..., first]
        q, k, v = (dot(n, y).reshape(-1, HEADS, WIDTH // HEADS) for n in "qkv")
        probability = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
        mixed = jnp.einsum("hqk,khd->qhd", probability, v).reshape(-1, WIDTH)
        x = x + dot("o", mixed)
        y = x[..., second]
        return x + dot("down", jax.nn.silu(dot("gate", y)) * dot("up", y))

    kernels.check_equal(
        lambda x: fh.sparsify(attention)(packed, x),
        lambda x: run(folded, order, inside, x),
        x,
    )
    with pytest.raises(ValueError, match="outputs differ"):
        kernels.check_equal(
            lambda x: run(packed | {"o": o}, jnp.arange(WIDTH), jnp.arange(WIDTH), x),
            lambda x: run(packed, jnp.arange(WIDTH), jnp.arange(WIDTH), x),
            x,
        )


def test_learned_orders_start_from_the_shared_ones(model):
    params, _, uses, s = model
    method = fh.PermLLM(NM, block=8, steps=0)
    same, s = share_orders(method, KEY, params, uses, s)
    assert same == method
    states = fh.solve(method, KEY, params, uses, s)
    for path, lead in ties(uses).items():
        np.testing.assert_array_equal(
            states[path].fixed["order"], states[lead].fixed["order"]
        )


def test_one_call_shares_the_orders(model):
    params, x, *_ = model
    result = fh.prune(attention, params, [x], fh.Wanda(NM), key=KEY, share_orders=True)
    orders = [result.plans[n].support.regions.in_order for n in "qkv"]
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])


def test_orders_of_a_stack_are_shared_position_by_position():
    def scanned(params, x):
        def layer(x, p):
            return x + jnp.tanh(x @ p["a"]) * (x @ p["b"]), None

        return jax.lax.scan(layer, x, params)[0]

    keys = jax.random.split(KEY, 2)
    params = {n: jax.random.normal(k, (3, 8, 8)) for n, k in zip("ab", keys)}  # noqa: B905
    x = jax.random.normal(KEY, (5, 8))
    uses = fh.discover(scanned, params, x)
    s = fh.calibrate(scanned, params, uses, [x])
    plans = solve(fh.Wanda(NM), (params, x, uses, s))
    one, other = (plans[n].support.regions.in_order for n in "ab")
    assert one.shape == (3, 1, 8)
    np.testing.assert_array_equal(one, other)
    assert one[0].tolist() != one[1].tolist()


def test_a_leaf_with_another_pattern_is_left_alone(model):
    params, x, _, s = model
    uses = fh.discover(attention, params, x, rules={"^k$": fh.Vector(4)})
    plans = fh.prune(
        attention,
        params,
        [x],
        fh.Wanda(NM),
        key=KEY,
        rules={"^k$": fh.NM(1, 4), "^v$": fh.Unstructured(), "^o$": "skip"},
        sparsity=0.5,
        share_orders=True,
    ).plans
    assert plans["v"].support.regions is None and plans["k"].support.regions.n == 1
    assert len(uses) == 7


def test_orders_that_do_not_fit_are_refused(model):
    params, x, uses, s = model

    def ask(method=None, **options):
        return share_orders(method or fh.Wanda(NM), KEY, params, uses, s, **options)

    with pytest.raises(ValueError, match="no one order for all rows"):
        ask(fh.Wanda(fh.HiNM(4)))
    with pytest.raises(ValueError, match="matches no leaf"):
        ask(within={"value": 8})
    with pytest.raises(ValueError, match="give all of them the same"):
        ask(within={"^q$": 8})
    with pytest.raises(ValueError, match=r"in=16 is not a multiple of within=12"):
        ask(within={"^o$": 12})
    with pytest.raises(ValueError, match="HardConcrete learns"):
        ask(fh.HardConcrete(NM))
    with pytest.raises(ValueError, match="no leaf has an N:M pattern"):
        given = fh.discover(attention, params, x, rules={".": fh.Unstructured()})
        share_orders(fh.Wanda(NM), KEY, params, given, s)


def test_folding_refuses_what_it_cannot_move(model):
    params, _, uses, _ = model
    packed = fh.pack(solve(fh.Wanda(NM), model), params, uses)
    with pytest.raises(ValueError, match="different input orders"):
        kernels.gather_once(packed["q"], packed["o"])
    with pytest.raises(ValueError, match="do not chain"):
        kernels.fold_inputs(packed["up"], packed["o"])
    with pytest.raises(ValueError, match="leaves the blocks"):
        kernels.fold_inputs(packed["v"], packed["o"], within=4)
    tiled = fh.Magnitude(fh.HiNM(8, permute=None))
    w = params["o"].T
    other = tiled.decide(tiled.solve(KEY, w, None, sparsity=0.75), w)
    with pytest.raises(ValueError, match="one order of all inputs"):
        kernels.gather_once(kernels.pack(other))
    with pytest.raises(ValueError, match="at least one reader"):
        kernels.gather_once()
