"""Every leaf is prunable, or skipped for a reason that says what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.patterns import NM
from flexhinm_jax.tracing.describe import describe
from flexhinm_jax.tracing.discover import discover
from tests.tracing.cases import CASES, normal

X = normal(2, 3, 8)


def dense(p, x):
    return nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]


DENSE = {
    "up": {"kernel": normal(8, 12), "bias": normal(12)},
    "down": {"kernel": normal(12, 8)},
}


def test_paths_agree_between_linen_nnx_and_plain_dictionaries():
    linen = nn.Dense(4).init(jax.random.key(0), X)
    state = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))[1]
    boxed = nn.Dense(4, kernel_init=nn.with_partitioning(nn.zeros, (None, "m")))
    assert leaf_paths(linen) == ["bias", "kernel"]
    assert leaf_paths(state) == ["bias", "kernel"]
    assert leaf_paths(boxed.init(jax.random.key(0), X)) == ["bias", "kernel"]


def test_a_dictionary_key_called_value_keeps_its_name():
    p = {"attention": {"query": normal(2, 2), "value": normal(2, 2)}}
    assert leaf_paths(p) == ["attention/query", "attention/value"]


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="share the normalised path 'w'"):
        leaf_paths({"params": {"w": normal(2, 2)}, "w": normal(2, 2)})


def reasons(apply_fn, params, *args, **kwargs):
    return discover(apply_fn, params, *args, **kwargs).skipped


def test_every_skipped_leaf_has_its_reason():
    p = {
        "table": normal(11, 8),
        "scale": normal(8),
        "lora_a": normal(8, 2),
        "lora_b": normal(2, 6),
        "w": normal(8, 6),
        "unused": normal(3, 3),
        "steps": np.zeros((2, 2), np.int32),
        "name": "text",
        "vector": normal(6),
        "padded": normal(6, 2),
        "position": normal(3, 8),
    }

    def apply_fn(p, ids):
        x = p["table"][ids] * p["scale"] + p["position"]
        h = x @ (p["w"] + p["lora_a"] @ p["lora_b"])
        h = h @ jnp.pad(p["padded"], ((0, 0), (1, 1)))
        return h.sum(-1) + p["vector"] @ jnp.ones(6)

    got = reasons(apply_fn, p, np.array([[1, 2, 3]]))
    assert got == {
        "table": "read by gather (embedding)",
        "scale": "1-D; stopped at 'mul'",
        "lora_a": "contracted with another parameter",
        "lora_b": "contracted with another parameter",
        "w": "stopped at 'add'",
        "unused": "never contracted with an input (bias, norm or unused)",
        "steps": "not floating point (int32)",
        "name": "not an array (str)",
        "vector": "1-D; contracted as a vector",
        "padded": "stopped at 'pad'",
        "position": "stopped at 'add'",
    }


def test_a_weight_with_its_own_derivative_rule_is_left_to_it():
    p = {"v": normal(8, 6), "w": normal(8, 6)}

    @jax.custom_vjp
    def straight_through(x, w):
        return x @ w

    straight_through.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda r, g: (7 * g @ r[1].T, r[0].T @ g)
    )

    @jax.custom_jvp
    def scaled(x, w):
        return x @ w

    scaled.defjvp(lambda p, t: (scaled(*p), 3 * t[0] @ p[1]))
    got = reasons(lambda p, x: straight_through(x, p["v"]) + scaled(x, p["w"]), p, X[0])
    assert got["v"] == (
        "inside a custom_vjp function 'straight_through': its derivative rule is kept"
    )
    assert got["w"].startswith("inside a custom_jvp function 'scaled'")


def tied(p, ids):
    return (p["table"][ids] * p["norm"]) @ p["table"].T


TIED = {"table": normal(11, 8), "norm": normal(8)}
IDS = np.array([[1, 2, 3], [4, 10, 0]])


def test_a_tied_embedding_is_pruned_only_when_a_rule_asks():
    uses = discover(tied, TIED, IDS)
    assert uses.skipped["table"].startswith("tied: read by gather (embedding) and")
    for action in (NM(2, 4), "prune"):
        (use,) = discover(tied, TIED, IDS, rules={"table": action})
        assert use.layout.matrix_shape == (11, 8)
        assert use.pattern == (action if action != "prune" else None)


def test_rules_set_patterns_and_skip_leaves_and_the_first_match_wins():
    rules = {"down": "skip", "up": NM(1, 4), "kernel": NM(2, 4)}
    uses = discover(dense, DENSE, X, rules={k: rules[k] for k in ("down", "up")})
    assert uses.leaves["up/kernel"].pattern == NM(1, 4)
    assert uses.skipped["down/kernel"] == "skipped by rule 'down'"
    assert uses.skipped["up/bias"] == "bias of 'up/kernel'"
    uses = discover(dense, DENSE, X, rules={"kernel": NM(2, 4), "up/k": "skip"})
    assert {use.pattern for use in uses} == {NM(2, 4)}


def test_a_rule_that_matches_nothing_names_the_nearest_leaves():
    with pytest.raises(ValueError, match="'upp/kernel' matches no leaf.*up/kernel"):
        discover(dense, DENSE, X, rules={"upp/kernel": "skip"})


def test_a_rule_that_can_prune_nothing_says_why():
    with pytest.raises(ValueError, match="'bias' asks .* up/bias: bias of"):
        discover(dense, DENSE, X, rules={"bias": NM(2, 4)})


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match='expected a pattern, "skip" or "prune"'):
        discover(dense, DENSE, X, rules={"up": "dense"})


def sources(case, *names):
    uses = discover(case.apply_fn, case.params, *case.args)
    (found,) = (
        {use.source for use in uses if any(n in use.path for n in group)}
        for group in [names]
    )
    return found


def test_projections_of_one_input_share_their_source():
    case = CASES["linen attention"]()
    assert len(sources(case, "query", "key", "value/")) == 1
    assert len(sources(case, "query", "out", "Dense_0", "Dense_1")) == 4


def test_casting_the_same_input_twice_is_one_source():
    assert len(sources(CASES["mixed precision"](), "w", "v")) == 1


def test_leaves_of_one_scan_share_a_source_and_other_steps_do_not():
    p = {"gate": normal(3, 8, 8), "up": normal(3, 8, 8), "back": normal(3, 8, 8)}

    def body(h, w):
        gate, up, back = w
        return jnp.tanh(h @ gate) * (h @ up) + h @ back, None

    def forward(p, x):
        return lax.scan(body, x, (p["gate"], p["up"], p["back"]))[0]

    uses = discover(forward, p, X)
    assert len({use.source for use in uses}) == 1

    def unrolled(p, x):
        h = jnp.tanh(x @ p["gate"][0]) * (x @ p["up"][0])
        return (h @ p["gate"][1]) * (h @ p["up"][1])

    uses = [use for use in discover(unrolled, p, X)]
    assert [use.at for use in uses] == [(0,), (0,), (1,), (1,)]
    assert [use.source for use in uses] == [0, 0, 1, 1]


def test_uses_of_one_leaf_are_counted_in_order_of_execution():
    case = CASES["used twice"]()
    uses = discover(case.apply_fn, case.params, *case.args)
    assert [use.key for use in uses] == [("w", 0), ("w", 1)]


def test_a_depthwise_convolution_is_skipped():
    module = nn.Conv(4, (3, 3), feature_group_count=4)
    x = normal(1, 5, 5, 4)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    assert "depthwise" in reasons(module.apply, params, x)["kernel"]


def test_static_arguments_and_keywords_stay_python():
    def apply_fn(p, x, mode):
        assert mode == "train"
        return x @ p["w"]

    assert len(discover(apply_fn, {"w": normal(8, 6)}, X, "train")) == 1


def test_the_table_names_axes_by_role_and_every_leaf():
    case = CASES["linen attention"]()
    text = describe(discover(case.apply_fn, case.params, *case.args))
    lines = text.splitlines()
    assert lines[0].split() == ["leaf", "shape", "stack", "out", "in"]
    row = next(line for line in lines if "query/kernel" in line)
    assert row.split()[1:] == ["12x3x4", "1,2", "0", "pruned"]
    assert any("LayerNorm_0/scale" in line and "1-D" in line for line in lines)
    fused = {"w": normal(8, 24)}
    uses = discover(lambda p, x: x @ p["w"].reshape(8, 3, 8)[:, 1], fused, X)
    assert "1/8:3" in describe(uses) and "1/1:8" in describe(uses)


def test_a_bias_that_serves_twice_belongs_to_no_product():
    p = {"v": normal(8, 6), "w": normal(8, 6), "b": normal(6)}
    uses = discover(lambda p, x: (x @ p["v"] + p["b"]) * (x @ p["w"] + p["b"]), p, X)
    assert [use.bias for use in uses] == [None, None]
    assert uses.skipped["b"] == "bias of 'v', 'w'"


def test_a_bias_in_another_order_is_not_taken_for_one():
    p = {"w": normal(8, 2, 3), "b": normal(3, 2), "c": normal(2, 3)}
    f = lambda p, x: jnp.einsum("...i,ijk->...jk", x, p["w"])  # noqa: E731
    (use,) = discover(lambda p, x: f(p, x) + p["b"].T, p, X)
    assert use.bias is None
    (use,) = discover(lambda p, x: p["c"] + f(p, x), p, X)
    assert use.bias == "c"


def looped(p, x, y):
    h = lax.fori_loop(0, 2, lambda k, h: jnp.tanh(h @ p["v"] + y), y)
    return h + (y + p["b"])


def branched(p, x, y):
    up, down = (lambda y: (y + p["b"]) @ p["v"]), (lambda y: y @ p["v"])
    return lax.cond(jnp.sum(x) > 0, up, down, y)


OWNED = {
    "alone": (lambda p, x, y: y + p["b"], True),
    "cast": (lambda p, x, y: y.astype(jnp.float16) + p["b"], True),
    "in a call": (lambda p, x, y: jax.jit(lambda y: y + p["b"])(y), True),
    "in a remat": (lambda p, x, y: jax.checkpoint(lambda y: y + p["b"])(y), True),
    "twice": (lambda p, x, y: (y + p["b"]) * (x[::-1] @ p["w"] + p["b"]), True),
    "gated": (lambda p, x, y: y * nn.silu(y + p["b"]), False),
    "to choose": (lambda p, x, y: (y, lax.top_k(y + p["b"], 2)[1]), False),
    "cast, gated": (lambda p, x, y: y.astype(jnp.float16) * (y + p["b"]), False),
    "read by a loop": (looped, False),
    "in one branch": (branched, False),
    "computed factor": (lambda p, x, y: y + p["b"] * p["s"], False),
    "once of two": (lambda p, x, y: (y + p["b"]) * (x[::-1] @ p["w"]), False),
    "two factors": (
        lambda p, x, y: (y + p["b"]) * (x[::-1] @ p["w"] + 2 * p["b"]),
        False,
    ),
}


@pytest.mark.parametrize("name", OWNED)
def test_a_bias_belongs_to_a_weight_all_of_whose_results_it_meets(name):
    after, owned = OWNED[name]
    p = {"w": normal(8, 8), "v": normal(8, 8), "b": normal(8), "s": jnp.float32(2.0)}
    uses = discover(lambda p, x: after(p, x, x @ p["w"]), p, X)
    assert uses.biases == ({"w": ("b", 1.0)} if owned else {})


def test_constants_on_a_weight_and_on_its_bias_are_known():
    p = {"w": normal(8, 8), "b": normal(8), "s": jnp.float32(2.0)}
    f = lambda p, x: x @ (0.5 * p["w"]) - -p["b"] / 4  # noqa: E731
    assert discover(f, p, X).biases == {}  # no sum
    f = lambda p, x: x @ (0.5 * p["w"]) + -p["b"] / 4  # noqa: E731
    assert discover(f, p, X).biases == {"w": ("b", -0.25)}
    f = lambda p, x: x @ (p["w"] / p["s"]) + p["b"]  # noqa: E731
    assert discover(f, p, X).biases == {}


def test_one_input_times_two_constants_is_two_inputs_and_times_one_is_one():
    p = {"q": normal(8, 6), "k": normal(8, 6), "v": normal(8, 6)}
    f = lambda p, x: (x @ (0.5 * p["q"])) * (x @ (p["k"] * 0.5)) * (x @ p["v"])  # noqa: E731
    assert [use.source for use in discover(f, p, X)] == [0, 0, 1]
    parts = {"qkv": normal(8, 12)}  # outputs of one product share their input
    g = lambda p, x: (x @ (0.5 * p["qkv"][:, :6])) * (x @ p["qkv"][:, 6:])  # noqa: E731
    assert [use.source for use in discover(g, parts, X)] == [0, 0]


def test_a_weight_with_computed_factors_that_differ_is_named(caplog):
    p = {"w": normal(8, 8), "s": jnp.float32(2.0)}
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        discover(lambda p, x: (x @ p["w"]) * (x[::-1] @ (p["w"] * 100.0)), p, X)
        discover(lambda p, x: jnp.tanh(x @ (p["w"] * p["s"])), p, X)
    assert not caplog.records
    with caplog.at_level("WARNING", logger="flexhinm_jax"):
        discover(lambda p, x: (x @ p["w"]) * (x[::-1] @ (p["w"] * p["s"])), p, X)
    assert "w: used several times, multiplied with numbers" in caplog.text
