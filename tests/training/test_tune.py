"""What is left is trained towards the dense outputs: zeros, bits, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh

KEY = jax.random.key(3)


def apply_fn(params, tokens):
    h = params["table"][tokens]
    h = (
        h * params["scale"]
        + jnp.tanh(h @ params["in"] + params["bias"]) @ params["out"]
    )
    return h @ params["table"].T


def normal(k, *shape):
    return 0.5 * jax.random.normal(jax.random.key(k), shape)


DENSE = {
    "table": normal(0, 12, 8),
    "scale": 1 + normal(1, 8),
    "in": normal(2, 8, 16),
    "bias": normal(3, 16),
    "out": normal(4, 16, 8),
}
BATCHES = list(jax.random.randint(jax.random.key(9), (8, 2, 10), 0, 12))
RULES = {"table": "skip"}


@pytest.fixture(scope="module")
def pruned():
    method = fh.Magnitude(fh.NM(2, 4))
    result = fh.prune(apply_fn, DENSE, BATCHES, method, key=KEY, rules=RULES)
    return result.params


def tune(pruned, **options):
    options = {"key": KEY, "steps": 30, "rate": 0.01, "rules": RULES} | options
    return fh.tune(apply_fn, pruned, DENSE, BATCHES, **options)


def kl(params, tokens):
    log_p = jax.nn.log_softmax(apply_fn(DENSE, tokens))
    log_q = jax.nn.log_softmax(apply_fn(params, tokens))
    return float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))


def test_predictions_come_nearer_on_text_that_was_not_seen(pruned):
    tuned = tune(pruned)
    assert tuned.note is None
    fresh = jax.random.randint(jax.random.key(77), (16, 10), 0, 12)
    assert kl(tuned.params, fresh) < 0.6 * kl(pruned, fresh)
    # An eighth judges: one of the eight batches, by the loss itself.
    figures = [(kl(pruned, batch), kl(tuned.params, batch)) for batch in BATCHES]
    assert any(
        np.allclose(pair, (tuned.before, tuned.after), rtol=1e-5) for pair in figures
    )


def test_zeros_and_tables_stay_and_vectors_move(pruned):
    tuned = tune(pruned).params
    for name in ("in", "out"):
        np.testing.assert_array_equal(tuned[name] == 0, pruned[name] == 0)
    np.testing.assert_array_equal(tuned["table"], pruned["table"])
    assert (tuned["scale"] != pruned["scale"]).all() and (tuned["bias"] != 0).all()


def test_what_was_not_pruned_stays(pruned):
    mixed = pruned | {"in": DENSE["in"]}
    tuned = tune(mixed).params
    np.testing.assert_array_equal(tuned["in"], DENSE["in"])
    assert (tuned["out"] != mixed["out"]).any() and (tuned["bias"] != 0).all()


def test_small_steps_add_up_in_sixteen_bits(pruned):
    half = lambda tree: {k: x.astype(jnp.bfloat16) for k, x in tree.items()}  # noqa: E731
    dense, start, options = half(DENSE), half(pruned), {"steps": 60, "rate": 1e-3}
    tuned = fh.tune(apply_fn, start, dense, BATCHES, key=KEY, rules=RULES, **options)
    wide = tune(pruned, **options)
    assert all(x.dtype == jnp.bfloat16 for x in tuned.params.values())
    for name in ("in", "out"):
        np.testing.assert_array_equal(tuned.params[name] == 0, start[name] == 0)
    gained, possible = (x.before - x.after for x in (tuned, wide))
    assert gained > 0.8 * possible > 0


def test_parameters_without_zeros_are_refused(pruned):
    full = {k: x + 0.01 for k, x in DENSE.items()}
    with pytest.raises(ValueError, match="0 zeros in the 2 matrices"):
        tune(full)
    with pytest.raises(ValueError, match="give the pruned parameters, then the dense"):
        fh.tune(apply_fn, DENSE, pruned, BATCHES, key=KEY, rules=RULES)
    with pytest.raises(ValueError, match="0 zeros in the 0 matrices"):
        tune(DENSE)


def test_the_start_is_kept_where_the_end_is_worse_and_it_is_said(pruned, caplog):
    tuned = tune(pruned, steps=2, rate=30.0)
    assert tuned.after == tuned.before
    assert "2 steps at rate 30 ended at a loss of" in caplog.text
    assert tuned.note is not None and "a lower rate, such as 8" in tuned.note
    assert "\n" not in repr(tuned) and "Array" not in repr(tuned)
    assert all((tuned.params[name] == pruned[name]).all() for name in pruned)


def test_a_run_that_goes_on_gives_the_same_bits(pruned, tmp_path):
    whole = tune(pruned, steps=12, every=4)
    saves = {"checkpoints": tmp_path, "save_every": 4, "every": 4, "resume": "auto"}

    class Killed(Exception):
        pass

    def killed(row):
        if row["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        tune(pruned, steps=12, progress=killed, **saves)
    options: Any = {"key": KEY, "rules": RULES, "rate": 0.01, "steps": 12, **saves}
    with pytest.raises(ValueError, match="batches: saved"):
        fh.tune(apply_fn, pruned, DENSE, BATCHES[::-1], **options)
    twice = lambda p, x: 2 * apply_fn(p, x)  # noqa: E731
    with pytest.raises(ValueError, match="program: saved"):
        fh.tune(twice, pruned, DENSE, BATCHES, **options)
    first = lambda x: jnp.arange(len(x)) < 2  # noqa: E731
    with pytest.raises(ValueError, match="token_mask: saved null"):
        fh.tune(apply_fn, pruned, DENSE, BATCHES, token_mask=first, **options)
    again = tune(pruned, steps=12, **saves)
    assert all((again.params[k] == whole.params[k]).all() for k in pruned)
    assert (again.before, again.after) == (whole.before, whole.after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "tune: steps"),
        ({"rate": -1.0}, "tune: rate=-1.0: need a positive number"),
        ({"kind": "mse"}, "kind='mse': choose one of cosine, kl"),
        ({"token_masks": None}, "token_mask"),
    ],
)
def test_options_that_mean_nothing_are_refused(pruned, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tune(pruned, **options)


def test_trees_must_be_alike(pruned):
    with pytest.raises(ValueError, match="different structure"):
        fh.tune(apply_fn, {"w": pruned["in"]}, DENSE, BATCHES, key=KEY)
