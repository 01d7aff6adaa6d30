"""Checks on eight fake devices; run as a program by `test_sharding.py`.

The number of devices is fixed when jax starts, so these cannot share a process with
the other tests.
"""

import dataclasses
import itertools
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax.training import sharding
from tests.training import program

KEY = jax.random.key(5)
METHOD = fh.HardConcrete(fh.FlexHiNM(4, permute=None))
TENSOR = {"in": P(None, "model"), "bias": P("model"), "out": P()}
WHOLE = {"in": P(), "bias": P(), "out": P()}
TX = optax.adamw(1e-2)
STEPS = 4


def start(params, method=METHOD):
    uses = fh.discover(program.model, program.params(), program.batch_at(0)[0])
    whole = sharding.gather(params)
    states = fh.solve(method, KEY, whole, uses, sparsity=0.5)
    return uses, fh.init_training(method, params, uses, states, TX, key=KEY)


def train(training, uses, place, method=METHOD):
    """Two stages; the losses, and the training at the end."""
    where = sharding.mesh_of(training) and jax.tree.map(lambda x: x.sharding, training)
    traces, losses = [], []

    def loss_fn(*args):
        traces.append(1)
        return program.loss_fn(*args)

    step = fh.make_step(method, loss_fn, TX, uses, shardings=where)
    for stage in range(2):
        if stage:
            training = fh.next_stage(method, training, uses, key=KEY, sparsity=0.75)
        for j in range(STEPS):
            batch = place(program.batch_at(j))
            training, metrics = step(training.at(j / (STEPS - 1)), *batch)
            losses.append(float(metrics["loss"]))
        training = fh.harden(method, training, uses)
    assert len(traces) == 1, len(traces)
    return losses, training


def alone():
    uses, training = start(program.params())
    return train(training, uses, lambda b: b)


