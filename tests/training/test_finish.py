"""Steps under the last masks, and compiled steps that runs share."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from tests.training import program

STAGES = [fh.Stage(0.5, 2)]
make_run: Any = program.make


def test_steps_after_the_last_stage_keep_its_masks():
    run = make_run(stages=STAGES, finish=3)
    rows = iter(run)
    kinds = []
    for row in rows:
        kinds.append((row["kind"], row["step"]))
        if row["kind"] == "stage":
            keeps = {k: np.asarray(p.support.keep) for k, p in run.plans.items()}
            before = {k: np.array(v) for k, v in run.params.items()}
    assert kinds == [("step", 1), ("step", 2), ("stage", 2)] + [
        ("step", k) for k in (3, 4, 5)
    ]
    for path, plan in run.plans.items():
        fh.verify(plan, path=path)
        np.testing.assert_array_equal(plan.support.keep, keeps[path])
        np.testing.assert_array_equal(np.asarray(run.params[path]).T != 0, keeps[path])
        assert (np.asarray(run.params[path]) != before[path]).any()
    steps = [row for row in run.rows if row["kind"] == "step"]
    assert "temperature" in steps[0] and "temperature" not in steps[-1]


def test_runs_share_the_steps_that_a_given_function_remembers():
    tx, steps = optax.adam(1e-2), []

    @functools.cache
    def make(method, loss_fn, tx, uses, **options):
        assert method is None and uses is None, "fixed masks need neither"
        steps.append(fh.make_step(method, loss_fn, tx, uses, **options))
        return steps[-1]

    for pattern in (fh.NM(2, 4), fh.HiNM(8, permute=None)):
        method, more = fh.Magnitude(pattern), {"tx": tx, "make_step": make}
        list(make_run(method=method, stages=STAGES, **more))
    (step,) = steps
    assert step._cache_size() == 1


def test_there_is_nothing_to_finish_with_frozen_weights():
    method = fh.MaskLLM(fh.NM(2, 4))
    stats = lambda params: pytest.fail("not asked")  # noqa: E731
    with pytest.raises(
        ValueError, match="finish=3: MaskLLM leaves the weights as they"
    ):
        make_run(
            method=method,
            stages=[fh.Stage(None, 2)],
            finish=3,
            stats_fn=stats,
            key=jax.random.key(0),
        )
