import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.training.run import NotFinite
from tests.training import program

SCHEDULES = fh.schedules


def test_cubic_is_the_formula_of_zhu_and_gupta():
    s = SCHEDULES.cubic(0.1, 0.9, 20, begin=5)
    for t in range(40):
        u = min(max(t - 5, 0), 20) / 20
        want = 0.9 + (0.1 - 0.9) * (1 - u) ** 3
        assert float(s(t)) == pytest.approx(want, abs=1e-6)


def test_linear_and_staged_schedules_never_fall():
    for s in (SCHEDULES.linear(0.2, 0.8, 10), SCHEDULES.staged([0.2, 0.5, 0.8], 4)):
        values = [float(s(t)) for t in range(13)]
        assert values == sorted(values)
        assert values[0] == pytest.approx(0.2) and values[-1] == pytest.approx(0.8)
    assert [float(SCHEDULES.staged([0.2, 0.5], 4)(t)) for t in (3, 4)] == pytest.approx(
        [0.2, 0.5]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: SCHEDULES.cubic(0.8, 0.5, 10),
        lambda: SCHEDULES.linear(0.5, 1.2, 10),
        lambda: SCHEDULES.staged([0.5, 0.4], 10),
        lambda: SCHEDULES.staged([], 10),
        lambda: fh.Stage(0.5, -1),
        lambda: fh.flexhinm_gp(steps=3),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match="need"):
        make()


def test_progress_moves_in_equal_steps_and_ends_at_one():
    found = [fh.Stage(0.5, 8, anneals=4).progress(j) for j in range(8)]
    np.testing.assert_allclose(found, np.repeat([0, 1 / 3, 2 / 3, 1], 2))
    np.testing.assert_allclose(
        [fh.Stage(0.5, 5).progress(j) for j in range(5)], np.linspace(0, 1, 5)
    )
    assert fh.Stage(0.5, 1).progress(0) == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([fh.Stage(0.75, 2), fh.Stage(0.5, 2)], "stage 1, in: sparsity 0.5 is below"),
        ([fh.Stage(0.5, 2), fh.Stage(1.5, 2)], r"stage 1, in: sparsity=1.5 is outside"),
        ([], "stages is empty"),
    ],
)
def test_stages_that_cannot_be_met_are_refused_before_any_work(stages, message):
    with pytest.raises(ValueError, match=message):
        program.make(stages=stages)


def test_hinm_refuses_a_stage_below_its_own_sparsity():
    method = fh.HardConcrete(fh.HiNM(8, permute=None))
    with pytest.raises(ValueError, match=r"stage 0, in: sparsity=0.3 is outside"):
        program.make(method=method, stages=[fh.Stage(0.3, 2)])


@pytest.mark.parametrize("kind", ["learned", "scores"])
def test_kept_sets_shrink_from_stage_to_stage_and_zeros_are_exact(kind):
    pattern = fh.FlexHiNM(8, permute=None)
    learned = kind == "learned"
    method = fh.HardConcrete(pattern) if learned else fh.Wanda(pattern)
    dense = program.params()
    uses = fh.discover(program.model, dense, program.batch_at(0)[0])
    seen = []

    def stats_fn(params):
        seen.append(float((params["in"] == 0).mean()))
        batches = [program.batch_at(0)[:1]]
        return fh.calibrate(program.model, params, uses, batches)

    targets = (0.4, 0.6, 0.8)
    stages = [fh.Stage(s, 3) for s in targets]
    run = program.make(method=method, stages=stages, stats_fn=stats_fn)
    before, hard = None, []
    for row in run:
        if row["kind"] != "stage":
            assert np.isfinite(row["loss"])
            continue
        hard.append(row["sparsity"])
        keep = np.concatenate([np.ravel(p.support.keep) for p in run.plans.values()])
        zeros = [np.ravel(run.params[k].T == 0) for k in run.plans]
        np.testing.assert_array_equal(np.concatenate(zeros), ~keep)
        assert before is None or not (keep & ~before).any()
        before = keep
    np.testing.assert_allclose(hard, targets, atol=0.07)
    assert seen[0] == 0 and seen[1] == pytest.approx(0.4, abs=0.07)
    for plan in run.plans.values():
        fh.verify(plan)


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(tmp_path):
    def batch_at(step):
        x, y = program.batch_at(step)
        return (x * np.nan if step == 4 else x), y

    method = fh.Magnitude(fh.NM(2, 4))
    options = {"method": method, "stages": [fh.Stage(None, 8)], "batch_at": batch_at}
    run = program.make(tmp_path, **options)
    with pytest.raises(NotFinite, match=r"step 5: .*step-00000004"):
        list(run)
    chex.assert_tree_all_finite(run.params)
    tolerant = program.make(tmp_path, resume=True, max_skipped=1, **options)
    assert list(tolerant)[-1]["skipped"] == 1