def compare(found):
    losses, training = found
    np.testing.assert_allclose(losses, ALONE[0], rtol=1e-5)
    want = ALONE[1]
    for path, state in training.states.items():
        mine, other = state.fixed["support"], want.states[path].fixed["support"]
        assert jax.tree.all(jax.tree.map(np.array_equal, mine, other)), path
        for x in jax.tree.leaves(mine):
            if x.sharding.is_fully_replicated:
                shards = [np.asarray(s.data) for s in x.addressable_shards]
                assert all(np.array_equal(s, shards[0]) for s in shards)
    for name, leaf in training.params.items():
        np.testing.assert_allclose(leaf, want.params[name], rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(leaf == 0, want.params[name] == 0)


def on_mesh(explicit, model):
    mesh = sharding.make_mesh(8 // model, model, explicit=explicit)
    specs = TENSOR if model > 1 else WHOLE
    params = {
        k: jax.device_put(v, NamedSharding(mesh, specs[k]))
        for k, v in program.params().items()
    }
    uses, training = start(params)
    sharding.check_sharding(params, uses, METHOD)
    with jax.set_mesh(mesh):
        found = train(training, uses, lambda b: sharding.shard_batch(b, mesh))
    compare(found)
    for name, spec in specs.items():
        leaf, wanted = found[1].params[name], NamedSharding(mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), leaf.sharding
    gates = found[1].states["in"].learned["log_alpha"]
    wanted = NamedSharding(mesh, P("model") if model > 1 else P())
    assert gates.sharding.is_equivalent_to(wanted, 2), gates.sharding


def automatic_data_parallel():
    on_mesh(False, 1)


def automatic_tensor_parallel():
    on_mesh(False, 2)


def explicit_data_parallel():
    on_mesh(True, 1)


def explicit_tensor_parallel():
    on_mesh(True, 2)


def pmap():
    uses, training = start(program.params())
    step = fh.make_step(METHOD, program.loss_fn, TX, uses, axis_name="batch")
    mapped = jax.pmap(step, axis_name="batch", donate_argnums=0)
    losses, many = [], jax_utils.replicate(training)
    for stage in range(2):
        if stage:
            one = jax_utils.unreplicate(many)
            one = fh.next_stage(METHOD, one, uses, key=KEY, sparsity=0.75)
            many = jax_utils.replicate(one)
        for j in range(STEPS):
            progress = jnp.full(8, j / (STEPS - 1), jnp.float32)
            many = dataclasses.replace(many, progress=progress)
            batch = sharding.split_batch(program.batch_at(j), 8)
            many, metrics = mapped(many, *batch)
            losses.append(float(metrics["loss"][0]))
        for leaf in jax.tree.leaves((many.params, many.states)):
            for device in range(8):
                assert np.array_equal(leaf[device], leaf[0])
        many = jax_utils.replicate(fh.harden(METHOD, jax_utils.unreplicate(many), uses))
    compare((losses, jax_utils.unreplicate(many)))


def shard_map_whether_it_checks_or_not():
    """One step on eight devices moves what a step on one does, by the same amount."""
    batch, mesh = program.batch_at(0), sharding.make_mesh(8)
    uses = fh.discover(program.model, program.params(), batch[0])
    stats = fh.calibrate(program.model, program.params(), uses, [batch[:1]])
    pattern, data = fh.NM(2, 4), P("data")
    for method in (
        fh.Wanda(pattern),
        fh.HardConcrete(pattern),
        fh.MaskLLM(pattern),
        fh.MaskPro(pattern),
    ):
        states = fh.solve(method, KEY, program.params(), uses, stats)
        own = None if isinstance(method, fh.Wanda) else method
        tx = None if isinstance(method, fh.MaskLLM | fh.MaskPro) else optax.sgd(0.1)
        options = {"mask_tx": optax.sgd(0.1)}
        make = (own, program.loss_fn, tx, None if own is None else uses)

        def begin(method=method, states=states, tx=tx, options=options):
            parts = method, program.params(), uses, states, tx
            return fh.init_training(*parts, key=KEY, **options)

        alone, told = fh.make_step(*make, **options)(begin(), *batch)
        for checks in (True, False):
            step = jax.shard_map(
                fh.make_step(*make, axis_name="data", **options),
                mesh=mesh,
                in_specs=(P(), data, data),
                out_specs=P(),
                check_vma=checks,
            )
            many, found = jax.jit(step)(begin(), *batch)
            for name in told:
                np.testing.assert_allclose(found[name], told[name], rtol=1e-4)
            for a, b in zip(
                jax.tree.leaves((many.params, many.states)),
                jax.tree.leaves((alone.params, alone.states)),
                strict=True,
            ):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def gradual_resumes_on_its_mesh():
    """An interrupted run goes on where its arrays lived, with the same bits."""
    mesh = sharding.make_mesh(4, 2)
    params = {
        k: jax.device_put(v, NamedSharding(mesh, TENSOR[k]))
        for k, v in program.params().items()
    }
    uses = fh.discover(program.model, program.params(), program.batch_at(0)[0])
    stages = [fh.Stage(0.5, 2), fh.Stage(0.75, 2)]

    def run(method, folder=None, resume=False):
        return fh.gradual(
            method,
            program.loss_fn,
            params,
            uses,
            lambda step: sharding.shard_batch(program.batch_at(step), mesh),
            stages,
            TX,
            key=KEY,
            checkpoints=folder,
            save_every=1,
            log_every=1,
            resume=resume,
        )

    for method in (METHOD, fh.Magnitude(METHOD.pattern)):
        whole = run(method)
        list(whole)
        with tempfile.TemporaryDirectory() as folder:
            list(itertools.islice(run(method, folder), 4))
            again = run(method, folder, True)
            assert next(iter(again))["step"] == 4
            list(again)
        for a, b in zip(
            jax.tree.leaves((whole.now().params, whole.now().opt_state)),
            jax.tree.leaves((again.now().params, again.now().opt_state)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), b.sharding


def learned_masks(method, mesh=None):
    """Three steps of a method with frozen weights; where its logits were and are."""
    params = program.params()
    if mesh is not None:
        params = {
            k: jax.device_put(v, NamedSharding(mesh, TENSOR[k]))
            for k, v in params.items()
        }
    uses = fh.discover(program.model, program.params(), program.batch_at(0)[0])
    stats = {
        path: fh.Stats(jnp.arange(1.0, i + 1), jnp.zeros(i), jnp.float32(1))
        for path, use in uses.leaves.items()
        for i in [use.layout.matrix_shape[1]]
    }
    whole = sharding.gather(params)
    states = fh.solve(method, KEY, whole, uses, stats)
    training = fh.init_training(method, params, uses, states, None, key=KEY, mask_tx=TX)
    where = sharding.places(training)
    step = fh.make_step(
        method, program.loss_fn, None, uses, mask_tx=TX, shardings=where
    )
    first = jax.tree.map(lambda x: x.sharding, training.states["in"].learned)
    for j in range(3):
        batch = program.batch_at(j)
        if mesh is not None:
            batch = sharding.shard_batch(batch, mesh)
        training, _ = step(training.at(j / 2), *batch)
    return first, {path: state.learned for path, state in training.states.items()}


def masks_live_with_their_weights():
    method = fh.MaskLLM(fh.NM(2, 4))
    _, want = learned_masks(method)
    for explicit in (False, True):
        mesh = sharding.make_mesh(4, 2, explicit=explicit)
        with jax.set_mesh(mesh):
            first, found = learned_masks(method, mesh)
        wanted = NamedSharding(mesh, P(None, "model"))
        for at in (first["logits"], found["in"]["logits"].sharding):
            assert at.is_equivalent_to(wanted, 4), at
        for path, learned in found.items():
            np.testing.assert_allclose(
                learned["logits"], want[path]["logits"], rtol=1e-3, atol=1e-5
            )


def refuses(params, method, *words):
    uses = fh.discover(program.model, program.params(), program.batch_at(0)[0])
    try:
        sharding.check_sharding(params, uses, method)
    except ValueError as error:
        missing = [w for w in words if w not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError("accepted")


def shards_that_split_the_pattern():
    mesh = sharding.make_mesh(4, 2)
    split = lambda spec: {  # noqa: E731
        "in": jax.device_put(program.params()["in"], NamedSharding(mesh, spec)),
        **{k: program.params()[k] for k in ("bias", "out")},
    }
    outputs, inputs = split(P(None, "model")), split(P("model"))
    legal = "(None, 'model'), the outputs over 'model'"
    eights = fh.Wanda(fh.FlexHiNM(8, permute=None))
    refuses(outputs, eights, "in: sharding", "splits a vector", "holds 12", "of 8")
    refuses(inputs, METHOD, "splits a tile", "columns among all inputs", legal)
    refuses(outputs, fh.Wanda(fh.FlexHiNM(4)), "splits a vector", "permute=None")
    refuses(split(P("data")), fh.Wanda(fh.NM(4, 8)), "splits a group", "holds 4", legal)
    uses = fh.discover(program.model, program.params(), program.batch_at(0)[0])
    for fine, method in (
        (outputs, METHOD),
        (outputs, fh.Wanda(fh.NM(2, 4))),
        (inputs, fh.Wanda(fh.NM(2, 4))),
        (inputs, fh.Wanda(fh.Unstructured())),
    ):
        sharding.check_sharding(fine, uses, method)


def devices_and_batches_that_do_not_fit():
    for call, words in (
        (lambda: sharding.make_mesh(16), ("need 16 devices", "there are 8")),
        (lambda: sharding.make_mesh(4, 3), ("need 12 devices",)),
        (
            lambda: sharding.shard_batch((np.ones((12, 2)),), sharding.make_mesh(8)),
            ("12 rows do not divide over 8 devices", "such as 16"),
        ),
        (
            lambda: sharding.split_batch({"x": np.ones((9, 2))}, 8),
            ("['x']", "9 rows", "multiple of 8"),
        ),
    ):
        try:
            call()
        except ValueError as error:
            assert all(w in str(error) for w in words), error
        else:
            raise AssertionError(f"accepted: {words}")


CHECKS = [
    automatic_data_parallel,
    automatic_tensor_parallel,
    explicit_data_parallel,
    explicit_tensor_parallel,
    pmap,
    shard_map_whether_it_checks_or_not,
    gradual_resumes_on_its_mesh,
    masks_live_with_their_weights,
    shards_that_split_the_pattern,
    devices_and_batches_that_do_not_fit,
]

if __name__ == "__main__":
    import traceback

    assert jax.device_count() == 8
    ALONE = alone()
    for check in CHECKS:
        if len(sys.argv) > 1 and check.__name__ not in sys.argv[1:]:
            continue
        try:
            check()
            print("@ok", check.__name__, flush=True)
        except Exception:
            print("@FAILED", check.__name__, traceback.format_exc(), flush=True)
