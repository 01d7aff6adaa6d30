"""What the golden file records: small computations through the public functions alone.

Every program returns a flat dict, name -> NumPy array. Data are random numbers of
NumPy, whose ties are improbable: no decision hangs on the last bit of a sum. Most
matrices are 16 x 16, so that programs share what they compile.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import flexhinm_jax as fh

KEY = jax.random.key(7)
D = 16
WIDE = 768  # from here on the sequential pass sums a Gram matrix in bands

WANDA = fh.Wanda(fh.NM(2, 4))
REFIT = fh.Refit(WANDA)
SPARSEGPT = fh.SparseGPT(fh.FlexHiNM(4, permute=None))
GYRO = fh.Wanda(fh.FlexHiNM(4, permute=fh.Gyro(sweeps=8, rounds=2, exchanges=4)))

Arrays = dict[str, np.ndarray]


class Model(NamedTuple):
    """A function, its parameters and calibration batches."""

    apply_fn: Callable[..., Any]
    params: Any
    batches: list[Any]


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return found * np.float32(scale)


def weights(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random leaves; those called b... are biases."""
    return {
        name: normal(seed + k, *shape, scale=0.1 if name[0] == "b" else 0.35)
        for k, (name, shape) in enumerate(shapes.items())
    }


def inputs(seed: int, *shape: int) -> list[np.ndarray]:
    """Two batches whose channels are unequally large, with a mean."""
    sizes = np.exp(normal(seed, shape[-1], scale=0.5))
    means = normal(seed + 1, shape[-1], scale=0.3)
    return [means + sizes * normal(seed + k, *shape) for k in (2, 3)]


def mlp() -> Model:
    def apply_fn(p, x):
        h = jax.nn.relu(x @ p["w1"] + p["b1"])
        h = jnp.tanh(h @ p["w2"] + p["b2"])
        h = jax.nn.gelu(h @ p["w3"] + p["b3"])
        return h @ p["w4"] + p["b4"]

    shapes = {f"w{k}": (D, D) for k in range(1, 5)}
    shapes |= {f"b{k}": (D,) for k in range(1, 5)}
    return Model(apply_fn, weights(10, shapes), inputs(20, 24, D))


def scanned() -> Model:
    def layer(h, p):
        return h + jnp.tanh(h @ p["w"] + p["b"]) @ p["v"], None

    def apply_fn(p, x):
        return lax.scan(layer, x, p)[0]

    shapes = {"w": (2, D, D), "b": (2, D), "v": (2, D, D)}
    return Model(apply_fn, weights(30, shapes), inputs(40, 3, 8, D))


def attention() -> Model:
    """Heads out of one fused projection, two residual additions."""

    def apply_fn(p, x):
        x = jnp.tanh(x @ p["in"])
        q, k, v = jnp.einsum("btd,dnhe->nbthe", x, p["qkv"])
        scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(8.0))
        mixed = jnp.einsum("bhts,bshe->bthe", scores, v)
        x = x + jnp.einsum("bthe,hed->btd", mixed, p["o"])
        return x + jax.nn.gelu(x @ p["up"] + p["b"]) @ p["down"]

    shapes = {"in": (D, D), "qkv": (D, 3, 2, 8), "o": (2, 8, D), "up": (D, D)}
    shapes |= {"b": (D,), "down": (D, D)}
    return Model(apply_fn, weights(50, shapes), inputs(60, 3, 8, D))


def convolution() -> Model:
    """A window of 2 x 2 with a stride, one of 1 x 1, then two dense layers."""

    def conv(x, w, stride):
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=names
        )

    def apply_fn(p, x):
        h = jax.nn.silu(conv(x, p["c2"], 2) + p["b"])
        h = jax.nn.relu(conv(h, p["c1"], 1)).mean((1, 2))
        return jnp.tanh(h @ p["w1"]) @ p["w2"]

    shapes = {"c2": (2, 2, 4, D), "b": (D,), "c1": (1, 1, D, D)}
    shapes |= {"w1": (D, D), "w2": (D, D)}
    return Model(apply_fn, weights(70, shapes), inputs(80, 24, 3, 3, 4))


def control() -> Model:
    """Weights inside remat and jit, in a cond, used twice, and tied to a transpose."""
    block = jax.jit(lambda w, b, h: h + jnp.tanh(h @ w + b))

    def apply_fn(p, x):
        h = jax.checkpoint(block)(p["inner"], p["b"], x @ p["tied"])
        turned = lambda h: jnp.sin(h @ p["branch"])  # noqa: E731
        h = lax.cond(x.sum() > 1e6, lambda h: h @ p["branch"], turned, h)
        h = jnp.tanh(h @ p["twice"])
        return jnp.tanh(h @ p["twice"]) @ p["tied"].T

    names = ("tied", "inner", "b", "branch", "twice")
    shapes = {name: (D,) if name == "b" else (D, D) for name in names}
    return Model(apply_fn, weights(90, shapes), inputs(100, 24, D))