def test_a_tree_with_none_in_place_of_leaves_is_trained_saved_and_resumed(tmp_path):
    model = eqx.nn.MLP(8, 4, 8, 1, use_bias=False, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    def run(resume):
        return fh.gradual(
            fh.HardConcrete(fh.NM(2, 4)),
            loss_fn,
            params,
            fh.discover(loss_fn, params, x),
            lambda step: (x,),
            [fh.Stage(None, 3)],
            optax.adamw(1e-2),
            key=jax.random.key(2),
            checkpoints=tmp_path,
            save_every=2,
            log_every=1,
            resume=resume,
        )

    first = run(False)
    rows = iter(first)
    assert [next(rows)["step"] for _ in range(2)] == [1, 2]
    second = run(True)
    assert [row["step"] for row in second][0] in (2, 3)
    weight = second.params.layers[0].weight
    assert jnp.mean(weight == 0) == 0.5
    assert second.params.layers[0].bias is None
    assert not params.layers[0].weight.is_deleted()


def test_gates_can_start_from_the_plans_of_another_method():
    dense = program.params()
    x = program.batch_at(0)[0]
    uses = fh.discover(program.model, dense, x)
    stats = fh.calibrate(program.model, dense, uses, [(x,)])
    alps = fh.ALPS(fh.NM(2, 4), center=True)
    states = fh.solve(alps, jax.random.key(0), dense, uses, stats)
    plans = fh.decide(alps, states, dense, uses)
    method = fh.HardConcrete(fh.NM(2, 4))
    begun, params = fh.adopt(method, {"in": plans["in"]}, dense, uses)
    keep = np.asarray(plans["in"].support.keep).T
    got = np.asarray(params["in"])
    np.testing.assert_array_equal(got[keep], np.asarray(plans["in"].weight).T[keep])
    np.testing.assert_array_equal(got[~keep], np.asarray(dense["in"])[~keep])
    assert np.any(np.asarray(params["bias"] != 0))
    hard = fh.decide(method, begun, params, uses)["in"]
    np.testing.assert_array_equal(hard.support.keep, plans["in"].support.keep)


def test_a_loop_of_ones_own_needs_only_solve_and_keep_sparse():
    """Gradual pruning without the driver: any loop, any optimiser."""
    params = program.params()
    uses = fh.discover(program.model, params, program.batch_at(0)[0])
    method, states = fh.Magnitude(fh.FlexHiNM(8, permute=None)), None
    tx, moments = optax.adam(1e-2), None

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(program.loss_fn)(params, x, y)
        updates, state = keeper.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for k, sparsity in enumerate((0.5, 0.75)):
        key = jax.random.key(k)
        states = fh.solve(method, key, params, uses, sparsity=sparsity, prev=states)
        plans = fh.decide(method, states, params, uses)
        params = fh.densify(plans, params, uses)
        keep = fh.keep_tree(plans, params, uses)
        keeper = fh.keep_sparse(tx, keep)
        state = keeper.init(params)
        state = state if moments is None else state._replace(inner=moments)
        for j in range(3):
            params, state = step(params, state, *program.batch_at(j))
        moments = state.inner
    np.testing.assert_array_equal(params["in"] == 0, ~keep["in"])
    assert step._cache_size() == 1
    assert float(jnp.mean(params["in"] == 0)) == 0.75
