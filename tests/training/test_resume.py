import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.io.checkpoints import Checkpoints
from tests.training import program

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nobody interrupts, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run = program.make(folder)
    rows = list(run)
    return run, rows, folder


def assert_same(a, b):
    a, b = program.outcome(a), program.outcome(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def test_a_run_abandoned_in_its_second_stage_continues_bit_for_bit(whole, tmp_path):
    run, rows, _ = whole
    first = program.make(tmp_path)
    seen = list(itertools.islice(first, 10))  # step 9; the last checkpoint is of 8
    assert first.phase == 1 and first.last.name == "step-00000008"
    second = program.make(tmp_path, resume=True)
    rest = list(second)
    assert rest[0]["step"] == 9
    assert_same(run, second)
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    again = {row["step"]: row["loss"] for row in seen + rest if row["kind"] == "step"}
    assert [again[k + 1] for k in range(12)] == losses


def test_a_finished_run_resumes_to_its_result(whole):
    run, _, folder = whole
    again = program.make(folder, resume=True)
    assert [row["kind"] for row in again] == ["stage"]
    assert_same(run, again)


def test_checkpoints_of_another_configuration_are_refused(whole):
    _, _, folder = whole
    other = fh.HardConcrete(program.METHOD.pattern, sparsity_weight=0.5)
    with pytest.raises(ValueError, match=r"sparsity_weight: saved 0.01, now 0.5"):
        list(program.make(folder, True, other))
    stages = [fh.Stage(0.5, 6, anneals=3), fh.Stage(0.8, 6)]
    with pytest.raises(ValueError, match=r"stages.1.sparsity: saved 0.75, now 0.8"):
        list(program.make(folder, True, stages=stages))
    with pytest.raises(ValueError, match="the leaves differ"):
        list(program.make(folder, True, tx=optax.sgd(0.1)))
    with pytest.raises(FileExistsError, match="continue with resume=True"):
        list(program.make(folder, False))


def test_checkpoints_of_other_parameters_are_refused(whole, monkeypatch):
    _, _, folder = whole
    same = program.params()
    others = [
        {**same, "bias": same["bias"] + 1e-6},
        {**same, "in": same["in"].at[0, 0].set(0)},
    ]
    for params in others:
        monkeypatch.setattr(program, "params", lambda params=params: params)
        for resume in (True, "auto"):
            with pytest.raises(ValueError, match="start: saved "):
                list(program.make(folder, resume))
    narrow = fh.discover(
        program.model, same, program.batch_at(0)[0], rules={"out": "skip"}
    )
    monkeypatch.setattr(program, "params", lambda: same)
    monkeypatch.setattr(program, "uses", lambda: narrow)
    with pytest.raises(ValueError, match="start: saved "):
        list(program.make(folder, True))


def test_missing_and_damaged_checkpoints_are_refused_and_older_ones_serve(
    whole, tmp_path
):
    run, _, folder = whole
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        list(program.make(tmp_path / "none", True))
    with pytest.raises(ValueError, match="needs the folder"):
        program.make(None, True)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    old, new = Checkpoints(copy).paths()
    for file in (new / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"(?s)damaged.*{old.name}") as caught:
        list(program.make(copy, True))
    assert new.name in str(caught.value)
    second = program.make(copy, "older")
    list(second)
    assert_same(run, second)


X = jax.random.normal(jax.random.key(1), (24, 8))


def experts(params, x, to):
    own = jnp.einsum("td,te->etd", jnp.tanh(x @ params["in"]), jax.nn.one_hot(to, 3))
    return jnp.einsum("etd,edh->eth", own, params["up"]).sum(0) @ params["out"]


def experts_loss(params, x, to):
    return jnp.mean(jnp.square(experts(params, x, to) - x[:, :4]))


def statistics(params, uses):
    """Of three experts, of which the last sees no token until there are zeros."""
    seen = 3 if bool((params["up"] == 0).any()) else 2
    batch = X, jnp.arange(24) % seen
    grads = jax.grad(experts_loss)(params, *batch)
    return {
        path: fh.accumulate_gradients(known, jnp.swapaxes(grads[path], -1, -2))
        for path, known in fh.calibrate(experts, params, uses, [batch]).items()
    }


@pytest.mark.parametrize(
    "method",
    [
        fh.Magnitude(fh.Unstructured()),
        fh.Wanda(fh.Unstructured()),
        fh.SparseGPT(fh.Unstructured()),
        fh.Fisher(fh.Unstructured()),
        fh.HardConcrete(fh.Unstructured()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_needs_statistics_or_scales_resumes_bit_for_bit(method, tmp_path):
    """What stands around the states differs from stage to stage, and from values."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (8, 8)),
        "up": jax.random.normal(keys[1], (3, 8, 8)) / 3,
        "out": jax.random.normal(keys[2], (8, 4)) * 1e-14,  # ordinary after a step
    }
    to = jnp.arange(24) % 3
    uses = fh.discover(experts, params, X, to)

    def run(folder=None, resume=False):
        return fh.gradual(
            method,
            experts_loss,
            params,
            uses,
            lambda step: (X, to),
            [fh.Stage(0.5, 2), fh.Stage(0.75, 2)],
            program.TX,
            key=jax.random.key(5),
            stats_fn=lambda params: statistics(params, uses),
            checkpoints=folder,
            save_every=1,
            log_every=1,
            resume=resume,
            make_step=program.make_step,
        )

    whole = run()
    list(whole)
    for rows, step in ((1, 2), (4, 4)):  # in the first stage, in the second
        folder, name = tmp_path / str(rows), f"step-{step - 1:08d}"
        first = run(folder)
        list(itertools.islice(first, rows))
        assert first.last.name == name
        names = " ".join(Checkpoints(folder).leaves(step - 1))
        assert ("out/fixed/around/scale" in names) == (rows == 1)
        blind = method.needs != "nothing" and rows == 1
        assert ("up/fixed/around/blind" in names) == blind
        again = run(folder, True)
        assert next(iter(again))["step"] == step
        list(again)
        assert_same(whole, again)


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def begin(folder, result, mode):
        command = [sys.executable, "-m", "tests.training.program"]
        return subprocess.Popen(
            [*command, str(folder), str(result), mode],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    steady = begin(tmp_path / "a", tmp_path / "a.npz", "new")
    out, _ = steady.communicate(timeout=600)
    assert steady.returncode == 0, out
    at = random.Random(os.getpid()).randint(1, 11)
    for _ in range(2):
        victim = begin(tmp_path / "b", tmp_path / "b.npz", "auto")
        assert victim.stdout is not None
        for line in victim.stdout:
            if line.split()[:1] == ["step"] and int(line.split()[1]) >= at:
                victim.kill()
                break
        victim.wait(timeout=600)
    last = begin(tmp_path / "b", tmp_path / "b.npz", "auto")
    out, _ = last.communicate(timeout=600)
    assert last.returncode == 0, f"killed at {at}: {out}"
    want, got = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert set(want.files) == set(got.files)
    for name in want.files:
        np.testing.assert_array_equal(want[name], got[name], f"{name}, killed at {at}")