def wide() -> Model:
    """One matrix with a wide input that pruning has changed, added to a stream."""

    def apply_fn(p, x):
        x = x + jnp.tanh(x @ p["first"])
        return x[:, :4] + jnp.sin(3 * x @ p["fixed"]) @ p["wide"]

    shapes = {"first": (D, D), "fixed": (D, WIDE), "wide": (WIDE, 4)}
    return Model(apply_fn, weights(110, shapes), inputs(120, 400, D))


MODELS = {
    "mlp": mlp,
    "scan": scanned,
    "attention": attention,
    "convolution": convolution,
    "control": control,
}


def flat(name: str, tree: Any) -> Arrays:
    """The arrays of a pytree, by where they are."""
    out = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        out[name + jax.tree_util.keystr(path)] = np.asarray(x)
    return out


def found(uses: fh.Uses) -> np.ndarray:
    """What was found, a line per use, then what was skipped."""
    lines = [
        f"{u.path} {u.ordinal} {u.layout.stack_shape} {u.layout.matrix_shape} {u.at} "
        f"{u.source} {u.bias}"
        for u in uses
    ]
    return np.array([*lines, *sorted(uses.skipped)])


def one_shot(model: Model, method: fh.Method, statistics: bool = False) -> Arrays:
    """Step by step: discover, calibrate, solve, decide, densify, pack, sparsify."""
    apply_fn, params, batches = model
    uses = fh.discover(apply_fn, params, batches[0])
    stats = fh.calibrate(apply_fn, params, uses, batches)
    out = {"uses": found(uses)} | (flat("stats", stats) if statistics else {})
    states = fh.solve(method, KEY, params, uses, stats, 0.5)
    plans = fh.decide(method, states, params, uses)
    packed = fh.pack(plans, params, uses)
    out |= flat("plans", plans) | flat("packed", packed)
    out |= flat("dense", fh.densify(plans, params, uses))
    out["output"] = np.asarray(jax.jit(fh.sparsify(apply_fn))(packed, batches[0]))
    return out


def sequential(
    model: Model, method: fh.Method, target: Any, rules: Any = None
) -> Arrays:
    """One pass, with the error of every matrix, which sums over its statistics."""
    layers: list[fh.Layer] = []
    result = fh.prune_sequential(
        *model,
        method,
        sparsity=0.5,
        key=KEY,
        target=target,
        rules=rules,
        progress=layers.append,
    )
    out = flat("plans", result.plans) | flat("params", result.params)
    out["order"] = np.array([f"{x.path} {x.at}" for x in layers])
    out["error"] = np.array([x.error for x in layers], np.float32)
    facts = [dict(x.facts) for x in layers]
    return out | flat("facts", facts)


def loss_of(model: Model) -> tuple[Callable[..., Any], list[tuple[Any, Any]]]:
    """Mean squared distance to other targets than the outputs, and its batches."""
    apply_fn, _, batches = model

    def loss_fn(p, x, y):
        return jnp.mean(jnp.square(apply_fn(p, x) - y))

    return loss_fn, [(x, np.sin(3 * x[:, :D])) for x in batches]


def learned(method: Any) -> Arrays:
    """States, two steps with what they measure, hard zeros."""
    model = mlp()
    apply_fn, params, batches = model
    loss_fn, batches = loss_of(model)
    uses = fh.discover(apply_fn, params, model.batches[0])
    stats = fh.calibrate(apply_fn, params, uses, model.batches)
    start, key = jax.random.split(KEY)
    states = fh.solve(method, start, params, uses, stats)
    tx = None if method.frozen_weights else optax.adamw(1e-2)
    training = fh.init_training(method, params, uses, states, tx, key=key)
    out = flat("first", training.states)
    step = fh.make_step(method, loss_fn, tx, uses)
    for j, batch in enumerate(batches):
        training, metrics = step(training.at(j / 2), *batch)
        out |= flat(f"metrics {j}", metrics)
    out |= flat("states", training.states) | flat("params", training.params)
    out |= flat("key", training.key)
    return out | flat("hard", fh.harden(method, training, uses).params)


