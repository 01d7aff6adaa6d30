"""A token mask follows its tokens to every product, or says where it could not."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flexhinm_jax as fh
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from tests.tracing.cases import assert_close, normal
from tests.tracing.test_experts import MODELS, P, reference

B, L, D = 3, 5, 8
MASK = np.arange(L)[None] < np.array([2, 3, 5])[:, None]
X = np.where(MASK[..., None], normal(B, L, D), 50.0).astype(np.float32)
LEFT = MASK[:, ::-1]  # padding on the left
REAL = X[MASK]
KEY = jax.random.key(0)
W = {"w": normal(D, D), "v": normal(D, D)}


def counted(apply_fn, params, *args, mask=MASK):
    uses = discover(apply_fn, params, *args)
    return calibrate(apply_fn, params, uses, [args], token_mask=lambda *_: mask)


def permuted(p, x):
    order = jnp.argsort(jnp.sin(x[..., 0]).reshape(-1))
    return x.reshape(-1, D)[order] @ p["w"]


def attention(p, x):
    x = jnp.where(MASK[..., None], x, 0.0)
    q = (x @ p["w"]).reshape(B, L, 2, 4).transpose(0, 2, 1, 3)
    scores = jax.nn.softmax(q @ q.swapaxes(-1, -2) - 1e9 * ~MASK[:, None, None], -1)
    return (scores @ q).transpose(0, 2, 1, 3).reshape(B * L, D) @ p["v"]


def attended(p):
    x = np.where(MASK[..., None], X, 0.0)
    q = (x @ p["w"]).reshape(B, L, 2, 4).transpose(0, 2, 1, 3)
    s = q @ q.swapaxes(-1, -2) - 1e9 * ~MASK[:, None, None]
    s = np.exp(s - s.max(-1, keepdims=True))
    y = (s / s.sum(-1, keepdims=True)) @ q
    return y.transpose(0, 2, 1, 3)[MASK].reshape(-1, D)


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["w"] + x), None

    return lax.scan(step, jnp.zeros((B, D)), x.swapaxes(0, 1))[0] @ p["v"]


def states(p, x):
    h, seen = np.zeros((B, D), np.float32), []
    for t in range(L):
        seen.append(h)
        h = np.tanh(h @ p["w"] + x[:, t])
    return np.stack(seen, 1), h


PLAIN = {
    "as it is": lambda p, x: x @ p["w"],
    "flattened": lambda p, x: (x.reshape(-1, D) @ p["w"]).reshape(B, L, D),
    "transposed": lambda p, x: jnp.einsum("lbd,de->ble", x.swapaxes(0, 1), p["w"]),
    "time first and flat": lambda p, x: x.swapaxes(0, 1).reshape(-1, D) @ p["w"],
    "with axes of one": lambda p, x: (
        x[:, None].reshape(1, B, L, D)[..., None, :] @ p["w"]
    ),
    "split": lambda p, x: jnp.concatenate(
        [part @ p["w"] for part in jnp.split(x, [2], 1)], 1
    ),
    "joined": lambda p, x: jnp.concatenate([x[:, 2:], x[:, :2]], 1) @ p["w"],
    "reversed": lambda p, x: jnp.flip(x, (0, 1)) @ p["w"],
    "vmapped": lambda p, x: jax.vmap(jax.vmap(lambda v: v @ p["w"]))(x),
    "mapped": lambda p, x: lax.map(lambda row: row @ p["w"], x),
    "mapped twice": lambda p, x: lax.map(
        lambda row: lax.map(lambda v: v @ p["w"], row), x
    ),
    "sorted": permuted,
    "gathered": lambda p, x: x.reshape(-1, D)[jnp.arange(B * L)[::-1]] @ p["w"],
    "taken": lambda p, x: (
        jnp.take_along_axis(x, jnp.argsort(x[..., 1], 1)[..., None], 1) @ p["w"]
    ),
    "scattered": lambda p, x: (
        jnp.zeros_like(x).at[:, jnp.arange(L)[::-1]].set(x) @ p["w"]
    ),
    "updated": lambda p, x: (
        lax.dynamic_update_slice(
            x, lax.dynamic_slice(x, (0, 1, 0), (B, 2, D)), (0, 1, 0)
        )
        @ p["w"]
    ),
    "in a jit": jax.jit(
        lambda p, x: (
            jax.nn.relu(x).reshape(-1, D) * 0 @ p["v"] + x.reshape(-1, D) @ p["w"]
        )
    ),
    "in a cond": lambda p, x: lax.cond(
        x[0, 0, 0] < 1e9,
        lambda x: x.reshape(-1, D) @ p["w"],
        lambda x: x.reshape(-1, D),
        x,
    ),
    "after a cond": lambda p, x: (
        lax.cond(
            x[0, 0, 0] < 1e9,
            lambda x: x.reshape(-1, D),
            lambda x: jnp.zeros((B * L, D)),
            x,
        )
        @ p["w"]
    ),
    "after a loop": lambda p, x: (
        lax.fori_loop(0, 2, lambda _, h: h * -1, x).reshape(-1, D) @ p["w"]
    ),
    "after a while": lambda p, x: (
        lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, -c[1]), (0, x))[1][None]
        @ p["w"]
    ),
    "after no turn": lambda p, x: (
        lax.fori_loop(0, 0, lambda _, h: h * 2, x).reshape(-1, D) @ p["w"]
    ),
    "checkpointed": jax.checkpoint(lambda p, x: x.reshape(-1, D) @ p["w"]),
    "in heads": lambda p, x: jnp.einsum(
        "hbld,hde->blhe", jnp.stack([x, x]), jnp.stack([p["w"], p["v"]])
    ),
    "normed": lambda p, x: (
        ((x - x.mean(-1, keepdims=True)) * 0 + x).reshape(-1, D) @ p["w"]
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_mask_follows_its_tokens(name, caplog):
    stats = counted(PLAIN[name], W, X)["w"]
    assert float(stats.count) == MASK.sum(), name
    assert_close(stats.gram, REAL.T @ REAL)
    assert not caplog.records


def test_the_mask_follows_through_attention():
    stats = counted(attention, W, X)
    assert float(stats["v"].count) == MASK.sum()
    y = attended(W)
    assert_close(stats["v"].gram, y.T @ y, 1e-4)


@pytest.mark.parametrize("mask", [MASK, LEFT], ids=["right", "left"])
def test_a_state_belongs_to_the_token_of_its_step(mask):
    stats = counted(recurrent, W, X, mask=mask)
    seen, last = states(W, X)
    assert_close(stats["w"].gram, seen[mask].T @ seen[mask])
    assert float(stats["w"].count) == mask.sum()
    assert_close(stats["v"].gram, last.T @ last)


def test_pooled_rows_count_if_any_of_their_tokens_does():
    mask = MASK & (np.arange(B) > 0)[:, None]
    f = lambda p, x: x.mean(1) @ p["w"]  # noqa: E731
    pooled = X.mean(1)[1:]
    stats = counted(f, W, X, mask=mask)["w"]
    assert float(stats.count) == 2
    assert_close(stats.gram, pooled.T @ pooled)
    g = lambda p, x: jnp.einsum("bl,bld->bd", jnp.ones((B, L)), x) @ p["w"]  # noqa: E731
    assert float(counted(g, W, X, mask=mask)["w"].count) == 2


def test_an_embedding_and_a_causal_convolution():
    ids = np.random.default_rng(0).integers(0, 11, (B, L)).astype(np.int32)
    p = {"table": normal(11, D), "k": normal(3, D, 4), "w": normal(4, D)}

    def apply_fn(p, ids):
        x = p["table"][ids]
        y = lax.conv_general_dilated(
            x, p["k"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        )
        return y @ p["w"]

    x = np.pad(p["table"][ids], ((0, 0), (2, 0), (0, 0)))
    patches = np.stack([x[:, t : t + L] for t in range(3)], 2)[MASK].reshape(-1, 3 * D)
    stats = counted(apply_fn, p, ids)
    assert_close(stats["k"].gram, patches.T @ patches)
    assert float(stats["w"].count) == MASK.sum()


@pytest.mark.parametrize("name", MODELS)
def test_masked_tokens_reach_no_expert(name):
    """The reference without the tokens that do not count, each row on its own."""
    ids = np.random.default_rng(1).integers(0, 16, (B, L)).astype(np.int32)
    _, seen = reference(P, ids)
    keep = MASK.reshape(-1)
    stats = counted(MODELS[name], P, ids)
    x, logits = seen["router"], seen["router"] @ P["router"]
    to = np.argsort(-logits, -1, kind="stable")[:, :2]
    gram = np.zeros((8, D, D), np.float32)
    for t in np.flatnonzero(keep):
        for e in to[t]:
            gram[e] += np.outer(x[t], x[t])
    assert_close(stats["gate"].gram, gram, 1e-4)
    assert float(stats["gate"].count.sum()) == 2 * keep.sum()
    assert_close(stats["head"].gram, seen["head"][keep].T @ seen["head"][keep], 1e-4)


def test_a_mask_that_cannot_be_followed_names_the_leaves(caplog):
    def apply_fn(p, x):
        mixed = jnp.fft.fft(x.reshape(-1, D), axis=0).real
        return x @ p["v"] @ p["v"], mixed @ p["w"]

    with caplog.at_level(logging.WARNING, "flexhinm_jax"):
        stats = counted(apply_fn, W, X)
    (record,) = caplog.records
    assert "cannot be followed to the inputs of w:" in record.getMessage()
    assert (
        float(stats["w"].count) == B * L and float(stats["v"].count) == 2 * MASK.sum()
    )


def test_tokens_that_no_batch_changes_count_without_a_word(caplog):
    def apply_fn(p, x):
        return x @ p["v"] + (jnp.tanh(p["w"]) @ p["w2"]).sum()

    params = {**W, "w2": normal(D, D)}
    stats = counted(apply_fn, params, X)
    assert float(stats["w2"].count) == D and not caplog.records


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.where(MASK, 0.0, -1e9), r"gave float\d+\[3, 5\], need booleans, True"),
        (MASK.astype(np.int32), r"gave int32\[3, 5\], need booleans"),
        (np.ones((B, L + 1), bool), r"shape \[3, 6\], which are no leading axes"),
    ],
)
def test_a_mask_of_another_kind_or_size_is_refused(mask, message, sequential):
    f, method = (lambda p, x: x @ p["w"]), fh.Wanda(fh.NM(2, 4))
    run = fh.prune_sequential if sequential else fh.prune
    with pytest.raises(ValueError, match=message):
        run(f, W, [(X,)], method, key=KEY, token_mask=lambda x: mask)


@pytest.mark.parametrize("name", ["time first and flat", "sorted", "gathered"])
def test_going_in_order_follows_the_mask_too(name):
    def apply_fn(p, x):
        return jnp.tanh(PLAIN[name](p, x)) @ p["v"]

    masked = fh.prune_sequential(
        apply_fn, W, [X], fh.SparseGPT(fh.NM(2, 4)), key=KEY, token_mask=lambda x: MASK
    )

    def alone(p, rows):
        return jnp.tanh(rows @ p["w"]) @ p["v"]

    want = fh.prune_sequential(alone, W, [REAL], fh.SparseGPT(fh.NM(2, 4)), key=KEY)
    for leaf in W:
        assert_close(masked.params[leaf], want.params[leaf], 1e-4)
