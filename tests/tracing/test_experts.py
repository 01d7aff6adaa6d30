"""Mixtures of experts: every expert is calibrated on the tokens routed to it.

The reference is a forward pass in NumPy that writes down what every weight multiplied.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from tests.tracing.cases import assert_close, dense_tree, normal, outcome, packed_tree

D, H, E, K, VOCABULARY = 8, 12, 8, 2, 16
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 5)).astype(np.int32)
KEY = jax.random.key(0)


def parameters():
    shapes = {
        "embed": (VOCABULARY, D),
        "q": (D, D),
        "k": (D, D),
        "v": (D, D),
        "o": (D, D),
        "norm": (D,),
        "router": (D, E),
        "gate": (E, D, H),
        "up": (E, D, H),
        "down": (E, H, D),
        "head": (D, VOCABULARY),
    }
    return {name: 0.5 * normal(*shape) for name, shape in shapes.items()}


P = parameters()


def silu(x, xp):
    return x / (1 + xp.exp(-x))


def sorted_runs(p, x, to):
    """Tokens sorted by expert, as MaxText and others run them: x [t, d], to [t, k]."""
    flat = to.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=E)
    rows = x[order // K]
    h = lax.ragged_dot(rows, p["gate"], sizes), lax.ragged_dot(rows, p["up"], sizes)
    y = lax.ragged_dot(silu(h[0], jnp) * h[1], p["down"], sizes)
    return jnp.zeros_like(y).at[order].set(y).reshape(*to.shape, D)


def by_token(p, x, to):
    """The weights of every token, read by a gather under vmap."""

    def one(x, e):
        h = silu(x @ p["gate"][e], jnp) * (x @ p["up"][e])
        return h @ p["down"][e]

    return jax.vmap(lambda x, row: jax.vmap(lambda e: one(x, e))(row))(x, to)


def gathered(p, x, to):
    """The same with weights of [t, k, d, h] and einsum."""
    h = jnp.einsum("td,tkdh->tkh", x, p["gate"][to])
    h = silu(h, jnp) * jnp.einsum("tkdh,td->tkh", p["up"][to], x)
    return jnp.einsum("tkh,tkhd->tkd", h, p["down"][to])


def dispatched(p, x, to):
    """Capacity slots for every expert, filled and emptied by einsum."""
    chosen = jax.nn.one_hot(to.reshape(-1), E, dtype=jnp.float32)
    slot = (jnp.cumsum(chosen, 0) * chosen).sum(-1).astype(jnp.int32) - 1
    slots = jax.nn.one_hot(slot, len(x) * K, dtype=jnp.float32)
    send = jnp.einsum("ne,nc->nec", chosen, slots)
    own = jnp.einsum("nd,nec->ecd", jnp.repeat(x, K, 0), send)
    h = jnp.einsum("ecd,edh->ech", own, p["gate"])
    h = silu(h, jnp) * jnp.einsum("ecd,edh->ech", own, p["up"])
    y = jnp.einsum("ech,ehd->ecd", h, p["down"])
    return jnp.einsum("ecd,nec->nd", y, send).reshape(*to.shape, D)


def attention(p, x):
    scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) / np.sqrt(D)
    return x + jax.nn.softmax(scores) @ (x @ p["v"]) @ p["o"]


def model(experts, scale_first):
    """A block of Qwen3-MoE (shares of all experts) or Mixtral (of the chosen)."""

    def apply_fn(p, ids):
        x = attention(p, p["embed"][ids])
        h = (x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * p["norm"]).reshape(-1, D)
        logits = h @ p["router"]
        if scale_first:
            share, to = lax.top_k(jax.nn.softmax(logits), K)
            share = share / share.sum(-1, keepdims=True)
        else:
            share, to = lax.top_k(logits, K)
            share = jax.nn.softmax(share)
        y = (experts(p, h, to) * share[..., None]).sum(1)
        return (x + y.reshape(x.shape)) @ p["head"]

    return apply_fn


MODELS = {
    "qwen3 sorted": model(sorted_runs, True),
    "qwen3 gathered": model(gathered, True),
    "mixtral by token": model(by_token, False),
    "mixtral dispatched": model(dispatched, False),
}
SLOTTED = "mixtral dispatched"


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(p, ids):
    """(output, leaf -> what it multiplied: [t, i], or per expert) in NumPy."""
    x = p["embed"][ids]
    seen = {name: x.reshape(-1, D) for name in "qkv"}
    scores = np.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) / np.sqrt(D)
    mixed = softmax(scores) @ (x @ p["v"])
    seen["o"] = mixed.reshape(-1, D)
    x = x + mixed @ p["o"]
    h = (x / np.sqrt((x**2).mean(-1, keepdims=True)) * p["norm"]).reshape(-1, D)
    seen["router"] = h
    logits = h @ p["router"]
    to = np.argsort(-logits, -1, kind="stable")[:, :K]
    share = softmax(np.take_along_axis(logits, to, -1))
    seen |= {name: [[] for _ in range(E)] for name in ("gate", "up", "down")}
    y = np.zeros_like(h)
    for t, k in np.ndindex(*to.shape):
        e = to[t, k]
        inner = silu(h[t] @ p["gate"][e], np) * (h[t] @ p["up"][e])
        for name, value in (("gate", h[t]), ("up", h[t]), ("down", inner)):
            seen[name][e].append(value)
        y[t] += share[t, k] * (inner @ p["down"][e])
    x = x + y.reshape(x.shape)
    seen["head"] = x.reshape(-1, D)
    return x @ p["head"], seen


@pytest.fixture(scope="module")
def truth():
    return reference(P, IDS)


@pytest.fixture(scope="module", params=MODELS)
def named(request):
    return request.param, MODELS[request.param]


def test_nearly_all_weights_are_found_and_nothing_is_silent(named, truth):
    _, apply_fn = named
    assert_close(jax.jit(apply_fn)(P, IDS), truth[0])
    uses = discover(apply_fn, P, IDS)
    assert set(uses.leaves) | set(uses.skipped) == set(P)
    matrices = {name: x.size for name, x in P.items() if x.ndim > 1}
    covered = sum(matrices[name] for name in uses.leaves)
    assert covered > 0.9 * sum(matrices.values())
    assert uses.leaves["gate"].layout.stack_shape == (E,)
    assert uses.leaves["gate"].layout.matrix_shape == (H, D)
    assert uses.skipped["embed"] == "read by gather (embedding)"


def test_every_expert_has_the_statistics_of_its_own_tokens(named, truth):
    name, apply_fn = named
    uses = discover(apply_fn, P, IDS)
    stats = calibrate(apply_fn, P, uses, [IDS, IDS])
    for path, tokens in truth[1].items():
        parts = tokens if isinstance(tokens, list) else [tokens]
        size = P[path].shape[-2]
        parts = [np.array(part, np.float32).reshape(-1, size) for part in parts]
        gram = np.stack([2 * x.T @ x for x in parts])
        count = np.array([2.0 * len(x) for x in parts])
        assert_close(np.asarray(stats[path].gram).reshape(gram.shape), gram, 1e-4)
        if name != SLOTTED or not isinstance(tokens, list):
            # Empty slots of a dispatch are rows of zeros, and count.
            assert_close(np.asarray(stats[path].count).reshape(-1), count, 0)
    shares = stats["gate"].gram is stats["up"].gram
    assert shares


def test_norms_alone_agree():
    apply_fn = MODELS["qwen3 sorted"]
    uses = discover(apply_fn, P, IDS)
    full, norms = (calibrate(apply_fn, P, uses, [IDS], gram=g) for g in (True, False))
    for path in uses.leaves:
        assert_close(norms[path].sq_norm, full[path].sq_norm)


def test_packed_experts_equal_densified_ones(named):
    _, apply_fn = named
    uses = discover(apply_fn, P, IDS)
    packed = packed_tree(P, uses, leaf_paths(P))
    got, got_grads = outcome(sparsify(apply_fn), packed, IDS)
    dense = lambda p, ids: apply_fn(dense_tree(p), ids)  # noqa: E731
    want, want_grads = outcome(dense, packed, IDS)
    assert_close(got, want)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_close(g, w, 1e-4)


TARGETS = dict(zip(MODELS, ("seq", "resid", "asym", "asym"), strict=True))


def test_experts_in_order_are_pruned_on_their_own_tokens(named):
    name, apply_fn = named
    records = []
    result = fh.prune_sequential(
        apply_fn,
        P,
        [IDS],
        fh.Wanda(fh.NM(2, 4)),
        key=KEY,
        target=TARGETS[name],
        progress=records.append,
    )
    assert set(result.plans) == set(discover(apply_fn, P, IDS).leaves)
    assert not [r for r in records if r.note.startswith("solved on a plain run")]
    # The router was pruned before, so its tokens are those of the pruned model.
    _, seen = reference(
        jax.tree.map(np.asarray, {**result.params, **experts_of(P)}), IDS
    )
    for path in ("gate", "up"):
        for e in range(E):
            x = np.array(seen[path][e], np.float32).reshape(-1, D)
            if not len(x):
                continue
            scores = np.abs(P[path][e]) * np.sqrt((x**2).sum(0))[:, None]
            kept = np.asarray(result.params[path][e]) != 0
            best = np.argsort(-scores.reshape(2, 4, H), 1, kind="stable")[:, :2]
            want = np.zeros((2, 4, H), bool)
            np.put_along_axis(want, best, True, 1)
            np.testing.assert_array_equal(kept, want.reshape(D, H))


def experts_of(p):
    return {name: p[name] for name in ("gate", "up", "down")}


def test_tokens_beyond_the_sizes_meet_no_expert():
    x, w = normal(10, 8), {"w": normal(3, 8, 4)}
    sizes = np.array([4, 0, 3], np.int32)
    f = lambda p, x, n: lax.ragged_dot(x, p["w"], n)  # noqa: E731
    uses = discover(f, w, x, sizes)
    stats = calibrate(f, w, uses, [(x, sizes), (x, np.array([0, 2, 0], np.int32))])["w"]
    assert stats.count.tolist() == [4, 2, 3]
    parts = [x[:4], x[:2], x[4:7]]
    assert_close(stats.gram, np.stack([part.T @ part for part in parts]))


def test_masked_tokens_count_for_no_expert():
    x, w, to = normal(4, 3, 8), {"w": normal(3, 8, 4)}, np.arange(12).reshape(4, 3) % 3
    keep = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    f = lambda p, x, to: jnp.einsum("btd,btdh->bth", x, p["w"][to])  # noqa: E731
    uses = discover(f, w, x, to)
    mask = lambda x, to: jnp.asarray(keep)  # noqa: E731
    stats = calibrate(f, w, uses, [(x, to)], token_mask=mask)["w"]
    parts = [x[keep & (to == e)] for e in range(3)]
    assert stats.count.tolist() == [len(part) for part in parts]
    assert_close(stats.gram, np.stack([part.T @ part for part in parts]))


def test_rows_of_a_table_are_still_an_embedding():
    p = {"table": normal(11, 2, 4), "w": normal(4, 6), "scale": normal(4)}
    ids = np.array([[1, 2, 3]])
    for f in (
        lambda p, ids: p["table"][ids] @ p["w"],
        lambda p, ids: (p["table"][ids] * p["scale"]) @ p["w"],
    ):
        uses = discover(f, p, ids)
        assert uses.skipped["table"] == "read by gather (embedding)"
        assert set(uses.leaves) == {"w"}


def test_experts_inside_a_scan_over_layers():
    w, x = {"w": 0.4 * normal(2, 3, 8, 8)}, normal(6, 8)
    to, sizes = np.array([0, 1, 1, 2, 0, 1]), np.array([2, 3, 1], np.int32)

    def tokens(p, x):
        one = lambda x, w: (jnp.tanh(jax.vmap(lambda x, e: x @ w[e])(x, to)), None)  # noqa: E731
        return lax.scan(one, x, p["w"])[0]

    def runs(p, x):
        groups = jnp.asarray(sizes)
        step = lambda x, w: (jnp.tanh(lax.ragged_dot(x, w, groups)), None)  # noqa: E731
        return lax.scan(step, x, p["w"])[0]

    for f, own in ((tokens, to), (runs, np.repeat(np.arange(3), sizes))):
        h = np.tanh(np.stack([v @ w["w"][0][e] for v, e in zip(x, own, strict=True)]))
        uses = discover(f, w, x)
        assert uses.leaves["w"].layout.stack_shape == (2, 3)
        stats = calibrate(f, w, uses, [x])["w"]
        want = [[z[own == e].T @ z[own == e] for e in range(3)] for z in (x, h)]
        assert_close(stats.gram, np.array(want), 1e-4)
        assert np.asarray(stats.count).tolist() == [[2, 3, 1]] * 2
