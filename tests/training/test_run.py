"""The loop itself, on steps that compute next to nothing."""

import contextlib
import dataclasses
import io
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.io.checkpoints import Checkpoints
from flexhinm_jax.training.phases import At, Judge, Phase
from flexhinm_jax.training.run import NotFinite, Run
from tests.test_docs import BLOCK, DOCS

KEY = jax.random.key(0)


def start():
    params = {"w": jnp.zeros(2, jnp.float32)}
    return fh.Training.under({"w": None}, params, optax.sgd(0.1), key=KEY)


def adding(amount, bad=()):
    """A step that adds to the weights; its loss is NaN in some steps."""

    def step(training, x):
        now = training.params["w"] + amount + 0 * x
        k = int(training.step)
        loss = jnp.float32(np.nan if k in bad else k)
        after = dataclasses.replace(training, params={"w": now}, step=training.step + 1)
        return after, {"loss": loss, "finite": jnp.isfinite(loss)}

    return step


def batch_at(step):
    return (jnp.float32(step),)


def test_a_row_holds_the_mean_loss_since_the_last_one():
    seen = []
    run = Run(
        start(),
        [Phase(adding(1.0), 3), Phase(adding(10.0), 2)],
        batch_at,
        every=2,
        tracker=lambda step, row: seen.append((step, row["loss"])),
    )
    rows = list(run)
    assert seen == [(2, 0.5), (4, 2.5), (5, 4.0)]
    assert [row["stage"] for row in rows] == [0, 1, 1]
    assert run.rows == rows and list(run) == []
    np.testing.assert_array_equal(run.now().params["w"], [23, 23])


def test_phases_begin_end_and_anneal():
    parts = []

    def watched(training, at):
        assert float(training.progress) == pytest.approx(at.part)
        parts.append(at)
        return training

    def begin(training):
        return dataclasses.replace(training, params={"w": jnp.full(2, 100.0)})

    def end(training):
        return training, {"w": float(training.params["w"][0])}

    phases = [
        Phase(adding(1.0), 3, end=end),
        Phase(adding(1.0), 2, begin, end, lambda done: 0.25),
    ]
    rows = list(Run(start(), phases, batch_at, before=watched, every=10))
    assert [r["w"] for r in rows if r["kind"] == "stage"] == [3, 102]
    assert [at.part for at in parts] == [0, 0.5, 1, 0.25, 0.25]
    assert parts[-1] == At(4, 0.8, 1, 0.25)


def test_a_duration_shares_itself_among_phases(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(fh.Duration, "clock", lambda self: float(next(clock)))
    phases = [Phase(adding(1.0), 3), Phase(adding(1.0), 7)]
    run = Run(start(), phases, batch_at, fh.Duration(20, "cpu-seconds"), every=1)
    rows = list(run)
    assert run.step == 20 and run.spent == 20
    assert [row["stage"] for row in rows] == [0] * 6 + [1] * 14
    first = [row["part"] for row in rows[:6]]
    np.testing.assert_allclose(first, np.arange(6) / 6)
    by_steps = Run(start(), phases, batch_at, fh.Duration(10), every=1)
    assert [row["stage"] for row in by_steps] == [0] * 3 + [1] * 7
    short = Run(start(), phases, batch_at, fh.Duration(20, "minutes", most=4))
    assert [row["step"] for row in short] == [4]


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (0, "minutes", "0 minutes is not positive"),
        (float("nan"), "steps", "nan steps is not positive"),
        (1, "hours", "known: steps, minutes, cpu-seconds"),
    ],
)
def test_a_bad_duration_is_refused(amount, unit, text):
    with pytest.raises(ValueError, match=text):
        fh.Duration(amount, unit)


def test_a_duration_counts_what_it_names():
    assert fh.Duration(200).progress(50, 1e9) == 0.25
    assert fh.Duration(8, "minutes").progress(50, 120) == 0.25
    assert fh.Duration(100, "cpu-seconds").progress(50, 25) == 0.25


def judged(folder=None, resume=False, looks=None):
    """Best at step 2: the value is the distance of the weights from 2."""
    judge = Judge(
        lambda training: training.params,
        lambda kept: float(abs(kept["w"][0] - 2)),
        looks,
    )
    saves = None if folder is None else Checkpoints(folder, 2, resume=resume)
    phases = [Phase(adding(1.0), 5)]
    return Run(start(), phases, batch_at, judge=judge, saves=saves, every=1)


def test_the_best_look_is_kept_and_survives_an_interruption(tmp_path):
    whole = judged()
    values = [row["value"] for row in whole]
    assert values == [2, 1, 0, 1, 2, 3] and whole.lowest == 0
    np.testing.assert_array_equal(whole.best["w"], [2, 2])
    first = judged(tmp_path)
    list(itertools.islice(first, 4))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')  # torn
    again = judged(tmp_path, True)
    assert [row["step"] for row in again] == [3, 4, 5]
    assert [row["value"] for row in again.rows] == values
    np.testing.assert_array_equal(again.best["w"], whole.best["w"])
    few = judged(looks=2)
    assert [row["step"] for row in few if "value" in row] == [0, 3, 5]


def test_too_many_bad_losses_stop_a_run_at_the_next_row():
    phases = [Phase(adding(1.0, bad=(1, 4)), 6)]
    with pytest.raises(NotFinite, match=r"step 2: .*in 1 steps.*give checkpoints="):
        list(Run(start(), phases, batch_at, every=3))
    run = Run(start(), phases, batch_at, every=3, max_skipped=1)
    with pytest.raises(NotFinite, match=r"step 5: .*in 2 steps"):
        list(run)
    assert len(list(Run(start(), phases, batch_at, every=3, max_skipped=2))) == 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="phases is empty"):
        Run(start(), [], batch_at)
    with pytest.raises(ValueError, match="every=0"):
        Run(start(), [Phase(adding(1.0), 1)], batch_at, every=0)
    with pytest.raises(ValueError, match="tracker is 3: need a function"):
        Run(start(), [Phase(adding(1.0), 1)], batch_at, tracker=3)
    with pytest.raises(ValueError, match="the run has not begun"):
        Run(start(), [Phase(adding(1.0), 1)], batch_at).now()
    with pytest.raises(ValueError, match="the start evaluates to nan"):
        judge = Judge(lambda training: 0, lambda kept: float("nan"))
        list(Run(start(), [Phase(adding(1.0), 1)], batch_at, judge=judge))
    with pytest.raises(TypeError, match="'log_evry'; did you mean 'log_every'"):
        method, stages = fh.Magnitude(fh.NM(2, 4)), [fh.Stage(None, 1)]
        params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
        loss_fn = lambda p, x: jnp.sum(x @ p["w"])  # noqa: E731
        uses = fh.discover(loss_fn, params, x)
        given = (method, loss_fn, params, uses, batch_at, stages, optax.sgd(0.1))
        wrong: Any = {"log_evry": 3}
        fh.gradual(*given, key=KEY, **wrong)


TRACKERS = {
    found["title"]: found["code"]
    for found in BLOCK.finditer((DOCS / "recipes/trackers.md").read_text())
    if found["title"]
}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_of_the_docs_takes_every_row(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(TRACKERS[name], scope)
        run = Run(start(), [Phase(adding(1.0), 4)], batch_at, tracker=scope["write"])
        assert len(list(run)) == 1
