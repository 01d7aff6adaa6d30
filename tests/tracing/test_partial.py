"""A leaf that is not only a matrix is pruned where that is right, else skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flexhinm_jax.patterns import NM
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from tests.tracing.cases import assert_close, normal

X = normal(5, 8)


def skipped(apply_fn, *args, **leaves):
    return discover(apply_fn, leaves, *args).skipped


def gain_and_bias(p, x):
    w = p["w"]
    return (x @ w[:8]) * jnp.exp(w[8]) + w[9]


def custom(w):
    f = jax.custom_vjp(lambda w: w * 2)
    f.defvjp(lambda w: (w * 2, None), lambda _, g: (g,))
    return f(w)


ALSO = {
    "stopped at 'exp'; stopped at 'add'": (gain_and_bias, (10, 8)),
    "stopped at 'reduce_sum'": (
        lambda p, x: (x @ p["w"][:, :8]) * p["w"][:, 8:].sum(),
        (8, 12),
    ),
    "stopped at 'mul'": (lambda p, x: x @ p["w"] + x @ (p["w"] * X[0]), (8, 8)),
    "scaled by a value of the batch": (
        lambda p, x: x @ p["w"] + x @ (p["w"] * x.sum()),
        (8, 8),
    ),
    "inside a custom_vjp function": (
        lambda p, x: x @ p["w"] + x @ custom(p["w"]),
        (8, 8),
    ),
    "contracted with another parameter": (
        lambda p, x: x @ p["w"] + (p["w"].T @ p["w"]).sum(),
        (8, 8),
    ),
    "carried through a loop that changes it": (
        lambda p, x: x @ p["w"] + x @ lax.fori_loop(0, 2, lambda _, w: -w, p["w"]),
        (8, 8),
    ),
    "contracted in different layouts": (
        lambda p, x: jnp.concatenate(
            [x @ p["w"], jnp.einsum("tgi,gio->tgo", x.reshape(5, 2, 4), stack(p["w"]))],
            axis=None,
        ),
        (8, 8),
    ),
    "parts of its outputs read different inputs": (
        lambda p, x: x @ p["w"][:, :4] + jnp.sin(x) @ p["w"][:, 2:6],
        (8, 8),
    ),
}


def stack(w):
    return w.reshape(2, 4, 8)


@pytest.mark.parametrize("reason", ALSO)
def test_a_leaf_that_is_also_needed_otherwise_says_for_what(reason):
    apply_fn, shape = ALSO[reason]
    w = {"w": normal(*shape)}
    text = discover(apply_fn, w, X).skipped["w"]
    assert text.startswith(f"contracted, but also: {reason}"), text
    assert len(discover(apply_fn, w, X, rules={"w": "prune"})) >= 1
    with pytest.raises(ValueError, match="asks to prune what cannot be: w: contracted"):
        discover(apply_fn, w, X, rules={"w": NM(2, 4)})


def test_a_window_is_enough_where_the_rest_is_never_read():
    assert "w" not in skipped(lambda p, x: x @ p["w"][:8], X, w=normal(12, 8))


def test_equal_parts_with_inputs_of_their_own_are_matrices_of_their_own():
    """A fused projection of cross attention: queries of x, keys and values of y."""
    y = normal(7, 8)
    w = normal(8, 12)

    def apply_fn(p, x, y):
        q, k, v = (p["w"][:, n : n + 4] for n in (0, 4, 8))
        return x @ q @ (y @ k).T @ (y @ v)

    def reshaped(p, x, y):
        w = p["w"].reshape(8, 3, 4)
        return x @ w[:, 0] @ (y @ w[:, 1]).T @ (y @ w[:, 2])

    for f in (apply_fn, reshaped):
        uses = discover(f, {"w": w}, X, y)
        layout = uses.leaves["w"].layout
        assert (layout.stack_shape, layout.matrix_shape) == ((3,), (4, 8))
        stats = calibrate(f, {"w": w}, uses, [(X, y)])["w"]
        assert stats.count.tolist() == [5, 7, 7]
        assert_close(stats.gram, np.stack([X.T @ X, y.T @ y, y.T @ y]))


def spectral(p, x, u):
    w, t = p["w"], u
    for _ in range(2):
        s = w @ t
        s = s / jnp.linalg.norm(s)
        t = s @ w
        t = t / jnp.linalg.norm(t)
    return x @ (w / (s @ w @ t))


def in_a_loop(p, x, u):
    def power(_, t):
        t = (p["w"] @ t) @ p["w"]
        return t / jnp.linalg.norm(t)

    t = lax.fori_loop(0, 2, power, u)
    return x @ (p["w"] / jnp.linalg.norm(p["w"] @ t))


def stored(p, x, u):
    del u
    s = p["u"] @ p["w"].T
    return x @ (p["w"] / jnp.linalg.norm(s))


@pytest.mark.parametrize("apply_fn", [spectral, in_a_loop, stored])
def test_power_iteration_decides_neither_axes_nor_statistics(apply_fn):
    params, u = {"w": normal(8, 16), "u": normal(1, 16)}, np.ones(16, np.float32) / 4
    f = lambda p, x: apply_fn(p, x, u)  # noqa: E731
    uses = discover(f, params, X)
    (use,) = uses
    assert (use.path, use.layout.matrix_shape) == ("w", (16, 8))
    stats = calibrate(f, params, uses, [X])["w"]
    assert float(stats.count) == 5
    assert_close(stats.gram, X.T @ X)


def test_tokens_that_are_parameters_count_where_there_are_no_others():
    """Learned queries: no batch changes them, but they are what the weight sees."""
    params = {"latents": normal(3, 8), "w": normal(8, 6)}
    f = lambda p, x: jnp.tanh(p["latents"]) @ p["w"] + x.sum()  # noqa: E731
    stats = calibrate(f, params, discover(f, params, X), [X])["w"]
    latents = np.tanh(params["latents"])
    assert_close(stats.gram, latents.T @ latents)