def fit() -> Arrays:
    """Three updates of masks by a score function, with an evaluation after each."""
    method, model = fh.MaskPro(fh.NM(2, 4)), mlp()
    apply_fn, params, _ = model
    loss_fn, batches = loss_of(model)
    uses = fh.discover(apply_fn, params, model.batches[0])
    stats = fh.calibrate(apply_fn, params, uses, model.batches)
    states = fh.solve(method, KEY, params, uses, stats)
    states, history = fh.fit(
        method,
        states,
        loss_fn,
        params,
        uses,
        batches,
        key=KEY,
        tx=optax.adam(0.1),
        steps=3,
        every=1,
    )
    return flat("states", states) | flat("history", history)


def gradual() -> Arrays:
    """Two stages; stopped in the second and resumed, the result is the same bits."""
    method = fh.HardConcrete(fh.FlexHiNM(4, permute=None))
    model = mlp()
    loss_fn, batches = loss_of(model)
    uses = fh.discover(model.apply_fn, model.params, model.batches[0])

    def run(folder: str, resume: bool = False) -> Any:
        return fh.gradual(
            method,
            loss_fn,
            model.params,
            uses,
            lambda step: batches[step % 2],
            [fh.Stage(0.5, 3, anneals=2), fh.Stage(0.75, 3)],
            optax.adamw(1e-2),
            key=KEY,
            stats_fn=lambda p: fh.calibrate(model.apply_fn, p, uses, model.batches),
            log_every=1,
            save_every=2,
            checkpoints=folder,
            resume=resume,
        )

    def outcome(run: Any) -> Arrays:
        tree = run.training
        return (
            flat("params", run.params)
            | flat("plans", run.plans)
            | flat("states", tree.states)
            | flat("optimizer", [tree.opt_state, tree.learned_opt])
        )

    with tempfile.TemporaryDirectory() as folder:
        whole = run(f"{folder}/whole")
        rows = list(whole)
        stopped = list(itertools.islice(run(f"{folder}/stopped"), 6))
        resumed = run(f"{folder}/stopped", resume=True)
        again = list(resumed)
    want, got = outcome(whole), outcome(resumed)
    assert 0 < len(again) < len(rows) == 8 and stopped[-1]["step"] == 5
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, name)
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    return want | {"losses": np.array(losses)}


def keep_sparse() -> Arrays:
    """Two updates of an optimiser that keeps the zeros."""
    model = mlp()
    loss_fn, batches = loss_of(model)
    uses = fh.discover(model.apply_fn, model.params, model.batches[0])
    states = fh.solve(fh.Magnitude(fh.NM(2, 4)), KEY, model.params, uses)
    plans = fh.decide(fh.Magnitude(fh.NM(2, 4)), states, model.params, uses)
    params = fh.densify(plans, model.params, uses)
    keep = fh.keep_tree(plans, params, uses)
    tx = fh.keep_sparse(optax.adamw(1e-2), keep)

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, out = tx.init(params), flat("keep", keep)
    for j, batch in enumerate(batches):
        params, state, loss = step(params, state, *batch)
        out[f"loss {j}"] = np.asarray(loss)
    return out | flat("params", params)


def programs() -> dict[str, tuple[Callable[[], Arrays], bool]]:
    """Name -> the program, and whether it is slow: compiles for more than a moment."""
    out: dict[str, tuple[Callable[[], Arrays], bool]] = {}

    def add(name: str, slow: bool, f: Callable[..., Arrays], *args: Any) -> None:
        out[name] = functools.partial(f, *args), slow

    for name, make in MODELS.items():
        model = make()
        add(f"{name}, one shot, Wanda", False, one_shot, model, WANDA, True)
        add(f"{name}, one shot, SparseGPT", True, one_shot, model, SPARSEGPT)
        add(f"{name}, seq, Wanda", False, sequential, model, WANDA, "seq")
        add(f"{name}, asym, Refit", True, sequential, model, REFIT, "asym")
        add(f"{name}, resid, SparseGPT", True, sequential, model, SPARSEGPT, "resid")
    add("mlp, one shot, Gyro", True, one_shot, mlp(), GYRO)
    add("mlp, one shot, ALPS", True, one_shot, mlp(), fh.ALPS(fh.NM(2, 4)))
    add("attention, resid, Refit", True, sequential, attention(), REFIT, "resid")
    rules = {"fixed": "skip"}
    few = fh.Refit(WANDA, steps=3)  # more would make much of the last bits
    add("wide, resid, Refit", False, sequential, wide(), few, "resid", rules)
    add("step, HardConcrete", False, learned, fh.HardConcrete(fh.NM(2, 4)))
    add("step, MaskLLM", True, learned, fh.MaskLLM(fh.NM(2, 4)))
    add("fit", True, fit)
    add("gradual", True, gradual)
    add("keep_sparse", False, keep_sparse)
    return out
