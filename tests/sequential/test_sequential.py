"""One pass, cut by cut: targets against hand-computed least squares, and resuming."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.io import fingerprint
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.sequential import (
    cuts,
    finished,
    segments,
    sequential,
    solver,
    targets,
)
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.tracing import meshes
from flexhinm_jax.types import Stats
from tests import compiled

KEY = jax.random.key(5)
PROGRAMS = cuts.Programs  # which share nothing
programs = compiled.walks_share_programs
NM = fh.NM(2, 4)


def normal(k, *shape, scale=0.4):
    return scale * jax.random.normal(jax.random.key(k), shape)


def one_layer(params, x):
    return x @ params["w"] + params["b"]


def chain(params, x):
    h = jnp.tanh(x @ params["first"])
    return h @ params["second"] + params["bias"]


CHAIN = {
    "first": normal(0, 8, 16),
    "second": normal(1, 16, 8),
    "bias": normal(2, 8),
}
X = normal(3, 64, 8, scale=1.0)


def test_one_layer_is_pruned_as_by_prune():
    params = {"w": normal(0, 16, 8), "b": normal(1, 8)}
    x = normal(2, 40, 16)
    for method in (fh.Wanda(NM), fh.SparseGPT(NM)):
        want = fh.prune(one_layer, params, [x], method, key=KEY)
        got = fh.prune_sequential(one_layer, params, [x], method, key=KEY, center=False)
        np.testing.assert_array_equal(
            got.plans["w"].support.keep, want.plans["w"].support.keep
        )
        np.testing.assert_allclose(got.params["w"], want.params["w"], atol=1e-5)


def seen(monkeypatch):
    """What `solve` is given: (path, at) -> statistics."""
    found: dict[tuple, Stats] = {}
    original = solver.solve

    def solve(job, stats, run):
        found.update(stats)
        return original(job, stats, run)

    monkeypatch.setattr(solver, "solve", solve)
    return found


def test_the_second_layer_is_fitted_on_pruned_inputs(monkeypatch):
    found = seen(monkeypatch)
    result = fh.prune_sequential(chain, CHAIN, [X[:32], X[32:]], fh.Wanda(NM), key=KEY)
    h = np.tanh(X @ result.params["first"])
    stats = found["second", ()]
    np.testing.assert_allclose(stats.gram, h.T @ h, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.mean, h.mean(0), atol=1e-5)
    assert stats.cross is None
    assert float(stats.count) == 64


def test_asym_fits_the_output_of_the_dense_model(monkeypatch):
    found = seen(monkeypatch)
    result = fh.prune_sequential(
        chain, CHAIN, [X], fh.Wanda(NM), key=KEY, target="asym"
    )
    pruned, dense = (np.tanh(X @ p["first"]) for p in (result.params, CHAIN))
    wanted = dense @ CHAIN["second"]
    stats = found["second", ()]
    np.testing.assert_allclose(stats.cross, wanted.T @ pruned, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats.target_mean, wanted.mean(0), atol=1e-5)
    want = CHAIN["first"].T @ (X.T @ X)
    np.testing.assert_allclose(found["first", ()].cross, want, rtol=1e-4, atol=1e-3)


def test_asym_without_zeros_is_the_dense_regression():
    rules = {"second": fh.Unstructured()}
    result = fh.prune_sequential(
        chain,
        CHAIN,
        [X],
        fh.ALPS(NM, damp=1e-6, refit_steps=300),
        key=KEY,
        target="asym",
        rules=rules,
        sparsity={"first": 0.5, "second": 0.0},
    )
    h = jnp.tanh(X @ result.params["first"])
    h = np.concatenate([h, np.ones((64, 1))], axis=1)
    want = np.linalg.lstsq(h, np.asarray(chain(CHAIN, X)), rcond=None)[0]
    np.testing.assert_allclose(result.params["second"], want[:-1], atol=5e-3)
    np.testing.assert_allclose(result.params["bias"], want[-1], atol=5e-3)


def stream(params, x):
    """Two residual blocks, one with a reshape between product and addition."""
    x = x + (jnp.tanh(x @ params["a"]) @ params["b"]).reshape(x.shape)
    y = jnp.einsum("tk,khd->thd", jnp.tanh(x @ params["c"]), params["d"])
    return x + (y.reshape(x.shape) + params["bias"])


STREAM = {
    "a": normal(0, 8, 16),
    "b": normal(1, 16, 8),
    "c": normal(2, 8, 16),
    "d": normal(3, 16, 2, 4),
    "bias": normal(4, 8),
}


def test_resid_adds_what_the_stream_lacks(monkeypatch):
    found = seen(monkeypatch)
    result = fh.prune_sequential(
        stream, STREAM, [X], fh.Wanda(NM), key=KEY, target="resid"
    )

    def inner(p):
        x = X + jnp.tanh(X @ p["a"]) @ p["b"]
        return x, jnp.tanh(x @ p["c"])

    (x_dense, h_dense), (x, h) = inner(STREAM), inner(result.params)
    wanted = h_dense @ STREAM["d"].reshape(16, 8) + (x_dense - x)
    stats = found["d", ()]
    np.testing.assert_allclose(stats.cross, wanted.T @ h, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats.target_mean, wanted.mean(0), atol=1e-5)
    b = found["b", ()]  # its stream is the input, which no pruning changes
    t = jnp.tanh(X @ STREAM["a"]) @ STREAM["b"]
    pruned = jnp.tanh(X @ result.params["a"])
    np.testing.assert_allclose(b.cross, t.T @ pruned, rtol=1e-4, atol=1e-3)


def test_masked_tokens_do_not_count(monkeypatch):
    found = seen(monkeypatch)
    x = X.reshape(4, 16, 8)
    mask = jnp.arange(16)[None] < jnp.array([16, 3, 9, 0])[:, None]
    x = jnp.where(mask[..., None], x, jnp.nan)

    def apply_fn(params, x, mask):
        return chain(params, x)

    fh.prune_sequential(
        apply_fn,
        CHAIN,
        [(x, mask)],
        fh.Wanda(NM),
        key=KEY,
        token_mask=lambda x, mask: mask,
    )
    kept = x[mask]
    np.testing.assert_allclose(
        found["first", ()].gram, kept.T @ kept, rtol=1e-4, atol=1e-4
    )
    assert float(found["first", ()].count) == 28


@pytest.mark.parametrize("count", [1000, 1500, 2047])
def test_the_rows_that_count_are_padded_to_few_sizes(count):
    mask = np.arange(2048) < count
    found: Any = targets.tokens_for(mask)
    valid, positions = found
    assert valid.sum() == count
    if positions is not None:
        assert len(positions) % 256 == 0
        np.testing.assert_array_equal(positions[valid > 0], np.arange(count))


def attention(params, x):
    """A transformer block: q, k, v share their input."""
    q, k, v = (x @ params[name] for name in ("q", "k", "v"))
    h = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v
    x = x + h @ params["o"]
    return x + (jax.nn.gelu(x @ params["up"] + params["b1"]) @ params["down"])


def layer_shapes(d):
    square = dict.fromkeys("qkvo", (d, d))
    return {**square, "up": (d, 2 * d), "b1": (2 * d,), "down": (2 * d, d)}


def layers(count, d=16):
    shapes = layer_shapes(d)
    return {
        name: normal(k, count, *shape, scale=0.6 / np.sqrt(shape[0]))
        for k, (name, shape) in enumerate(shapes.items())
    }


def scanned(params, x):
    return jax.lax.scan(lambda x, p: (attention(p, x), None), x, params)[0]


def unrolled(params, x):
    for k in range(2):
        x = attention(jax.tree.map(lambda w: w[k], params), x)  # noqa: B023
    return x


TOKENS = [normal(30 + k, 4, 12, 16, scale=1.0) for k in range(3)]


def test_a_scan_over_layers_is_pruned_like_the_unrolled_model():
    params = layers(2)
    results = [
        fh.prune_sequential(
            apply_fn, params, TOKENS, fh.Wanda(NM), key=KEY, target="resid"
        )
        for apply_fn in (scanned, unrolled)
    ]
    assert results[0].plans.keys() == results[1].plans.keys()
    for name in params:
        np.testing.assert_allclose(
            results[0].params[name], results[1].params[name], atol=1e-5
        )


def test_q_k_and_v_share_one_gram(monkeypatch):
    found = seen(monkeypatch)
    fh.prune_sequential(scanned, layers(2), TOKENS, fh.Wanda(NM), key=KEY)
    for k in range(2):
        grams = [found[name, (k,)].gram for name in "qkv"]
        assert grams[0] is grams[1] is grams[2]
    assert found["q", (0,)].gram is not found["q", (1,)].gram


def relative(apply_fn, params, sparse):
    x = jnp.concatenate(TOKENS)
    y = apply_fn(params, x)
    return float(jnp.mean(jnp.square(apply_fn(sparse, x) - y)) / jnp.var(y))


@pytest.mark.slow
def test_going_in_order_loses_less_than_one_shot():
    params, method = layers(2), fh.Refit(fh.Wanda(NM))
    once = fh.prune(scanned, params, TOKENS, method, key=KEY)
    errors = {"once": relative(scanned, params, once.params)}
    for target in ("asym", "resid"):
        result = fh.prune_sequential(
            scanned, params, TOKENS, method, key=KEY, target=target, center=False
        )
        errors[target] = relative(scanned, params, result.params)
    assert errors["resid"] < errors["asym"] < errors["once"], errors


def block(params, x):
    return x + jnp.tanh(x @ params["in"]) @ params["out"]


def two_blocks(params, x):
    return block(params["blocks.1"], block(params["blocks.0"], x))


TWO_BLOCKS = {
    f"blocks.{k}": {"in": normal(40 + k, 8, 16), "out": normal(42 + k, 16, 8)}
    for k in range(2)
}


@pytest.mark.parametrize("statistics", ["sequential", "block", "dense", None])
def test_statistics_are_those_of_the_weights_that_were_asked_for(
    monkeypatch, statistics
):
    found = seen(monkeypatch)
    batches = [X[:32], X[32:]]
    result = fh.prune_sequential(
        two_blocks, TWO_BLOCKS, batches, fh.Wanda(NM), key=KEY, statistics=statistics
    )
    x = np.asarray(X)
    for name, dense in TWO_BLOCKS.items():
        pruned = result.params[name]
        judged, after = {
            "sequential": (pruned, pruned),
            "block": (dense, pruned),
            "dense": (dense, dense),
            None: (dense, pruned),  # what Wanda prefers
        }[statistics]
        inputs = {"in": x, "out": np.tanh(x @ judged["in"])}
        for part, seen_by in inputs.items():
            got = found[f"{name}/{part}", ()]
            np.testing.assert_allclose(got.gram, seen_by.T @ seen_by, 1e-4, 1e-4)
        x = np.asarray(block(after, x))


@pytest.mark.parametrize("name", [n for n in fh.methods.METHODS if n != "patch"])
def test_a_method_says_whose_statistics_it_prefers(name):
    method = fh.methods.parse(name, NM)
    request = functools.partial(Request, method=method, key=KEY)
    preferred = "block" if name == "wanda" else "sequential"
    assert request().statistics == request(target="asym").statistics == preferred
    assert request(reconstruct=fh.Reconstruct()).statistics == preferred
    assert request(reconstruct=fh.Reconstruct("part")).statistics == "sequential"
    assert request(statistics="dense").statistics == "dense"


def test_statistics_of_the_dense_model_are_those_of_one_shot():
    method = fh.SparseGPT(NM)
    once = fh.prune(two_blocks, TWO_BLOCKS, [X], method, key=KEY)
    got = fh.prune_sequential(
        two_blocks,
        TWO_BLOCKS,
        [X],
        method,
        key=KEY,
        statistics="dense",
        center=False,
    )
    for one, other in zip(
        jax.tree.leaves(once.params), jax.tree.leaves(got.params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("target", ["seq", "resid"])
def test_a_block_of_one_product_is_a_product(target):
    options = {"key": KEY, "target": target}
    method = fh.Refit(fh.Wanda(NM))
    want = fh.prune_sequential(two_blocks, TWO_BLOCKS, [X], method, **options)
    got = fh.prune_sequential(
        two_blocks,
        TWO_BLOCKS,
        [X],
        method,
        statistics="block",
        block=".*",
        **options,
    )
    jax.tree.map(np.testing.assert_array_equal, got.plans, want.plans)


def test_a_block_is_fitted_to_the_dense_model_where_that_is_asked(monkeypatch):
    found = seen(monkeypatch)
    result = fh.prune_sequential(
        two_blocks,
        TWO_BLOCKS,
        [X],
        fh.Wanda(NM),
        key=KEY,
        statistics="block",
        target="resid",
    )
    pruned, dense = (
        np.asarray(block(p["blocks.0"], X)) for p in (result.params, TWO_BLOCKS)
    )
    weights = TWO_BLOCKS["blocks.1"]
    inputs = np.tanh(pruned @ weights["in"])
    wanted = np.tanh(dense @ weights["in"]) @ weights["out"] + dense - pruned
    stats = found["blocks.1/out", ()]
    np.testing.assert_allclose(stats.cross, wanted.T @ inputs, rtol=1e-4, atol=1e-3)


def test_positions_of_a_scan_are_blocks(monkeypatch):
    """A scanned model and the unrolled one, whose leaves are named by layer."""
    found = seen(monkeypatch)
    options = {"key": KEY, "statistics": "block"}
    params, method = layers(2), fh.Wanda(NM)
    apart = {f"layer.{k}": {n: w[k] for n, w in params.items()} for k in range(2)}

    def named(params, x):
        return attention(params["layer.1"], attention(params["layer.0"], x))

    want = fh.prune_sequential(named, apart, TOKENS, method, **options)
    unrolled, held = dict(found), []
    found.clear()
    got = fh.prune_sequential(
        scanned,
        params,
        TOKENS,
        method,
        memory_limit=0,
        progress=lambda layer: held.append(layer.held),
        **options,
    )
    assert not any(held)
    for name in params:
        for k in range(2):
            np.testing.assert_allclose(
                got.params[name][k], want.params[f"layer.{k}"][name], atol=1e-5
            )
    assert len(found) == len(unrolled)
    for (name, (k,)), stats in found.items():
        want = unrolled[f"layer.{k}/{name}", ()].gram
        np.testing.assert_allclose(stats.gram, want, rtol=1e-4, atol=1e-4)


def test_a_bias_is_refitted_so_that_the_mean_output_stays():
    x = X + 2.0
    result = fh.prune_sequential(chain, CHAIN, [x], fh.SparseGPT(NM), key=KEY)
    h = jnp.tanh(x @ result.params["first"])
    want = (h @ CHAIN["second"] + CHAIN["bias"]).mean(0)
    got = (h @ result.params["second"] + result.params["bias"]).mean(0)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert result.plans["first"].bias is None  # it has none of its own
    asym = fh.prune_sequential(
        chain, CHAIN, [x], fh.SparseGPT(NM), key=KEY, target="asym"
    )
    want = chain(CHAIN, x).mean(0)
    np.testing.assert_allclose(chain(asym.params, x).mean(0), want, atol=1e-4)


def scaled_chain(w, b):
    """`chain` of leaves with constants of the program, and those leaves of CHAIN."""

    def apply_fn(params, x):
        h = jnp.tanh(x @ (params["first"] * w))
        return h @ (params["second"] / w) + b * params["bias"]

    first, second, bias = CHAIN["first"] / w, CHAIN["second"] * w, CHAIN["bias"] / b
    return apply_fn, {"first": first, "second": second, "bias": bias}


@pytest.mark.parametrize("w, b", [(0.25, 1.0), (1.0, 0.125), (8.0, -1.0), (-0.5, 4.0)])
@pytest.mark.parametrize("target", ["seq", "asym"])
def test_constants_on_weights_and_biases_change_no_outputs(w, b, target):
    x = X + 2.0
    apply_fn, params = scaled_chain(w, b)
    options = {"key": KEY, "target": target}
    want = fh.prune_sequential(chain, CHAIN, [x], fh.SparseGPT(NM), **options)
    got = fh.prune_sequential(apply_fn, params, [x], fh.SparseGPT(NM), **options)
    assert got.plans["second"].bias is not None
    np.testing.assert_allclose(
        apply_fn(got.params, x), chain(want.params, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("factor", [0.25, -8.0])
def test_a_constant_on_a_weight_leaves_the_target_of_its_stream(factor):
    def scaled(params, x):
        return stream(params | {"b": params["b"] * factor}, x)

    params = STREAM | {"b": STREAM["b"] / factor}
    options = {"key": KEY, "target": "resid"}
    want = fh.prune_sequential(stream, STREAM, [X], fh.SparseGPT(NM), **options)
    got = fh.prune_sequential(scaled, params, [X], fh.SparseGPT(NM), **options)
    np.testing.assert_allclose(
        scaled(got.params, X), stream(want.params, X), rtol=1e-5, atol=1e-5
    )


def test_a_computed_factor_gives_up_the_stream_and_the_bias_and_says_so():
    def scaled(params, x):
        return stream(params | {"d": params["d"] * params["s"]}, x)

    params = STREAM | {"d": STREAM["d"] / 16, "s": jnp.float32(16.0)}
    layers: list[Any] = []
    got, want = (
        fh.prune_sequential(
            scaled,
            params,
            [X],
            fh.SparseGPT(NM),
            key=KEY,
            target=target,
            progress=layers.append,
        )
        for target in ("resid", "asym")
    )
    notes = {layer.path: layer.note for layer in layers[:4]}
    assert notes.pop("d").startswith('target "asym": the weight is multiplied with a')
    assert not any([*notes.values(), *(layer.note for layer in layers[4:])])
    assert got.plans["d"].bias is None
    for name in params:
        np.testing.assert_array_equal(got.params[name], want.params[name])


def test_a_result_that_is_returned_too_is_no_part_of_a_stream():
    def both(params, x):
        x = x + jnp.tanh(x @ params["a"]) @ params["b"]
        y = jnp.tanh(x @ params["c"]) @ params["d"].reshape(16, 8)
        return x + y, y

    params = {name: STREAM[name] for name in "abcd"}
    got, want = (
        fh.prune_sequential(both, params, [X], fh.SparseGPT(NM), key=KEY, target=t)
        for t in ("resid", "asym")
    )
    np.testing.assert_array_equal(got.params["d"], want.params["d"])


@pytest.mark.parametrize("device", [None, *jax.devices()[:1]])
def test_a_pruned_leaf_is_bound_to_a_device_where_the_dense_one_was(device):
    """A program is compiled anew for every mixture of arrays that are and are not."""
    dense = jax.device_put(np.ones(3, np.float32), device)
    pruned = meshes.placed(np.zeros(3, np.float32), dense)
    assert pruned.committed == dense.committed == (device is not None)
    assert pruned.sharding == dense.sharding and not pruned.any()


class Killed(Exception):
    """The process dies."""


@pytest.mark.parametrize(
    ("stop", "statistics"), [(2, "sequential"), (9, "sequential"), (9, "block")]
)
def test_a_killed_run_goes_on_to_the_same_plans(tmp_path, stop, statistics):
    params = layers(2)
    options: Any = {"key": KEY, "target": "resid", "statistics": statistics}
    method = fh.Refit(fh.Wanda(NM))
    want = fh.prune_sequential(scanned, params, TOKENS, method, **options)

    def kill(layer):
        if layer.done == stop:
            raise Killed

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        fh.prune_sequential(
            scanned, params, TOKENS, method, progress=kill, resume=folder, **options
        )
    before = {p: p.read_bytes() for p in folder.glob("*.npz")}
    assert before
    got = fh.prune_sequential(scanned, params, TOKENS, method, resume=folder, **options)
    assert all(p.read_bytes() == data for p, data in before.items())
    for x, y in zip(
        jax.tree.leaves(got.plans), jax.tree.leaves(want.plans), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    with pytest.raises(ValueError, match="resume: .* was begun with target="):
        fh.prune_sequential(
            scanned,
            params,
            TOKENS,
            method,
            resume=folder,
            **(options | {"target": "seq"}),
        )


@pytest.mark.parametrize("retrain", [False, True])
def test_a_folder_of_another_function_is_refused(tmp_path, retrain):
    def function(activation, shift):
        return lambda p, x: activation(x @ p["first"] + shift) @ p["second"]

    def run(apply_fn):
        options: Any = {"key": KEY, "resume": tmp_path / "run"}
        if not retrain:
            method = fh.Wanda(NM)
            return fh.prune_sequential(apply_fn, params, [X], method, **options).params
        how = fh.Reconstruct(window=".*", steps=2)
        return fh.reconstruct(apply_fn, zeros, params, [X], how, **options)

    params = {name: CHAIN[name] for name in ("first", "second")}
    zeros = jax.tree.map(lambda w: w.at[::2].set(0), params)
    shift = jnp.arange(float(params["first"].shape[1]))
    want = run(function(jax.nn.relu, shift))
    jax.tree.map(np.testing.assert_array_equal, run(function(jax.nn.relu, shift)), want)
    for other in (
        function(lambda h: jnp.cos(3 * h), shift),
        function(jax.nn.relu, shift.at[0].set(0.5)),
    ):
        with pytest.raises(ValueError, match="resume: .* was begun with program="):
            run(other)


def test_a_run_in_bfloat16_is_kept_and_found_again(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), CHAIN)
    x = X.astype(jnp.bfloat16)
    runs = [
        fh.prune_sequential(
            chain, params, [x], fh.SparseGPT(NM), key=KEY, resume=tmp_path / "run"
        )
        for _ in range(2)
    ]
    assert runs[1].params["second"].dtype == jnp.bfloat16
    for name in params:
        np.testing.assert_array_equal(
            np.asarray(runs[0].params[name]), np.asarray(runs[1].params[name])
        )


def test_a_folder_of_an_older_version_is_refused_by_name(tmp_path):
    config = fingerprint.record(target="seq")
    finished.Finished(tmp_path, config)
    path = tmp_path / finished.CONFIG
    path.write_text(path.read_text().replace("fingerprint", "other"))
    with pytest.raises(ValueError, match=f"{tmp_path} was begun by another version"):
        finished.Finished(tmp_path, config)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"job\.json is damaged"):
        finished.Finished(tmp_path, config)


def test_only_what_a_run_began_is_taken_for_its_folder(tmp_path):
    config = fingerprint.record(target="seq")
    for name in ("empty", "killed", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / ".job.json.tmp-0123abcd").write_text("{")
    for name in ("new", "empty", "killed"):
        for _ in range(2):
            finished.Finished(tmp_path / name, config)
    (tmp_path / "others" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, told in (
        ("others", "others holds precious.txt and no job.json"),
        ("file", "file is a file"),
    ):
        with pytest.raises(FileExistsError, match=f"{told}.*move it away"):
            finished.Finished(tmp_path / name, config)
    assert [p.name for p in (tmp_path / "others").iterdir()] == ["precious.txt"]


def recurrent(params, x):
    """A weight in a loop over time, one used twice, and one that is cut."""

    def step(h, x):
        return jnp.tanh(h @ params["loop"] + x), None

    h, _ = jax.lax.scan(step, jnp.zeros_like(x[0]), x)
    h = jnp.tanh(h @ params["twice"])
    return jnp.tanh(h @ params["twice"]) @ params["last"]


def test_what_cannot_be_cut_is_solved_on_a_plain_run_and_says_why():
    params = {name: normal(k, 8, 8) for k, name in enumerate(("loop", "twice", "last"))}
    x = normal(9, 5, 64, 8, scale=1.0)
    records = []
    result = fh.prune_sequential(
        recurrent, params, [x], fh.SparseGPT(NM), key=KEY, progress=records.append
    )
    notes = {r.path: r.note for r in records}
    assert "scan" in notes["loop"]
    assert notes["twice"] == "solved on a plain run: used on 2 different inputs"
    assert notes["last"] == ""
    assert all((np.asarray(result.params[n]) == 0).mean() == 0.5 for n in params)


def test_values_are_freed_and_go_to_disk_beyond_the_limit(monkeypatch):
    shelves = []

    def shelf(limit):
        shelves.append(Shelf(limit))
        return shelves[-1]

    monkeypatch.setattr(sequential, "Shelf", shelf)
    params, results = layers(2), []
    for limit in (None, 4000):
        results.append(
            fh.prune_sequential(
                scanned,
                params,
                TOKENS,
                fh.Wanda(NM),
                key=KEY,
                target="resid",
                memory_limit=limit,
            )
        )
    for name in params:
        np.testing.assert_array_equal(results[0].params[name], results[1].params[name])
    free, limited = shelves
    assert free.held == limited.held == 0
    assert limited.peak <= 4000 < free.peak
    # Never more than a few activations of each batch: the stream, q, k and v, twice.
    assert free.peak <= 10 * sum(x.nbytes for x in TOKENS)


def test_batches_of_several_shapes_compile_equal_layers_once(monkeypatch):
    compilers = []
    original = segments.Compiler

    def compiler(*before):
        compilers.append(original(*before))
        return compilers[-1]

    monkeypatch.setattr(cuts, "Programs", PROGRAMS)
    monkeypatch.setattr(segments, "Compiler", compiler)
    params = layers(4)
    fh.prune_sequential(
        scanned, params, [TOKENS[0][:, :6], *TOKENS], fh.Wanda(NM), key=KEY
    )
    # A layer has four segments and four kinds of statistics for either shape, and the
    # first segment of all reads the batch itself.
    assert len(compilers[0].known) <= 2 * (4 + 4 + 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "dense"}, "target='dense'"),
        ({"statistics": "asym"}, "statistics='asym': choose one of sequential"),
        ({"statistics": "dense", "target": "asym"}, "give target='seq', or"),
        ({"block": "("}, "is no regular expression"),
        ({"batches": []}, "batches is empty"),
        ({"method": fh.Fisher(NM)}, "needs gradients"),
        ({"sparsity": 0.7}, "0.7"),
        ({"batches": [X * jnp.nan]}, "NaN or Inf"),
    ],
)
def test_bad_input_is_refused(options, match):
    given = {"batches": [X], "method": fh.Wanda(NM)} | options
    batches, method = given.pop("batches"), given.pop("method")
    with pytest.raises(ValueError, match=match):
        fh.prune_sequential(chain, CHAIN, batches, method, key=KEY, **given)


def test_progress_says_what_was_done():
    records = []
    fh.prune_sequential(
        chain, CHAIN, [X], fh.Wanda(NM), key=KEY, progress=records.append
    )
    assert [(r.path, r.done, r.total) for r in records] == [
        ("first", 1, 2),
        ("second", 2, 2),
    ]
    assert all(0 < r.error < 1 and r.seconds >= 0 and r.held > 0 for r in records)


def half(params, h):
    """One half of a model, as a streamed run has it."""
    (name,) = params
    return h + jnp.tanh(h @ params[name])


@pytest.mark.parametrize("target", ["seq", "resid"])
def test_a_walk_in_two_halves_is_the_walk_of_the_whole(target):
    params = {"a": normal(0, 8, 8), "b": normal(1, 8, 8)}
    batches, method = [X[:32], X[32:]], fh.Wanda(NM)

    def whole(p, x):
        return half({"b": p["b"]}, half({"a": p["a"]}, x))

    want = fh.prune_sequential(whole, params, batches, method, key=KEY, target=target)
    now: Any = [(x,) for x in batches]
    dense: Any = None
    programs, leaves = cuts.Programs(), {}
    for name in ("a", "b"):
        mine = {name: params[name]}
        uses = fh.discover(half, mine, *now[0])
        beside = target != "seq"
        request = Request(method=method, key=KEY, target=target)
        job = Job(half, mine, now, uses, request)
        walk = cuts.Walk(
            job,
            Shelf(None),
            twins=dense,
            programs=programs,
            to_end=True,
        )
        taken = {}
        assert walk.run(None, taken.__setitem__) == {}
        assert taken.keys() == {name}
        leaves |= job.current
        pairs = list(walk.outputs())
        now, dense = [p[0] for p in pairs], [p[1] for p in pairs] if beside else None
        assert walk.shelf.held == 0
    for name in params:
        np.testing.assert_array_equal(leaves[name], want.params[name])
    for x, (y,) in zip(batches, now, strict=True):
        np.testing.assert_allclose(y, whole(want.params, x), atol=1e-5)
    if dense is not None:
        for x, (y,) in zip(batches, dense, strict=True):
            np.testing.assert_allclose(y, whole(params, x), atol=1e-5)
