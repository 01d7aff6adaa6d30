"""Windows are trained to give what was wanted: least squares, bits, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.sequential.trained import Trained
from tests import compiled

KEY = jax.random.key(5)
programs = compiled.walks_share_programs
NM = fh.NM(2, 4)


def normal(k, *shape, scale=0.4):
    return scale * jax.random.normal(jax.random.key(k), shape)


def block(params, x):
    h = x * params["scale"]
    return x + jnp.tanh(h @ params["in"] + params["bias"]) @ params["out"]


def blocks(params, x):
    for name in sorted(params):
        x = block(params[name], x)
    return x


def weights(k):
    return {
        "scale": 1 + normal(10 + k, 8),
        "in": normal(20 + k, 8, 16),
        "bias": normal(30 + k, 16),
        "out": normal(40 + k, 16, 8),
    }


PARAMS = {f"blocks.{k}": weights(k) for k in range(2)}
BATCHES = [normal(50 + k, 16, 8, scale=1.0) for k in range(4)]


def prune(apply_fn=blocks, params: Any = PARAMS, batches: Any = BATCHES, **options):
    told: list[Any] = []
    options = {"method": fh.Wanda(NM), "key": KEY} | options
    method = options.pop("method")
    result = fh.prune_sequential(
        apply_fn, params, batches, method, progress=told.append, **options
    )
    return result, [x for x in told if isinstance(x, Trained)]


def lost(apply_fn, params, sparse):
    x = jnp.concatenate(BATCHES)
    y = apply_fn(params, x)
    return float(jnp.mean(jnp.square(apply_fn(sparse, x) - y)) / jnp.mean(y * y))


def test_a_linear_window_comes_to_the_least_squares_under_its_mask():
    def linear(params, x):
        return x @ params["w"]

    params = {"w": normal(0, 8, 4)}
    result, told = prune(
        linear,
        params,
        [jnp.concatenate(BATCHES)],
        reconstruct=fh.Reconstruct(window=".*", steps=400, rate=0.03),
    )
    x, w = np.concatenate(BATCHES), np.asarray(params["w"])
    keep = np.asarray(result.params["w"]) != 0
    want = np.zeros_like(w)
    for o in range(4):
        kept = keep[:, o]
        want[kept, o] = np.linalg.lstsq(x[:, kept], x @ w[:, o], rcond=None)[0]
    np.testing.assert_allclose(result.params["w"], want, atol=2e-3)
    error = np.sum((x @ want - x @ w) ** 2) / np.sum((x @ w) ** 2)
    assert told[0].after == pytest.approx(error, rel=1e-3)
    assert told[0].before == pytest.approx(
        lost(linear, params, prune(linear, params)[0].params), rel=1e-4
    )


@pytest.mark.parametrize(
    ("window", "target", "statistics"),
    [
        ("block", "asym", "sequential"),
        ("part", "seq", "sequential"),
        (2, "asym", "block"),
        ("block", "seq", "dense"),
    ],
)
def test_outputs_come_nearer_and_supports_stay(window, target, statistics):
    before, _ = prune(statistics=statistics)
    result, told = prune(
        statistics=statistics,
        reconstruct=fh.Reconstruct(window, steps=60, rate=0.01, target=target),
    )
    assert all(t.after <= t.before for t in told)
    assert [t.done for t in told] == list(range(1, told[-1].total + 1))
    assert lost(blocks, PARAMS, result.params) < 0.7 * lost(
        blocks, PARAMS, before.params
    )
    for path, plan in result.plans.items():
        name, part = path.split("/")
        keep = np.asarray(plan.support.keep).T
        leaf = np.asarray(result.params[name][part])
        assert (leaf[~keep] == 0).all()
        np.testing.assert_array_equal(np.asarray(plan.weight).T, leaf)
        assert (leaf[keep] != before.params[name][part][keep]).any()
    first = before.plans["blocks.0/in"].support.keep
    np.testing.assert_array_equal(first, result.plans["blocks.0/in"].support.keep)
    moved = [
        not np.array_equal(result.params[n]["bias"], p["bias"])
        for n, p in PARAMS.items()
    ]
    assert all(moved)


class Killed(Exception):
    """The process dies."""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    how = fh.Reconstruct(steps=12, rate=0.01)
    want, _ = prune(reconstruct=how)

    def kill(done):
        if isinstance(done, Trained) or getattr(done, "done", 0) == 4:
            raise Killed

    run = (blocks, PARAMS, BATCHES, fh.Wanda(NM))
    options: Any = {"key": KEY, "resume": tmp_path, "reconstruct": how}
    for _ in range(3):
        with pytest.raises(Killed):
            fh.prune_sequential(*run, progress=kill, **options)
    got = fh.prune_sequential(*run, **options)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    jax.tree.map(np.testing.assert_array_equal, got.plans, want.plans)
    options["reconstruct"] = fh.Reconstruct(steps=13, rate=0.01)
    with pytest.raises(ValueError, match="was begun with reconstruct=Reconstruct"):
        fh.prune_sequential(*run, **options)


def test_a_window_that_training_makes_worse_stays_as_it_was():
    before, _ = prune()
    result, told = prune(reconstruct=fh.Reconstruct(steps=4, rate=1e6))
    assert [t.after == t.before for t in told] == [True, True]
    jax.tree.map(np.testing.assert_array_equal, result.params, before.params)


def test_equal_windows_are_compiled_once(programs):
    how = fh.Reconstruct(steps=7, rate=0.01)
    prune(reconstruct=how)
    known = programs.trained.items()
    (own,) = (made for (trainer, *_), made in known if trainer == how)
    assert [program._cache_size() for program in own] == [1, 1]


def test_a_leaf_that_two_windows_read_stays():
    def tied(params, x):
        own = {k: v for k, v in params.items() if k != "scale"}
        return blocks({k: v | {"scale": params["scale"]} for k, v in own.items()}, x)

    params = {"scale": PARAMS["blocks.0"]["scale"]}
    params |= {
        k: {n: x for n, x in p.items() if n != "scale"} for k, p in PARAMS.items()
    }
    result, _ = prune(tied, params, reconstruct=fh.Reconstruct(steps=8, rate=0.01))
    np.testing.assert_array_equal(result.params["scale"], params["scale"])
    assert (result.params["blocks.1"]["bias"] != params["blocks.1"]["bias"]).any()


def test_rows_of_a_scan_are_trained_like_layers_of_their_own():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *PARAMS.values())

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]

    how = fh.Reconstruct(steps=12, rate=0.01)
    # The order of the batches follows from the names of the windows.
    result, told = prune(scanned, stacked, BATCHES[:1], reconstruct=how)
    want, others = prune(batches=BATCHES[:1], reconstruct=how)
    for k, name in enumerate(PARAMS):
        for part, x in want.params[name].items():
            np.testing.assert_allclose(result.params[part][k], x, atol=1e-4)
    assert [t.after for t in told] == pytest.approx([t.after for t in others], rel=1e-3)


def test_a_pruned_model_is_reconstructed_without_pruning_it_again(tmp_path):
    before, _ = prune()
    how, told = fh.Reconstruct(steps=30, rate=0.01, target="seq"), []
    options: Any = {"key": KEY, "progress": told.append, "resume": tmp_path}
    run = (blocks, before.params, PARAMS, BATCHES, how)
    got = fh.reconstruct(*run, **options)
    assert len(told) == 2 and all(t.after < t.before for t in told)
    assert lost(blocks, PARAMS, got) < 0.8 * lost(blocks, PARAMS, before.params)
    for name, part in ((n, p) for n in PARAMS for p in ("in", "out")):
        np.testing.assert_array_equal(
            got[name][part] == 0, before.params[name][part] == 0
        )
    again = fh.reconstruct(*run, **options)
    jax.tree.map(np.testing.assert_array_equal, again, got)


@pytest.mark.parametrize(
    "pattern", [fh.FlexHiNM(4, permute=fh.RandomRows()), fh.Transposable(2, 4)]
)
def test_other_patterns_stay_what_they_are(pattern):
    low, high = pattern.sparsity_range()
    sparsity = None if low == high else 0.75
    how = fh.Reconstruct(steps=6, rate=0.01)
    result, _ = prune(method=fh.Wanda(pattern), sparsity=sparsity, reconstruct=how)
    for plan in result.plans.values():
        fh.verify(plan)


def test_tokens_that_are_masked_do_not_count():
    x = jnp.stack(BATCHES)
    mask = jnp.arange(16)[None] < jnp.array([16, 9, 12, 4])[:, None]
    spoiled = jnp.where(mask[..., None], x, 1e3)

    def run(x):
        return fh.prune_sequential(
            lambda p, x, mask: blocks(p, x),
            PARAMS,
            [(x, mask)],
            fh.Wanda(NM),
            key=KEY,
            token_mask=lambda x, mask: mask,
            reconstruct=fh.Reconstruct(steps=6, rate=0.01),
        ).params

    jax.tree.map(np.testing.assert_array_equal, run(x), run(spoiled))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"rate": -1.0}, "rate=-1.0: need a positive number"),
        ({"target": "resid"}, "target='resid': choose 'asym' or 'seq'"),
        ({"window": 0}, "window"),
        ({"window": "("}, "no regular expression"),
        ({"window": None}, "need 'block', 'part'"),
    ],
)
def test_bad_options_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        fh.Reconstruct(**options)


def test_what_cannot_be_reconstructed_is_refused_by_name():
    with pytest.raises(ValueError, match="with statistics='block' all weights of a"):
        prune(statistics="block", reconstruct=fh.Reconstruct("part"))
    method = fh.ARMOR(NM, block=4)
    with pytest.raises(ValueError, match="blocks.0/in: its plan has block-diagonal"):
        prune(method=method, reconstruct=fh.Reconstruct(steps=1))
    with pytest.raises(ValueError, match="trees of different structure"):
        fh.reconstruct(blocks, {}, PARAMS, BATCHES, fh.Reconstruct(), key=KEY)
    with pytest.raises(ValueError, match="need a Reconstruct"):
        fh.reconstruct(blocks, PARAMS, PARAMS, BATCHES, 3, key=KEY)  # type: ignore
