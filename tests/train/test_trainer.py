"""Dense training, pruning and training on, on a model of a thousand weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import vision as models
from flexhinm_jax.training.run import NotFinite
from train import vision
from train.lab import optimizers, results, tasks
from train.lab.recipes import Recipe, recipes
from train.lab.trainer import Trainer

CONFIG = vision.Config(
    name="tiny",
    model="mlp",
    fields={"width": 32, "hidden": 32, "depth": 1},
    rules=(("head", "skip"),),
    dense_steps=60,
    steps=20,
    batch_size=64,
    learning_rate=1e-2,
    prune_rate=1e-2,
    every=10,
)
HINM = fh.HiNM(16, permute=None)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(vision.task(CONFIG, None, (0, 1)), CONFIG)


@pytest.fixture(scope="module")
def dense(trainer):
    return trainer.dense()


def test_lanes_are_found_as_stacks_by_discover_too(trainer):
    task = trainer.task
    model = models.create("mlp", 10, **CONFIG.fields)
    images = jnp.zeros((2, 3, 8, 8, 1), jnp.float32)
    whole = fh.discover(
        jax.vmap(model.apply), task.params, images, rules={"head": "skip"}
    )
    layouts = {path: use.layout for path, use in whole.leaves.items()}
    assert {path: use.layout for path, use in task.uses.leaves.items()} == layouts


def test_a_lane_does_not_depend_on_the_lanes_beside_it(trainer):
    both, alone = trainer.task, vision.task(CONFIG, None, (1,))
    gradients = []
    for task in (both, alone):
        grads = jax.jit(jax.grad(task.loss_fn))(task.params, task.batch_at(3))
        clip = optimizers.lanewise(optax.clip_by_global_norm(0.01 / task.lanes))
        clipped, _ = clip.update(grads, clip.init(grads))
        gradients.append([task.lanes * x[-1] for x in jax.tree.leaves(clipped)])
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in gradients[-1]))
        np.testing.assert_allclose(norm, 0.01, rtol=1e-3)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_dense_training_learns_and_is_read_back(trainer, dense, tmp_path):
    loss = lambda p: trainer.task.evaluate(p)["nll"]  # noqa: E731
    assert (loss(dense) < 0.6 * loss(trainer.task.params)).all()
    written = trainer.dense(tmp_path)
    assert len(results.read(tmp_path / "dense.jsonl")) == 6
    (tmp_path / "dense.jsonl").unlink()
    again = trainer.dense(tmp_path)
    assert not (tmp_path / "dense.jsonl").exists()
    for a, b, c in zip(*map(jax.tree.leaves, (dense, written, again)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(b, c)


def test_the_dense_model_depends_on_the_dense_part_of_a_configuration():
    part = CONFIG.before_pruning()
    assert dataclasses.replace(CONFIG, steps=99, name="x").before_pruning() == part
    assert dataclasses.replace(CONFIG, dense_steps=99).before_pruning() != part
    assert dataclasses.replace(CONFIG, shift=2).before_pruning() != part


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("unstructured", fh.Magnitude(fh.Unstructured()), stages=4),
        Recipe("fixed", fh.Magnitude(HINM)),
        pytest.param(
            Recipe("gates", fh.HardConcrete(fh.FlexHiNM(16, permute=None)), stages=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda r: r.title,
)
def test_a_recipe_ends_with_the_asked_zeros_and_lower_loss(
    trainer, dense, recipe, tmp_path
):
    key, path = jax.random.key(0), tmp_path / "run.jsonl"
    params, records = trainer.prune(recipe, 0.75, dense, key, path)
    np.testing.assert_allclose(tasks.zeros(trainer.task, params), 0.75, atol=0.02)
    steps = [r["step"] for r in results.read(path)]
    assert {10, 20} <= set(steps) and steps == sorted(set(steps))
    losses = {r["step"]: r["loss"] for r in records}
    assert losses[20] < losses[10]
    found = trainer.task.evaluate(params)
    assert set(found) == {"nll", "accuracy"} and found["nll"].shape == (2,)
    again, _ = trainer.prune(recipe, 0.75, dense, key)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("stages", fh.Magnitude(HINM), stages=2, pruning=0.8),
        pytest.param(
            Recipe("gates", fh.HardConcrete(HINM), stages=2, pruning=0.6),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda r: r.title,
)
@pytest.mark.parametrize("stop", [11, 19])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(
    trainer, dense, recipe, stop, tmp_path, monkeypatch
):
    def pruned(resume):
        saves, path = (
            results.saves(tmp_path / "saved", resume, 10),
            tmp_path / "run.jsonl",
        )
        return trainer.prune(recipe, 0.75, dense, jax.random.key(0), path, saves)

    whole, records = pruned(False)
    task, batch_at = trainer.task, trainer.task.batch_at

    def stopping(step):
        if step == stop:
            raise KeyboardInterrupt
        return batch_at(step)

    monkeypatch.setattr(
        trainer, "task", dataclasses.replace(task, batch_at=stopping), raising=True
    )
    with pytest.raises(KeyboardInterrupt):
        pruned(False)
    monkeypatch.setattr(trainer, "task", task)
    resumed, again = pruned(True)
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoints_of_another_run_are_refused(trainer, dense, tmp_path):
    recipe, key = Recipe("m", fh.Magnitude(HINM)), jax.random.key(0)
    saves = results.saves(tmp_path / "saved", False, 10)
    trainer.prune(recipe, 0.5, dense, key, None, saves)
    saves = results.saves(tmp_path / "saved", True, 10)
    with pytest.raises(ValueError, match="sparsity"):
        trainer.prune(recipe, 0.75, dense, key, None, saves)


def test_fixed_masks_share_one_program(trainer, dense):
    compiled = []
    for pattern in (HINM, fh.NM(2, 4)):
        trainer.prune(Recipe("a", fh.Magnitude(pattern)), 0.5, dense, jax.random.key(0))
        compiled.append(trainer.steps[None]._cache_size())
    assert compiled[0] == compiled[1]


def test_a_run_that_diverges_stops_and_keeps_its_records(
    trainer, dense, tmp_path, monkeypatch
):
    task, path = trainer.task, tmp_path / "run.jsonl"

    def batch_at(step):
        x, y = task.batch_at(step)
        return (x * np.nan if step == 12 else x), y

    broken = dataclasses.replace(task, batch_at=batch_at)
    monkeypatch.setattr(trainer, "task", broken)
    with pytest.raises(NotFinite, match="step 13: loss or gradient is not finite"):
        trainer.prune(Recipe("dense", None), 0.0, dense, jax.random.key(0), path)
    assert [r["step"] for r in results.read(path)] == [10]


def test_stages_rise_to_the_target_before_the_end():
    recipe = Recipe("r", fh.Magnitude(fh.Unstructured()), stages=4, pruning=0.5)
    stages, finish = recipe.stages_of(80, 0.8)
    assert [s.steps for s in stages] == [10, 10, 10, 50] and finish == 0
    found: list = [s.sparsity for s in stages]
    assert found == sorted(found)
    assert found[3] == 0.8 and found[0] == pytest.approx(0.8 * (1 - 0.75**3))
    gates = dataclasses.replace(recipe, method=fh.HardConcrete(HINM))
    stages, finish = gates.stages_of(80, 0.8)
    assert [s.steps for s in stages] == [10, 10, 10, 10] and finish == 40
    hinm = Recipe("r", fh.Magnitude(HINM), stages=3)
    first = hinm.stages_of(30, 0.6)[0][0]
    assert first.sparsity == 0.5, "HiNM removes half at least"
    with pytest.raises(ValueError, match="stages=0"):
        Recipe("r", None, stages=0)


def test_every_recipe_of_the_comparison_is_there():
    assert list(recipes(64)) == [
        "dense",
        "unstructured",
        "hinm",
        "hinm_random",
        "hinm_gyro",
        "flexhinm_gyro",
        "flexhinm_gp",
        "flexhinm_noiseless",
        "flexhinm_gumbel",
    ]
    method: Any = recipes(64)["hinm"].method
    assert method.pattern.vector_size == 64


def test_lanes_do_not_scale_each_others_gates():
    recipe = Recipe("r", None, mask_rate=0.1, mask_optimizer="relative")
    tx, grads = recipe.mask_tx(), {"a": jnp.array([[1.0, 7.0], [10.0, 70.0]])}
    updates: Any = tx.update(grads, tx.init(grads))[0]
    # Root mean square 1, times the rate: (1, 7) / 5 / 10.
    np.testing.assert_allclose(updates["a"], [[-0.02, -0.14]] * 2, rtol=1e-5)
    nothing = {"a": ()}  # no gates: a pattern without groups
    assert tx.update(nothing, tx.init(nothing))[0] == nothing
    with pytest.raises(ValueError, match="optimizer='lion'; known: adam"):
        Recipe("r", None, mask_optimizer="lion")  # type: ignore[arg-type]


def test_moved_counts_what_is_kept_in_place_of_something_else(trainer, dense):
    pruned, _ = trainer.prune(
        Recipe("a", fh.Magnitude(HINM)), 0.75, dense, jax.random.key(0)
    )
    assert (tasks.moved(trainer.task, dense, pruned) == 0).all()
    np.testing.assert_allclose(
        tasks.moved(trainer.task, pruned, dense), 0.75, atol=0.02
    )
