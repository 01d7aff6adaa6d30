import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training import objectives
from flexhinm_jax.training.fit import fit

KEY = jax.random.key(0)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def task():
    """Two layers, one of them a stack of two matrices, and the layers' inputs."""
    keys = jax.random.split(KEY, 4)
    params = {
        "a": jax.random.normal(keys[0], (16, 16)) / 4,
        "b": jax.random.normal(keys[1], (16, 8)) / 4,
    }
    mix = jnp.eye(16) + 0.5 * jax.random.normal(keys[2], (16, 16))
    x = jax.random.normal(keys[3], (64, 16)) @ mix
    uses = fh.discover(apply_fn, params, x)
    return params, uses, fh.calibrate(apply_fn, params, uses, [x]), x


def pruned(params):
    keep = lambda w: jnp.abs(w) > jnp.median(jnp.abs(w))  # noqa: E731
    return {name: jnp.where(keep(w), w, 0) for name, w in params.items()}


def test_the_layer_error_is_that_of_the_outputs_of_every_layer(task):
    params, uses, stats, x = task
    now, inputs = pruned(params), {"a": x, "b": jnp.tanh(x @ params["a"])}
    want = []
    for name, w in params.items():
        dense, found = (np.asarray(inputs[name], float) @ v for v in (w, now[name]))
        want.append(np.sum((dense - found) ** 2) / np.sum(dense**2))
    loss_fn = objectives.layer_error(params, uses, stats)
    np.testing.assert_allclose(loss_fn(now), np.mean(want), rtol=1e-5)
    assert float(loss_fn(params)) == 0
    given = objectives.layer_task(params, uses, stats)
    assert float(loss_fn(now, given)) == float(loss_fn(now))


def test_every_matrix_of_a_stack_counts_once():
    params = {"w": jnp.stack([jnp.eye(4), 3 * jnp.eye(4)])}
    scan = lambda p, x: jnp.einsum("bi,sio->sbo", x, p["w"])  # noqa: E731
    uses = fh.discover(scan, params, jnp.eye(4))
    stats = fh.calibrate(scan, params, uses, [jnp.eye(4)])
    loss_fn = objectives.layer_error(params, uses, stats)
    now = {"w": params["w"].at[0, 0, 0].set(0).at[1, 1, 1].set(0)}
    np.testing.assert_allclose(loss_fn(now), 0.25)
    nothing = {"w": jnp.zeros((2, 4, 4))}
    none = objectives.layer_error(nothing, uses, stats)
    assert float(none(nothing)) == 0


def test_a_missing_gram_is_refused_by_name(task):
    params, uses, _, x = task
    norms = fh.calibrate(apply_fn, params, uses, [x], gram=False)
    with pytest.raises(ValueError, match="a: the layer error needs its Gram"):
        objectives.layer_error(params, uses, norms)


def test_the_output_error_is_relative_over_all_outputs_together():
    both = lambda p, x: {"y": x * p, "z": 2 * p}  # noqa: E731
    dense, now, x = jnp.array([1.0, 2]), jnp.array([1.0, 0]), jnp.ones(2)
    loss_fn = objectives.output_error(both, dense)
    np.testing.assert_allclose(loss_fn(now, x), (4 + 16) / (5 + 20))
    half = loss_fn(now.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_distillation_has_its_closed_forms():
    same = lambda p, x: x + p  # noqa: E731
    x = jnp.array([[3.0, 4], [1, 0]])
    shift = jnp.array([[0.0, 0], [-1, 2]])  # the second turns by 90 degrees
    cosine = objectives.distillation(same, jnp.zeros((2, 2)))
    np.testing.assert_allclose(cosine(shift, x), 0.5, atol=1e-6)
    assert abs(float(cosine(x, x))) < 1e-6  # twice the vector is the same direction
    for tau in (1.0, 2.0):
        kl = objectives.distillation(
            same, jnp.zeros((2, 2)), kind="kl", temperature=tau
        )
        p, q = (np.exp(np.asarray(v, float) / tau) for v in (x, x + shift))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        want = tau**2 * np.mean(np.sum(p * np.log(p / q), -1))
        np.testing.assert_allclose(kl(shift, x), want, rtol=1e-5)
        assert float(kl(jnp.zeros((2, 2)), x)) == 0


@pytest.mark.parametrize("kind", ["cosine", "kl"])
def test_masked_tokens_do_not_count(kind):
    apply = lambda p, x, keep: x @ p  # noqa: E731
    x, keep = jax.random.normal(KEY, (2, 3, 4)), jnp.array([[1, 1, 0], [1, 0, 0]]) > 0
    now = jax.random.normal(jax.random.key(1), (4, 4))
    loss_fn = objectives.distillation(
        apply, jnp.eye(4), kind=kind, token_mask=lambda x, keep: keep
    )
    each = objectives.distillation(apply, jnp.eye(4), kind=kind)
    rows = [float(each(now, x[b, t], None)) for b, t in ((0, 0), (0, 1), (1, 0))]
    np.testing.assert_allclose(loss_fn(now, x, keep), np.mean(rows), rtol=1e-5)
    junk = jnp.where(keep[..., None], x, jnp.nan)
    assert float(loss_fn(now, junk, keep)) == float(loss_fn(now, x, keep))
    sentences = objectives.distillation(
        apply, jnp.eye(4), kind=kind, token_mask=lambda x, keep: keep[:, 1]
    )
    np.testing.assert_allclose(
        sentences(now, x, keep), each(now, x[:1], None), rtol=1e-5
    )


def test_a_zero_embedding_has_finite_gradients():
    loss_fn = objectives.distillation(lambda p, x: x * p, jnp.ones(2))
    value, grad = jax.value_and_grad(loss_fn)(jnp.zeros(2), jnp.ones((1, 2)))
    assert float(value) == 1 and np.all(np.isfinite(grad))


@pytest.mark.parametrize("make", [objectives.output_error, objectives.distillation])
def test_outputs_computed_once_give_the_same_loss_and_gradient(task, make):
    params, _, _, x = task
    (batch,) = objectives.taught(apply_fn, params, [x])
    inside, given = make(apply_fn, params), make(apply_fn)
    now = pruned(params)
    a, b = (jax.value_and_grad(f)(now, *v) for f, v in ((inside, (x,)), (given, batch)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    with pytest.raises(ValueError, match="no dense outputs"):
        given(now, x)


def test_objectives_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="kind='mse'"):
        objectives.distillation(apply_fn, kind="mse")
    with pytest.raises(ValueError, match="temperature=0"):
        objectives.distillation(apply_fn, temperature=0)


def test_the_layer_error_plugs_into_fit(task):
    params, uses, stats, _ = task
    method = fh.MaskLLM()
    states = fh.solve(method, KEY, params, uses, stats)
    loss_fn = objectives.layer_error(params, uses, stats)
    _, history = fit(
        method, states, loss_fn, params, uses, [()],
        key=KEY, tx=optax.adam(0.05), steps=30, every=15,
    )  # fmt: skip
    values = [h["value"] for h in history]
    assert min(values) < 0.95 * values[0]
